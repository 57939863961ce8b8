"""Op-level polish: spend spare memory on keeping values instead of recomputing them.

A schedule is seen as instances with lifetimes. The move: delete one recomputation and let its readers
read the previous instance, which then lives longer; whatever was computed only for the deleted one
goes as well. Moves are chosen by saved time per priced byte-slot, where a slot costs more the fuller
it is (a stand-in for the dual price of memory at that moment). Every move shortens the makespan.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from rematerialize.solve.step import Plan, Step

_GONE = 1 << 61  # subtracted from the memory of a deleted slot: it can never be the peak


@dataclass(slots=True)
class _Move:
    gain_s: float
    removed: list[int]
    ranges: list[tuple[int, int, int]]  # [start, stop) += bytes


class Retention:
    """A schedule that can be improved under a budget that only grows.

    Parameters
    ----------
    step : Step
    plan : Plan
        A valid plan; its peak is the least budget that makes sense.
    price_power : float
        0 prices all slots alike; larger values avoid slots that are nearly full.
    """

    def __init__(self, step: Step, plan: Plan, *, price_power: float = 4.0) -> None:
        self.step = step
        self.plan = plan
        self.power = price_power
        order = plan.order
        self.end = len(order)
        self.alive = [True] * self.end
        self.memory = np.asarray(step.timeline(plan), dtype=np.int64)
        self.sources: list[list[int]] = []
        self.readers: list[dict[int, list[int]]] = [{v: [] for v in step.outputs[op]} for op in order]
        self.runs: list[list[int]] = [[] for _ in step.names]
        self._link()

    def _link(self) -> None:
        """Tie every read to the slot that made the instance it reads."""
        step, newest = self.step, dict[int, int]()
        for slot, op in enumerate(self.plan.order):
            if slot == self.plan.split:
                self._hold(newest, step.held_outputs)
            self.sources.append([newest.get(value, -1) for value in step.inputs[op]])
            for value, source in zip(step.inputs[op], self.sources[-1], strict=True):
                if source >= 0:
                    self.readers[source][value].append(slot)
            for value in step.outputs[op]:
                newest[value] = slot
            self.runs[op].append(slot)
        if self.plan.split == self.end:
            self._hold(newest, step.held_outputs)
        self._hold(newest, step.held_gradients)

    def _hold(self, newest: dict[int, int], values: frozenset[int]) -> None:
        for value in values:
            if value in newest:
                readers = self.readers[newest[value]][value]
                if self.end not in readers:
                    readers.append(self.end)

    def result(self) -> Plan:
        """Return the present plan."""
        order = self.plan.order
        kept = [slot for slot in range(self.end) if self.alive[slot]]
        return Plan(tuple(order[s] for s in kept), bisect_left(kept, self.plan.split))

    def peak_bytes(self) -> int:
        """Return the present peak."""
        return int(self.memory.max(initial=0))

    def improve(self, budget: int) -> bool:
        """Apply moves that fit the budget, best ratio first, until none fits. True if any did.

        O(recomputations x (edges of the move + length of the interval)) per round.
        """
        changed = False
        while self._round(budget):
            changed = True
        return changed

    def _round(self, budget: int) -> bool:
        prices = np.concatenate(([0.0], np.cumsum((np.maximum(self.memory, 0) / budget) ** self.power + 1e-6)))
        heap: list[tuple[float, int]] = []
        for runs in self.runs:
            for slot in runs[1:]:
                heap.append((-self._ratio(self._move(slot), prices), slot))
        heapq.heapify(heap)
        applied = False
        while heap:
            stale, slot = heapq.heappop(heap)
            if not self.alive[slot]:
                continue
            move = self._move(slot)
            ratio = -self._ratio(move, prices)
            if heap and ratio > heap[0][0] and ratio > stale * 0.999:
                heapq.heappush(heap, (ratio, slot))
                continue
            if self._fits(move, budget):
                self._apply(slot, move)
                applied = True
        return applied

    def _ratio(self, move: _Move, prices: np.ndarray) -> float:
        cost = sum(size * (prices[stop] - prices[start]) for start, stop, size in move.ranges)
        return move.gain_s / cost if cost > 0 else float("inf")

    def _move(self, slot: int) -> _Move:
        """Return what deleting the execution at a slot saves and how it changes memory."""
        step, order = self.step, self.plan.order
        runs = self.runs[order[slot]]
        before = runs[bisect_left(runs, slot) - 1]
        size = step.size_bytes
        ranges = []
        for value, readers in self.readers[slot].items():
            if readers:
                last = self.readers[before][value]
                death = last[-1] if last else before
                if death < slot:
                    ranges.append((death + 1, slot, size[value]))
        removed, gone, todo, gain = [slot], {slot}, [slot], 0.0
        lost: dict[tuple[int, int], None] = {}
        while todo:
            slot_gone = todo.pop()
            gain += step.time_s[order[slot_gone]]
            for value, source in zip(step.inputs[order[slot_gone]], self.sources[slot_gone], strict=True):
                if source < 0:
                    continue
                lost[source, value] = None
                if source not in gone and self._unread(source, gone):
                    gone.add(source)
                    removed.append(source)
                    todo.append(source)
        for source, value in lost:
            readers = self.readers[source][value]
            if source in gone:
                death, left = source - 1, readers[-1]
            else:
                left = readers[-1]
                at = len(readers) - 1
                while at >= 0 and readers[at] in gone:
                    at -= 1
                death = readers[at] if at >= 0 else source
            if death < left:
                ranges.append((death + 1, min(left + 1, self.end), -size[value]))
        return _Move(gain, removed, ranges)

    def _unread(self, source: int, gone: set[int]) -> bool:
        for readers in self.readers[source].values():
            for reader in readers:
                if reader not in gone:
                    return False
        return True

    def _fits(self, move: _Move, budget: int) -> bool:
        if not any(size > 0 for _, _, size in move.ranges):
            return True
        low = min(start for start, _, size in move.ranges if size > 0)
        high = max(stop for _, stop, size in move.ranges if size > 0)
        if low >= high:
            return True
        window = self.memory[low:high].copy()
        for start, stop, size in move.ranges:
            if start < high and stop > low:
                window[max(start - low, 0) : stop - low] += size
        for slot in move.removed:
            if low <= slot < high:
                window[slot - low] = 0
        return int(window.max()) <= budget

    def _apply(self, slot: int, move: _Move) -> None:
        step, order = self.step, self.plan.order
        runs = self.runs[order[slot]]
        before = runs[bisect_left(runs, slot) - 1]
        for value, readers in self.readers[slot].items():
            merged = self.readers[before][value]
            for reader in readers:
                if reader not in merged:
                    insort(merged, reader)
                if reader < self.end:
                    at = step.inputs[order[reader]].index(value)
                    self.sources[reader][at] = before
            self.readers[slot][value] = []
        for start, stop, size in move.ranges:
            self.memory[start:stop] += size
        for gone in move.removed:
            self.alive[gone] = False
            self.memory[gone] -= _GONE
            self.runs[order[gone]].remove(gone)
            for value, source in zip(step.inputs[order[gone]], self.sources[gone], strict=True):
                if source >= 0:
                    self.readers[source][value].remove(gone)
