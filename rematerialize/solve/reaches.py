"""How far down the forward each value lasts, and what the backward holds whatever a plan decides."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from rematerialize.solve.native import FlatStep
from rematerialize.solve.step import Step


class Reaches:
    """How far down the forward everything lasts: what every segmentation of a step shares. O(edges).

    Attributes
    ----------
    flat : FlatStep
        The step for compiled code.
    level : list of int
        For each backward op the highest forward op that it or a later one needs (`backward_levels`).
    reach : list of int
        For each value the last forward position that can ask for it, -1 when it is always there.
    backward_bytes, between : list of int
        Memory of all that no plan decides, while each backward op runs and between them.
    crossing_bytes : list of int
        Bytes that cross a cut in front of each forward position.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.flat = FlatStep(step)
        self.level = backward_levels(step)
        self.reach = [self._reach(value) for value in range(len(step.size_bytes))]
        self.backward_bytes, self.between = self._backward_memory()
        self.crossing_bytes = self._crossing_bytes()

    def _reach(self, value: int) -> int:
        """Return the last forward position that can ask for a value, -1 when it is always there."""
        step = self.step
        producer = step.producer[value]
        if producer < 0 or producer >= step.forwards or step.permanent(value):
            return -1
        users = step.users[value]
        return max((u if u < step.forwards else self.level[u - step.forwards] for u in users), default=-1)

    def _backward_memory(self) -> tuple[list[int], list[int]]:
        """Return memory of all that no plan decides, while each backward op runs and between them."""
        step = self.step
        first, count = step.forwards, len(step.names) - step.forwards
        delta, ends = [0] * (count + 1), [0] * (count + 1)
        for value, size in enumerate(step.size_bytes):
            producer = step.producer[value]
            birth = producer - first
            death = max(step.users[value][-1] - first if step.users[value] else birth, birth)
            if 0 <= producer < first:
                if not step.permanent(value):
                    continue
                birth = 0
                death = bisect_right(self.level, -producer, key=lambda level: -level) - 1
            elif producer < 0:
                birth = 0
            if value in step.held_gradients or value in step.held_outputs:
                death = count - 1
            if death >= birth:
                delta[birth] += size
                ends[death + 1] += size
        live, running, between = 0, [], []
        for at in range(count):
            live -= ends[at]
            between.append(live)
            live += delta[at]
            running.append(live + step.transient_bytes[first + at])
        between.append(live)
        if count:
            between[0] = sum(s for v, s in enumerate(step.size_bytes) if v in step.held_outputs)
        return running, between

    def _crossing_bytes(self) -> list[int]:
        step = self.step
        delta = [0] * (step.forwards + 2)
        for op in range(step.forwards):
            for value in step.outputs[op]:
                if self.reach[value] > op:
                    delta[op + 1] += step.size_bytes[value]
                    delta[self.reach[value] + 1] -= step.size_bytes[value]
        return list(accumulate(delta))


def backward_levels(step: Step) -> list[int]:
    """Return for each backward op the highest forward op that it or a later one needs, else -1."""
    levels, highest = [], -1
    for op in range(len(step.names) - 1, step.forwards - 1, -1):
        for value in step.inputs[op]:
            producer = step.producer[value]
            if producer < step.forwards and value not in step.held_outputs:
                highest = max(highest, producer)
        levels.append(highest)
    levels.reverse()
    return levels
