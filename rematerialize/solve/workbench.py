"""A schedule laid out for local search: executions on spaced slots, instances with their readers.

Two moves, each the other's inverse, with exact memory after every one of them:

- `retain`: delete a recomputation; its readers read the previous instance, which lives longer, and
  whatever was computed only for the deleted one goes as well.
- `drop`: insert a recomputation in front of a reader, together with those of its inputs that are no
  longer there; the previous instance dies at its last reader before it.

Invariants: (1) ``readers[slot][value]`` lists, in order, who reads the instance made at that slot,
`FOREVER` standing for the caller; (2) ``memory[slot]`` is exact for every occupied slot and hugely
negative for a free one; (3) every read has the newest instance as its source.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

import numpy as np

from rematerialize.solve.step import Plan, Step

FOREVER = 1 << 60
SPACING = 6  # slots per execution: room for the recomputations put in front of it
_FREE = 1 << 61  # subtracted from the memory of a free slot: it can never be the peak


@dataclass(slots=True)
class Move:
    """What deleting an execution does: seconds saved, slots freed, [start, stop) += bytes."""

    gain_s: float
    removed: list[int]
    ranges: list[tuple[int, int, int]]


class Workbench:
    """A schedule under construction.

    Parameters
    ----------
    step : Step
    plan : Plan
        A valid plan.
    """

    def __init__(self, step: Step, plan: Plan) -> None:
        self.step = step
        self.time_s = step.duration_s(plan.order)
        self.length = len(plan.order)
        self.work = 0  # executions looked at, for limits that don't depend on the clock
        self._lay_out(plan)

    def _lay_out(self, plan: Plan) -> None:
        step, slots = self.step, len(plan.order) * SPACING
        self.slots = slots
        self.split = plan.split * SPACING
        self.op_at = [-1] * slots
        self.sources: dict[int, list[int]] = {}
        self.readers: dict[int, dict[int, list[int]]] = {}
        self.runs: list[list[int]] = [[] for _ in step.names]
        newest: dict[int, int] = {}
        slot = SPACING - 1
        inputs, outputs, readers = step.inputs, step.outputs, self.readers
        for op in plan.order:
            if slot - SPACING + 1 == self.split:
                self._hold(newest, step.held_outputs)
            self.op_at[slot] = op
            sources = []
            for value in inputs[op]:
                source = newest.get(value, -1)
                sources.append(source)
                if source >= 0:
                    insort(readers[source][value], slot)  # before FOREVER, if the caller holds it as well
            self.sources[slot] = sources
            made: dict[int, list[int]] = {}
            for value in outputs[op]:
                made[value] = []
                newest[value] = slot
            readers[slot] = made
            self.runs[op].append(slot)
            slot += SPACING
        if self.split == slots:
            self._hold(newest, step.held_outputs)
        self._hold(newest, step.held_gradients)
        self.memory = self._measure(plan)

    def _measure(self, plan: Plan) -> np.ndarray:
        """Return the memory at every slot; free slots carry what lives across them, minus _FREE."""
        step, size = self.step, self.step.size_bytes
        delta = [0] * (self.slots + 1)
        for slot, made in self.readers.items():
            for value, readers in made.items():
                delta[slot] += size[value]
                delta[min(readers[-1] + 1, self.slots) if readers else slot + 1] -= size[value]
        for value in step.tangents:
            last = max((self.runs[op][-1] for op in step.users[value]), default=self.split - 1)
            delta[self.split] += size[value]
            delta[self.slots if value in step.held_gradients else last + 1] -= size[value]
        memory = np.cumsum(np.array(delta[:-1], dtype=np.int64)) - _FREE
        memory[SPACING - 1 :: SPACING] += _FREE
        memory[SPACING - 1 :: SPACING] += np.array(step.transient_bytes, dtype=np.int64)[list(plan.order)]
        return memory

    def _hold(self, newest: dict[int, int], values: frozenset[int]) -> None:
        for value in values:
            if value in newest:
                readers = self.readers[newest[value]][value]
                if FOREVER not in readers:
                    readers.append(FOREVER)

    def plan(self) -> Plan:
        """Return the present plan."""
        order, split = [], 0
        for slot, op in enumerate(self.op_at):
            if op >= 0:
                order.append(op)
                split += slot < self.split
        return Plan(tuple(order), split)

    def respace(self) -> None:
        """Lay the schedule out again with room in front of every execution. O(length + edges)."""
        self._lay_out(self.plan())

    def peak_bytes(self) -> int:
        """Return the present peak."""
        return int(self.memory.max(initial=0))

    def before(self, op: int, slot: int) -> int:
        """Return the last execution of an op before a slot, -1 when there is none."""
        runs = self.runs[op]
        at = bisect_left(runs, slot)
        return runs[at - 1] if at else -1

    def death(self, source: int, value: int) -> int:
        """Return the last slot at which an instance is live."""
        readers = self.readers[source][value]
        return min(readers[-1], self.slots - 1) if readers else source

    def retention(self, slot: int) -> Move:
        """Return what deleting the recomputation at a slot would do. O(its cascade)."""
        step, size = self.step, self.step.size_bytes
        before = self.before(self.op_at[slot], slot)
        ranges = []
        for value, readers in self.readers[slot].items():
            if readers:
                death = self.death(before, value)
                if death < slot:
                    ranges.append((death + 1, slot, size[value]))
                else:  # the caller holds the previous instance anyway: the copy goes
                    ranges.append((slot, self.death(slot, value) + 1, -size[value]))
        removed, gone, gain = [slot], {slot}, 0.0
        lost: dict[tuple[int, int], None] = {}
        for dead in removed:
            gain += step.time_s[self.op_at[dead]]
            for value, source in zip(step.inputs[self.op_at[dead]], self.sources[dead], strict=True):
                if source >= 0:
                    lost[source, value] = None
                    if source not in gone and self._unread(source, gone):
                        gone.add(source)
                        removed.append(source)
        for dead in removed:
            alone = step.transient_bytes[self.op_at[dead]]
            for value, readers in self.readers[dead].items():
                if not readers:
                    alone += size[value]
            ranges.append((dead, dead + 1, -alone))
        for source, value in lost:
            readers = self.readers[source][value]
            at = len(readers)
            while at and readers[at - 1] in gone:
                at -= 1
            death = source - (source in gone) if not at else min(readers[at - 1], self.slots - 1)
            last = self.death(source, value)
            if death < last:
                ranges.append((death + 1, last + 1, -size[value]))
        return Move(gain, removed, ranges)

    def _unread(self, source: int, gone: set[int]) -> bool:
        return all(reader in gone for readers in self.readers[source].values() for reader in readers)

    def fits(self, move: Move, budget: int) -> bool:
        """Return whether the peak stays within a budget that it is within now. O(interval)."""
        grown = [(start, stop) for start, stop, size in move.ranges if size > 0 and stop > start]
        if not grown:
            return True
        low, high = min(start for start, _ in grown), max(stop for _, stop in grown)
        window = self.memory[low:high].copy()
        for start, stop, size in move.ranges:
            if start < high and stop > low:
                window[max(start - low, 0) : stop - low] += size
        for slot in move.removed:
            if low <= slot < high:
                window[slot - low] = -_FREE
        return int(window.max()) <= budget

    def retain(self, slot: int, move: Move) -> None:
        """Delete the recomputation at a slot; ``move`` is its `retention` in the present state."""
        step = self.step
        before = self.before(self.op_at[slot], slot)
        for value, readers in self.readers[slot].items():
            merged = self.readers[before][value]
            for reader in readers:
                if reader not in merged:
                    insort(merged, reader)
                if reader != FOREVER:
                    self.sources[reader][step.inputs[self.op_at[reader]].index(value)] = before
            self.readers[slot][value] = []
        for start, stop, size in move.ranges:
            self.memory[start:stop] += size
        for gone in move.removed:
            self._remove(gone)
        self.time_s -= move.gain_s
        self.length -= len(move.removed)

    def _remove(self, slot: int) -> None:
        step, op = self.step, self.op_at[slot]
        for value, source in zip(step.inputs[op], self.sources[slot], strict=True):
            if source >= 0:
                self.readers[source][value].remove(slot)
        self.memory[slot] -= _FREE
        self.runs[op].remove(slot)
        self.op_at[slot] = -1
        del self.readers[slot], self.sources[slot]

    def missing(self, value: int, reader: int, stretch: float) -> list[int] | None:
        """Return the ops to run again for a value in front of a reader, in order.

        Inputs that are gone by then are recomputed as well, unless that is not allowed or they are
        small (less than ``stretch`` times the value): those live longer instead.
        None when the room in front of the reader doesn't suffice.
        """
        step, room = self.step, self.room(reader)
        limit = stretch * step.size_bytes[value]
        needed = {step.producer[value]}
        todo = [step.producer[value]]
        while todo and len(needed) <= room:
            for read in step.inputs[todo.pop()]:
                op = step.producer[read]
                if op in needed or op < 0 or not step.recomputable[op]:
                    continue
                if step.size_bytes[read] <= limit and self.before(op, reader) >= 0:
                    continue
                source = self.before(op, reader)
                if source < 0 or self.death(source, read) < reader:
                    needed.add(op)
                    todo.append(op)
        return sorted(needed) if len(needed) <= room else None

    def room(self, reader: int) -> int:
        """Return how many free slots stand right in front of an execution, in its own phase."""
        slot = reader
        stop = self.split if reader >= self.split else 0
        while slot > stop and self.op_at[slot - 1] < 0:
            slot -= 1
        return reader - slot

    def drop(self, ops: list[int], reader: int) -> None:
        """Run ops again right in front of a reader (`missing` says which)."""
        for offset, op in enumerate(ops):
            self._insert(op, reader - len(ops) + offset)
            self.time_s += self.step.time_s[op]
        self.length += len(ops)

    def _insert(self, op: int, slot: int) -> None:
        step, size = self.step, self.step.size_bytes
        previous = self.before(op, slot)
        self.op_at[slot] = op
        self.memory[slot] += _FREE + step.transient_bytes[op]
        made: dict[int, list[int]] = {}
        if previous < 0:
            made = {value: [] for value in step.outputs[op]}
            self.memory[slot] += sum(size[value] for value in made)
        for value, readers in self.readers[previous].items() if previous >= 0 else ():
            last = self.death(previous, value)
            at = bisect_right(readers, slot)
            moved, kept = readers[at:], readers[:at]
            if moved and moved[-1] == FOREVER and value in step.held_outputs and slot >= self.split:
                kept.append(moved.pop())
            self.readers[previous][value] = kept
            made[value] = moved
            self.memory[self.death(previous, value) + 1 : last + 1] -= size[value]
            end = min(moved[-1], self.slots - 1) if moved else slot
            self.memory[slot : end + 1] += size[value]
            for reader in moved:
                if reader != FOREVER:
                    self.sources[reader][step.inputs[self.op_at[reader]].index(value)] = slot
        self.readers[slot] = made
        sources = []
        for value in step.inputs[op]:
            source = self.before(step.producer[value], slot)
            death = self.death(source, value)
            if death < slot:
                self.memory[death + 1 : slot + 1] += size[value]
            insort(self.readers[source][value], slot)
            sources.append(source)
        self.sources[slot] = sources
        insort(self.runs[op], slot)

    def check(self) -> None:
        """Assert that the incremental memory is that of the plan; for tests."""
        plan = self.plan()
        occupied = self.memory[[slot for slot, op in enumerate(self.op_at) if op >= 0]]
        assert occupied.tolist() == self.step.timeline(plan)
