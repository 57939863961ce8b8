"""Offline eviction sweep: DTR's rule with the future known.

Kirisame et al., "Dynamic Tensor Rematerialization" (ICLR 2021): walk the step in order; when memory
is short, evict the value with the least recompute cost / (bytes x staleness). Offline, staleness
becomes the distance to the next use (Belady 1966). A heuristic without a guarantee: it may find
nothing where a schedule exists.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rematerialize.solve.step import Plan, Step

SLACK = 60  # an eviction frees 1/SLACK of the budget more than it has to, so that there are fewer
MAX_STRETCH = 6  # give up when a sweep runs more than this many times the step's ops


@dataclass(frozen=True, slots=True)
class _Score:
    size_power: float
    distance_power: float


TINY = 300  # ops up to which every level is tried
SMALL = 700  # ops up to which every score is tried
LARGE = 3000  # ops beyond which the sweep is too slow for what it adds
SCORES = (_Score(1.0, 1.0), _Score(0.7, 0.3))


def sweep(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield plans at every level (or every second one), per score variant, until one doesn't fit.

    O(ops x live values) per plan.
    """
    if len(step.names) > LARGE:
        return
    for score in SCORES[: 1 if len(step.names) > SMALL else None]:
        for budget in sorted(levels, reverse=True)[:: 1 if len(step.names) <= TINY else 2]:
            plan = _Sweep(step, budget, score).run()
            if plan is None:
                break
            yield plan


class _NoRoomError(Exception):
    pass


class _Sweep:
    """State of one walk. Invariants: (1) memory = bytes of live values; (2) a locked value stays."""

    def __init__(self, step: Step, budget: int, score: _Score) -> None:
        self.step = step
        self.budget = budget
        self.score = score
        self.live: dict[int, None] = {}
        self.memory = 0
        self.locks = [0] * len(step.size_bytes)
        self.order: list[int] = []
        self.clock = 0  # position in the staged order
        self.cost_of: dict[int, float] = {}

    def run(self) -> Plan | None:
        step = self.step
        split = step.forwards
        limit = MAX_STRETCH * len(step.names)
        try:
            for op in range(len(step.names)):
                if op == step.forwards:
                    split = len(self.order)
                    for value, producer in enumerate(step.producer):
                        if producer < 0 and step.users[value]:
                            self._add(value)
                self.clock = op
                self._execute(op)
                if len(self.order) > limit:
                    return None
        except _NoRoomError:
            return None
        if step.forwards == len(step.names):
            split = len(self.order)
        return step.prune(self.order, split)

    def _execute(self, target: int) -> None:
        """Run an op, recomputing what it misses first (an explicit stack: chains can be long)."""
        step = self.step
        stack: list[tuple[int, list[int]]] = []

        def push(op: int) -> None:
            locked = [value for value in step.inputs[op] if value in self.live]
            for value in locked:
                self.locks[value] += 1
            stack.append((op, locked))
            if len(stack) + len(self.order) > MAX_STRETCH * len(step.names):
                raise _NoRoomError

        push(target)
        while stack:
            op, locked = stack[-1]
            missing = next((v for v in step.inputs[op] if v not in self.live), None)
            if missing is not None:
                push(step.producer[missing])
                continue
            for value in step.inputs[op]:
                if value not in locked:
                    locked.append(value)
                    self.locks[value] += 1
            self._run(op)
            for value in locked:
                self.locks[value] -= 1
            stack.pop()
            if stack:
                parent, held = stack[-1]
                for value in step.outputs[op]:
                    if value in step.inputs[parent] and value not in held:
                        held.append(value)
                        self.locks[value] += 1

    def _run(self, op: int) -> None:
        step = self.step
        fresh = [v for v in step.outputs[op] if v not in self.live]
        again = sum(step.size_bytes[v] for v in step.outputs[op] if v in self.live)
        need = sum(step.size_bytes[v] for v in fresh) + step.transient_bytes[op] + again
        if self.memory + need > self.budget:
            self._evict(self.memory + need - self.budget)
        for value in step.outputs[op]:
            self._add(value)
        self.order.append(op)

    def _add(self, value: int) -> None:
        if value not in self.live:
            self.live[value] = None
            self.memory += self.step.size_bytes[value]
            self.cost_of.clear()

    def _evict(self, excess: int) -> None:
        step = self.step
        room = excess + self.budget // SLACK
        ranked = []
        for value in self.live:
            if self.locks[value] == 0 and step.size_bytes[value] > 0:
                priority = self._priority(value)
                if priority is not None:
                    ranked.append((priority, value))
        ranked.sort()
        for _, value in ranked:
            if room <= 0:
                break
            del self.live[value]
            self.memory -= step.size_bytes[value]
            excess -= step.size_bytes[value]
            room -= step.size_bytes[value]
        self.cost_of.clear()
        if excess > 0:
            raise _NoRoomError

    def _priority(self, value: int) -> float | None:
        """Return the score of evicting a value (least first), or None when it has to stay."""
        step = self.step
        users = step.users[value]
        after = bisect_right(users, self.clock)
        current = after > 0 and users[after - 1] == self.clock
        distance = (users[after] - self.clock) if after < len(users) else None
        producer = step.producer[value]
        if value in step.held_gradients or value in step.held_outputs:
            return None
        if 0 <= producer < step.forwards and not step.recomputable[producer]:
            return None
        if current:
            distance = 1
        if distance is None:
            return -1.0
        if producer < 0 or not step.recomputable[producer]:
            return None
        size, far = float(step.size_bytes[value]), float(distance)
        weight: float = size**self.score.size_power * far**self.score.distance_power
        return self._cost(value) / weight

    def _cost(self, value: int) -> float:
        """Return the time to recompute a value from what is live, up to a bounded neighbourhood."""
        step = self.step
        total, todo, seen = 0.0, [step.producer[value]], {step.producer[value]}
        while todo and len(seen) < 32:
            op = todo.pop()
            total += step.time_s[op]
            for read in step.inputs[op]:
                maker = step.producer[read]
                if read not in self.live and maker not in seen and maker >= 0:
                    seen.add(maker)
                    todo.append(maker)
        return total
