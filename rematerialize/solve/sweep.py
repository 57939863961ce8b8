"""Offline eviction sweep: DTR's rule with the future known.

Kirisame et al., "Dynamic Tensor Rematerialization" (ICLR 2021): walk the step in order; when memory
is short, evict the value with the least recompute cost / (bytes x staleness). Offline, staleness
becomes the distance to the next use (Belady 1966). A heuristic without a guarantee: it may find
nothing where a schedule exists. The walk itself is compiled (`native/sweep.c`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rematerialize.solve.bounds import minimum_bytes_bound
from rematerialize.solve.native import FlatStep, available
from rematerialize.solve.step import Plan, Step

SLACK = 60  # an eviction frees 1/SLACK of the budget more than it has to, so that there are fewer
MAX_STRETCH = 6  # give up when a sweep runs more than this many times the step's ops
TINY = 300  # ops up to which every level is tried
SMALL = 1500  # ops up to which every score is tried
LONGEST = 200_000  # executions of a plan near the least memory
BISECTIONS = 12
WORTH = 1000  # the share of the least peak that a second bisection must save at once to go on
MEDIUM = 3_000  # ops beyond which the bisection takes longer than all the rest
LARGE = 12_000  # ops beyond which the sweep is too slow for what it adds
SCORES = ((1.0, 1.0), (0.7, 0.3))  # powers of size and distance


def sweep(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield plans at every level (or every second one), per score variant, until one doesn't fit.

    O(ops x live values) per plan.
    """
    if len(step.names) > LARGE or not available:
        return
    flat = FlatStep(step)
    for size_power, distance_power in SCORES[: 1 if len(step.names) > SMALL else None]:
        for budget in sorted(levels, reverse=True)[:: 1 if len(step.names) <= TINY else 2]:
            plan = flat.sweep(
                budget,
                slack_bytes=budget // SLACK,
                size_power=size_power,
                distance_power=distance_power,
                longest=MAX_STRETCH * len(step.names),
            )
            if plan is None:
                break
            yield plan


def least(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield plans at falling budgets, by bisection, down to the least at which a sweep finds one.

    Plans may be long here (chains recomputed from their start): up to `LONGEST` executions. The rule weighs times, and
    some times lead it astray (a dropout that costs more than what it feeds); it is followed once more as if all ops
    took the same.
    """
    if len(step.names) > MEDIUM or not available or step.forwards == len(step.names):
        return
    flat, bound = FlatStep(step), minimum_bytes_bound(step)
    found = flat.peak_bytes(step.store_all())
    for plan in _least(flat, bound, found):
        found = min(found, flat.peak_bytes(plan))
        yield plan
    even = replace(step, time_s=tuple(1.0 if time_s else 0.0 for time_s in step.time_s))
    yield from _least(FlatStep(even), bound, found, worth=found // WORTH)


def _least(flat: FlatStep, low: int, high: int, worth: int = 0) -> Iterator[Plan]:
    """Bisect between a lower bound and ``high``; give up if nothing is found ``worth`` bytes below it."""
    step = flat.step
    longest = min(max(MAX_STRETCH, step.forwards) * len(step.names), LONGEST)
    if worth and low <= high - worth:
        plan = flat.sweep(high - worth, slack_bytes=0, size_power=1.0, distance_power=1.0, longest=longest)
        if plan is None:
            return
        yield plan
        high = min(flat.peak_bytes(plan), high - worth)
    for trial in range(BISECTIONS):
        budget = low if trial == 0 else (low + high) // 2
        for slack in (0, budget // SLACK):
            plan = flat.sweep(budget, slack_bytes=slack, size_power=1.0, distance_power=1.0, longest=longest)
            if plan is not None:
                break
        if plan is None:
            low = budget
        else:
            yield plan
            high = min(flat.peak_bytes(plan), budget)
        if high <= low + 1:
            break
