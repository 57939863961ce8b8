"""Offline eviction sweep: DTR's rule with the future known.

Kirisame et al., "Dynamic Tensor Rematerialization" (ICLR 2021): walk the step in order; when memory
is short, evict the value with the least recompute cost / (bytes x staleness). Offline, staleness
becomes the distance to the next use (Belady 1966). A heuristic without a guarantee: it may find
nothing where a schedule exists. The walk itself is compiled (`native/sweep.c`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rematerialize.solve.native import FlatStep, available
from rematerialize.solve.step import Plan, Step

SLACK = 60  # an eviction frees 1/SLACK of the budget more than it has to, so that there are fewer
MAX_STRETCH = 6  # give up when a sweep runs more than this many times the step's ops
TINY = 300  # ops up to which every level is tried
SMALL = 1500  # ops up to which every score is tried
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
