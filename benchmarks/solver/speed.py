"""How long planning takes and how much memory it needs, by the number of ops: synthetic graphs and large ones.

    python -m benchmarks.solver.speed [--runs N] [--limit S] [--resume] [GRAPH ... [-o FILE]]

Each run is a process of its own that reads a graph's JSON file and plans it for half of store-all's peak. The
record is written after every graph; `python -m benchmarks.solver.report` makes the page and the plot of it.
Graphs by name (of any suite) are a quick look: the record is only written with ``-o``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.process import Stopwatch, in_fresh_process, peak_rss_bytes
from benchmarks.provenance import provenance
from benchmarks.records import Record, resumed
from benchmarks.solver.graphs import SHAPES
from benchmarks.solver.records import PACKAGES, RESULTS, Speed
from benchmarks.solver.suite import find, large, synthetic
from rematerialize.errors import BudgetError
from rematerialize.ir import TrainingGraph
from rematerialize.solve import Planner

FILE = RESULTS / "speed.json"
REPEATED_S = 30.0  # what takes longer than this in one run isn't run again


def timed(path: Path) -> dict[str, Any]:
    """Read and plan one graph file in this process, which has done nothing else."""
    watch = Stopwatch.start()
    graph = TrainingGraph.from_json(path.read_bytes())
    read_wall_s, read_cpu_s = watch.read()
    watch = Stopwatch.start()
    planner = Planner(graph)
    full = planner.store_all()
    try:
        overhead = planner.solve(full.peak_bytes // 2).time_s / full.time_s - 1
    except BudgetError:
        overhead = None
    plan_wall_s, plan_cpu_s = watch.read()
    return {
        "status": "infeasible" if overhead is None else "ok",
        "overhead": overhead,
        "plan_wall_s": plan_wall_s,
        "plan_cpu_s": plan_cpu_s,
        "read_wall_s": read_wall_s,
        "read_cpu_s": read_cpu_s,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def measure(name: str, runs: int, limit_s: float) -> Speed:
    """Run one graph a few times, each time in a fresh process."""
    graph = find(name)
    shape = name.rpartition("-")[0] if name in synthetic() else ""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.json"
        path.write_text(json.dumps(graph.to_dict()), encoding="utf-8")
        while len(found) < runs:
            found.append(in_fresh_process("benchmarks.solver.speed", "--child", str(path), limit_s=limit_s))
            if found[-1]["status"] in ("timeout", "error") or found[-1]["plan_wall_s"] > REPEATED_S:
                break
    last = found[-1]
    series = ("plan_wall_s", "plan_cpu_s", "read_wall_s", "read_cpu_s", "peak_rss_bytes")
    figures = {key: tuple(run[key] for run in found if key in run) for key in series}
    return Speed(name, shape, len(graph.ops), last["status"], last.get("overhead"), **figures)


def main() -> int:
    """Measure, print a line per graph, write the record."""
    args = _parse()
    if args.child:
        print(json.dumps(timed(args.child)))
        return 0
    now = provenance("benchmarks.solver.speed", sys.argv[1:], PACKAGES)
    path = args.output or (None if args.graphs else FILE)
    old = resumed(path, Speed, now) if path and args.resume else ()
    rows = {row.graph: row for row in old if row.ran}
    print(f"{'graph':24s}{'ops':>7s}{'wall s':>9s}{'cpu s':>9s}{'read s':>9s}{'RSS MiB':>9s}  status")
    for name in args.graphs or [f"{shape}-{size}" for size in ("1k", "10k", "100k") for shape in SHAPES] + [*large()]:
        if name not in rows:
            rows[name] = measure(name, args.runs, args.limit)
            if path:
                Record(now, tuple(rows.values())).save(path)
        row = rows[name]
        figures = " " * 36
        if row.ran:
            seconds = (row.plan_wall_s[-1], row.plan_cpu_s[-1], row.read_wall_s[-1])
            figures = "".join(f"{value:9.2f}" for value in seconds) + f"{max(row.peak_rss_bytes) / 2**20:9.0f}"
        print(f"{name:24s}{row.ops:7d}{figures}  {row.status}", flush=True)
    return int(any(not row.ran for row in rows.values()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solver.speed", description=__doc__)
    parser.add_argument("graphs", nargs="*", metavar="GRAPH")
    parser.add_argument("--runs", type=int, default=3, help="runs of each graph that is quick enough")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one run")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the same code has written")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--child", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
