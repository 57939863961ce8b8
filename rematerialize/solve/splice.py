"""Splicing: the fastest plan that goes on with one of several plans after every backward op.

Searches from different seeds save time in different places of a step. Two plans may be changed between
after a backward op where both have run the same backward ops, and what the other one still reads is in memory
anyway: what runs up to there needs no more memory than in the first plan, and what comes after it no more than in
the other. The partition crossover of Whitley, Hains and Howe (2009), by which two tours of a salesman are joined, is
the same thought; here a shortest path chooses among the parts of any number of plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from rematerialize.solve.native import fastest_splice
from rematerialize.solve.step import Plan, Step


@dataclass(frozen=True, slots=True)
class _Cuts:
    """A plan in parts: its forward, and what runs up to each backward op.

    Attributes
    ----------
    places : list of int
        Where each part but the first begins, and the end.
    states : array of int32
        What each place but the end is like, of the splicer's states.
    peaks : list of int
        Memory in bytes of each part.
    seconds : array of float64
        Time of each part.
    """

    places: list[int]
    states: NDArray[np.int32]
    peaks: list[int]
    seconds: NDArray[np.float64]


class _States:
    """What plans are like after backward ops, by number: which of them have run, and which values are read later."""

    def __init__(self, values: int) -> None:
        self._words = max(-(-values // 64), 1)
        self._numbers: dict[tuple[int, int], int] = {}
        self._done: dict[int, int] = {}
        self._rows: list[int] = []
        self._needed: list[bytes] = []

    def number(self, done: int, needed: int) -> int:
        """Return the number of a state: ops that have run and values made before that are read after it, as bits."""
        if (done, needed) not in self._numbers:
            self._numbers[done, needed] = len(self._rows)
            self._rows.append(self._done.setdefault(done, len(self._done)))
            self._needed.append(needed.to_bytes(8 * self._words, "little"))
        return self._numbers[done, needed]

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
        """Return per state the number of what has run, and the values as bits."""
        needed = np.frombuffer(b"".join(self._needed), "<u8").reshape(len(self._rows), self._words)
        return np.array(self._rows, np.int32), needed


class Splicer:
    """Splices plans of one step, and remembers what it worked out of each.

    Parameters
    ----------
    step : Step
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._cuts: dict[Plan, _Cuts] = {}
        self._states = _States(len(step.size_bytes))

    @cached_property
    def _always(self) -> int:
        """In memory whatever reads it. These sets are as long as there are values: large steps never make any."""
        return sum(1 << value for value in self._step.held_outputs)

    @cached_property
    def _made(self) -> list[int]:
        return [sum(1 << value for value in values) for values in self._step.outputs]

    @cached_property
    def _read(self) -> list[int]:
        return [sum(1 << value for value in values) for values in self._step.inputs]

    def splice(self, plans: Sequence[Plan], level: int) -> Plan | None:
        """Return the fastest plan within a level in bytes that is made of parts of these; None if there is none.

        Executions whose results the other plan doesn't read are left out. O(states^2 x backward ops) tests for subsets,
        states being what plans have in memory after a backward op, of which many have the same.

        Parameters
        ----------
        plans : sequence of Plan
            At least one.
        level : int
        """
        cuts = [self._cuts.get(plan) or self._cuts.setdefault(plan, self._cut(plan)) for plan in plans]
        fits = [bytes(map(level.__ge__, cut.peaks)) for cut in cuts]
        found = fastest_splice(
            [
                np.stack([cut.seconds for cut in cuts]),
                np.frombuffer(b"".join(fits), np.bool_),
                np.stack([cut.states for cut in cuts]),
                *self._states.arrays(),
            ]
        )
        if found is None:
            return None
        index, onward = found
        joined = self._joined(plans, cuts, onward, index)
        if self._step.peak_bytes(joined) <= level:
            return joined
        # Where an output of the step is made once more along with something else, another plan may read that instance.
        fitting = [plan for plan, cut in zip(plans, cuts, strict=True) if max(cut.peaks) <= level]
        return min(fitting, key=lambda plan: self._step.duration_s(plan.order), default=None)

    def _joined(self, plans: Sequence[Plan], cuts: Sequence[_Cuts], onward: NDArray[np.int32], index: int) -> Plan:
        """Return the plan that begins as one of the plans and goes on, part by part, as it is said there."""
        split = plans[index].split
        order = list(plans[index].order[:split])
        for part, chosen in enumerate(onward):
            index = int(chosen[index])
            places = cuts[index].places
            order += plans[index].order[places[part] : places[part + 1]]
        return self._step.prune(order, split)

    def _cut(self, plan: Plan) -> _Cuts:
        step, order = self._step, plan.order
        ends = [at + 1 for at in range(plan.split, len(order)) if order[at] >= step.forwards]
        places = [plan.split, *ends[:-1], len(order)]
        wanted = sum(1 << value for value in step.held_gradients)
        needed = []
        for start, stop in reversed([*pairwise(places)]):
            needed.append(wanted & ~self._always)
            for op in reversed(order[start:stop]):
                wanted = wanted & ~self._made[op] | self._read[op]
        needed.append(wanted & ~self._always)
        needed.reverse()
        done = accumulate((1 << order[at - 1] for at in ends), int.__or__, initial=0)
        states = [self._states.number(*state) for state in zip(done, needed[:-1], strict=False)]  # not at the end
        memory, bounds = step.timeline(plan), [0, *places]
        return _Cuts(
            places,
            np.array(states, np.int32),
            [max(memory[a:b], default=0) for a, b in pairwise(bounds)],
            np.array([step.duration_s(order[a:b]) for a, b in pairwise(bounds)]),
        )
