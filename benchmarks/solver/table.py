"""Print overhead and minimum of the portfolio on the synthetic suite or on graph files.

python -m benchmarks.solver.table [--solver NAME] [graph.json | suite name ...]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.solver.suite import find, small
from rematerialize.simulate import simulate
from rematerialize.solve import Planner

PERCENTS = (90, 80, 70, 60, 50, 40, 35, 30, 25, 20, 15, 10)


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("graphs", nargs="*")
    parser.add_argument("--solver", default="auto")
    options = parser.parse_args()
    print(f"{'graph':24s}{'ops':>6s}" + "".join(f"{p:>7d}" for p in PERCENTS) + "   min%  over%  len x   cpu s")
    for name in options.graphs or small():
        graph = find(name)
        start = time.process_time()
        planner = Planner(graph, solver=options.solver)
        least, full = planner.minimum(), planner.store_all()
        seconds = time.process_time() - start
        cells = []
        for percent in PERCENTS:
            budget = full.peak_bytes * percent // 100
            if budget < least:
                cells.append(f"{'-':>7s}")
                continue
            plan = planner.solve(budget)
            assert simulate(graph, plan.forward, plan.backward).peak_bytes <= budget
            cells.append(f"{100 * (plan.time_s / full.time_s - 1):7.1f}")
        plan = planner.solve(least)
        length = len(plan.forward + plan.backward) / len(full.forward + full.backward)
        print(
            f"{Path(name).stem:24s}{len(graph.ops):6d}"
            + "".join(cells)
            + f"{100 * least / full.peak_bytes:7.1f}{100 * (plan.time_s / full.time_s - 1):7.1f}"
            + f"{length:7.1f}{seconds:9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
