"""Blocks checkpointed by hand, at every number of blocks, against `solve` at the same peak.

The baseline keeps what crosses the cuts and runs each block once more before its backward, the last
one excepted: torch.utils.checkpoint per block, and Chen et al. (2016) at sqrt(n) blocks.

    python benchmarks/solver/baselines.py [graph.json | suite name ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.solver.graphs import SUITE
from rematerialize.ir import TrainingGraph
from rematerialize.solve import Planner
from rematerialize.solve.blocks import per_block
from rematerialize.solve.step import compile_step


def compare(graph: TrainingGraph, counts: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 16, 24)) -> list[str]:
    """Return one line per baseline plan that recomputes something."""
    step, planner, lines = compile_step(graph), Planner(graph), []
    full = planner.store_all()
    for blocks in counts:
        plan = per_block(step, blocks)
        peak, time_s = step.peak_bytes(plan), step.duration_s(plan.order)
        if peak >= full.peak_bytes:
            continue
        ours = planner.solve(peak).time_s
        over, mine = (100 * (t / full.time_s - 1) for t in (time_s, ours))
        verdict = "" if ours <= time_s else "  WORSE"
        share = 100 * peak / full.peak_bytes
        figures = f"peak {share:5.1f}%  by hand {over:5.1f}%  ours {mine:5.1f}%"
        lines.append(f"{blocks:4d} blocks  {figures}{verdict}")
    return lines


if __name__ == "__main__":
    for name in sys.argv[1:] or SUITE:
        source = SUITE[name]() if name in SUITE else TrainingGraph.from_json(Path(name).read_text())
        print(Path(name).stem, *compare(source), sep="\n")
