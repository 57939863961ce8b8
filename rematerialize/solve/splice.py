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

from rematerialize.solve.step import Plan, Step

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class _Cuts:
    """A plan in parts: its forward, and what runs up to each backward op.

    Attributes
    ----------
    places : list of int
        Where each part but the first begins, and the end.
    states : list of int
        What each place is like: of the splicer's states.
    peaks, seconds : list
        Memory in bytes and time of each part.
    """

    places: list[int]
    states: list[int]
    peaks: list[int]
    seconds: list[float]


class Splicer:
    """Splices plans of one step, and remembers what it worked out of each.

    Parameters
    ----------
    step : Step
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._cuts: dict[Plan, _Cuts] = {}
        # As bits: the backward ops that have run, and the values made before that are read after it.
        self._states: list[tuple[int, int]] = []
        self._known: dict[tuple[int, int], int] = {}

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
        parts = len(cuts[0].seconds)
        rest_s = [0.0] * len(plans)
        onward: list[list[int]] = []  # by part, last first: the plan to go on with
        for part in range(parts - 1, 0, -1):
            stay = [
                cut.seconds[part] + rest if cut.peaks[part] <= level else NEVER
                for cut, rest in zip(cuts, rest_s, strict=True)
            ]
            states = [cut.states[part - 1] for cut in cuts]
            first: dict[int, int] = {}  # by state, the fastest plan that goes on from it
            for index in sorted(range(len(plans)), key=stay.__getitem__):
                first.setdefault(states[index], index)
            best = self._onward(first)
            chosen = [best[state] if stay[best[state]] < stay[index] else index for index, state in enumerate(states)]
            rest_s = [stay[index] for index in chosen]
            onward.append(chosen)
        total_s = [
            cut.seconds[0] + rest if cut.peaks[0] <= level else NEVER for cut, rest in zip(cuts, rest_s, strict=True)
        ]
        index = min(range(len(plans)), key=total_s.__getitem__)
        if total_s[index] == NEVER:
            return None
        joined = self._joined(plans, cuts, onward, index)
        if self._step.peak_bytes(joined) <= level:
            return joined
        # Where an output of the step is made once more along with something else, another plan may read that instance.
        fitting = [plan for plan, cut in zip(plans, cuts, strict=True) if max(cut.peaks) <= level]
        return min(fitting, key=lambda plan: self._step.duration_s(plan.order), default=None)

    def _onward(self, first: dict[int, int]) -> dict[int, int]:
        """Return by state the first plan, of one per state, that may go on from there: it reads no more."""
        groups: dict[int, list[tuple[int, int]]] = {}
        for state, index in first.items():
            done, needed = self._states[state]
            groups.setdefault(done, []).append((needed, index))
        onward = {}
        for state in first:
            done, needed = self._states[state]
            missing = ~needed
            for read, index in groups[done]:
                if not read & missing:
                    onward[state] = index
                    break
        return onward

    def _joined(
        self, plans: Sequence[Plan], cuts: Sequence[_Cuts], onward: Sequence[Sequence[int]], index: int
    ) -> Plan:
        """Return the plan that begins as one of the plans and goes on, part by part, as it is said there."""
        split = plans[index].split
        order = list(plans[index].order[:split])
        for part, chosen in enumerate(reversed(onward)):
            index = chosen[index]
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
        memory, bounds = step.timeline(plan), [0, *places]
        return _Cuts(
            places,
            [self._state(at) for at in zip(done, needed, strict=False)],  # without backward ops, the end is no place
            [max(memory[a:b], default=0) for a, b in pairwise(bounds)],
            [step.duration_s(order[a:b]) for a, b in pairwise(bounds)],
        )

    def _state(self, state: tuple[int, int]) -> int:
        if state not in self._known:
            self._known[state] = len(self._states)
            self._states.append(state)
        return self._known[state]
