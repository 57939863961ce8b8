"""Blocks recomputed once: what people place by hand, as a floor under the portfolio.

Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost" (2016): cut the forward into
blocks, keep what crosses the cuts, run everything else of each block once more before its backward (the
last block excepted). Here at several numbers of blocks, sqrt(n) among them, cut where few bytes cross.

Departure: by default also with what crosses made again, as checkpointing whole modules does; it holds one
boundary less while a block is reversed and takes the time of the ops in front of the cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt

from rematerialize.solve.reaches import Reaches
from rematerialize.solve.segments import Segment, Segmentation
from rematerialize.solve.step import Plan, Step

COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32)


def blocks(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield both plans of each number of blocks. O(ops + edges) per plan."""
    if step.forwards == len(step.names):
        return
    reaches = Reaches(step)
    for count in sorted({*COUNTS, isqrt(step.forwards)}):
        if 1 < count <= step.forwards:
            kept = per_block(reaches, count)
            yield kept
            again = per_block(reaches, count, boundaries_again=True)
            if again != kept:
                yield again


def per_block(reaches: Reaches, count: int, *, boundaries_again: bool = False) -> Plan:
    """Return the plan with ``count`` blocks; what crosses a cut is kept, or made again with its block."""
    step, parts = reaches.step, Segmentation(reaches, count, options=False).segments
    order = list(range(step.forwards))
    for at in range(len(parts) - 1, -1, -1):
        part = parts[at]
        if part.backward and at < len(parts) - 1:
            kept = frozenset[int]() if boundaries_again else part.above
            order += _recomputed(step, part, kept)
        order += part.backward
    return reaches.flat.prune(order, step.forwards)


def _recomputed(step: Step, part: Segment, kept: frozenset[int]) -> list[int]:
    """Return the ops of a block that make something that the block reads and that isn't kept."""
    read = {value for op in (*range(part.start, part.stop), *part.backward) for value in step.inputs[op]} - kept
    return [
        op for op in range(part.start, part.stop) if step.recomputable[op] and not read.isdisjoint(step.outputs[op])
    ]
