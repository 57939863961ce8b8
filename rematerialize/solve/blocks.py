"""Blocks recomputed once: what people place by hand, as a floor under the portfolio.

Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost" (2016): cut the forward into
blocks, keep what crosses the cuts, run each block once more before its backward (the last excepted).
Here at several numbers of blocks, sqrt(n) among them, cut where few bytes cross.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt

from rematerialize.solve.reaches import Reaches
from rematerialize.solve.segments import Segmentation
from rematerialize.solve.step import Plan, Step

COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32)


def blocks(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield one plan per number of blocks. O(ops + edges) per plan."""
    if step.forwards == len(step.names):
        return
    reaches = Reaches(step)
    for count in sorted({*COUNTS, isqrt(step.forwards)}):
        if 1 < count <= step.forwards:
            yield per_block(reaches, count)


def per_block(reaches: Reaches, count: int) -> Plan:
    """Return the plan with ``count`` blocks."""
    step, parts = reaches.step, Segmentation(reaches, count, options=False).segments
    order = list(range(step.forwards))
    for at in range(len(parts) - 1, -1, -1):
        part = parts[at]
        if part.backward and at < len(parts) - 1:
            order += [op for op in range(part.start, part.stop) if step.recomputable[op]]
        order += part.backward
    return step.prune(order, step.forwards)
