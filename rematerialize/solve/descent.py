"""Greedy descent from store-all: the compiled local search as a solver of its own.

The peak is lowered step by step with the drop that costs the least time per byte-slot of excess that it
removes; at every level the memory left over is spent again with the deletions that save the most time
per priced byte-slot. A heuristic without a guarantee; all memory is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rematerialize.solve.native import FlatStep, Workbench, available
from rematerialize.solve.step import Plan, Step

LARGEST = 5_000  # ops beyond which a descent from store-all is too slow for what it gives
ROOM = 4  # executions, as a multiple of the step's ops
STRETCHES = (0.25, 0.0, 1.0)
TRIES = 20  # searches that the work is for: the smallest strides come last, and find most


def descent(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield one plan per level, from store-all downwards until stuck. O(levels x rounds x events)."""
    if not available or len(step.names) > LARGEST:
        return
    bench = Workbench(FlatStep(step), ROOM * len(step.names))
    plan = step.store_all()
    for level in sorted(levels, reverse=True):
        if not reach(bench, plan, level):
            return
        bench.spend(level)
        plan = bench.plan()
        yield plan


def squeeze(
    bench: Workbench, plan: Plan, *, work: int, finest: float, stride: float = 0.08, seed: int = 1
) -> Iterator[Plan]:
    """Yield plans of ever lower peak, by descents of a shrinking stride, until stuck.

    Parameters
    ----------
    bench : Workbench
        With room for longer plans than the one given.
    plan : Plan
        Where to start.
    work : int
        Moves after which to stop.
    finest, stride : float
        Stride, as a share of the peak, below which to stop, and the first one.
    seed : int
    """
    if not bench.load(plan):
        return
    until, peak = bench.work + work, bench.peak_bytes()
    while stride > finest and peak > 0 and bench.work < until:
        target = peak - max(peak * int(stride * 2**20) // 2**20, 1)  # in integers: peaks can exceed all floats
        if reach(bench, plan, target, work=work // TRIES, seed=seed + int(1000 * stride)):
            bench.spend(target)
            plan, peak = bench.plan(), bench.peak_bytes()
            yield plan
        else:
            stride /= 2


def reach(
    bench: Workbench,
    plan: Plan,
    target_bytes: int,
    *,
    stretches: Sequence[float] = STRETCHES,
    work: int = 0,
    seed: int = 1,
) -> bool:
    """Put a plan within a target on the bench, by greedy descents from one above it; a stuck one is no proof, and a
    search of so many moves goes on from there.
    """
    if any(bench.load(plan) and bench.descend(target_bytes, stretch=stretch) for stretch in stretches):
        return True
    return work > 0 and bench.load(plan) and bench.lower(target_bytes, work, seed=seed)
