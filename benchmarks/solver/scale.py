"""Auto on large graphs against every other solver alone, on six budgets each: it is never above any of them.

    python -m benchmarks.solver.scale [--limit S] [--resume] [GRAPH ... [-o FILE]]

Each solver runs on each graph in a process of its own, so that its peak memory is its own; the record is
written after every graph. Exits with 1 when auto is above a baseline anywhere. Graphs by name (of any suite)
are a quick look: the record is only written with ``-o``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.process import Stopwatch, in_fresh_process, peak_rss_bytes
from benchmarks.provenance import provenance
from benchmarks.records import Record, resumed
from benchmarks.solver.records import (
    PACKAGES,
    RESULTS,
    Contestant,
    GraphScale,
    asked_for,
    falling,
    gap_of,
)
from benchmarks.solver.suite import find, large
from rematerialize.errors import BudgetError
from rematerialize.schedule import Schedule
from rematerialize.solve import Planner, solvers
from rematerialize.solve.step import compile_step

FILE = RESULTS / "scale.json"
BUDGETS = 6
BASELINES = ("store_all", "blocks", "revolve", "rotor", "join", "sweep", "descent", "chain")


def contest(name: str, solver: str, budgets: list[int]) -> dict[str, object]:
    """Return what one solver does on one graph, in this process; auto chooses the budgets itself."""
    graph = find(name)
    watch = Stopwatch.start()
    planner = Planner(graph, solver=solver if solver == "auto" else asked_for(solvers()[solver], budgets))
    least, full = planner.minimum(), planner.store_all()
    budgets = budgets or falling(full.peak_bytes, least, BUDGETS)
    plans = [_plan(planner, budget) for budget in budgets]
    wall_s, cpu_s = watch.read()
    rss = peak_rss_bytes()
    step = compile_step(graph)
    overheads = tuple(None if plan is None else plan.time_s / full.time_s - 1 for plan in plans)
    gaps = tuple(gap_of(plan, step) for plan in plans if plan) if solver == "auto" else ()
    found = Contestant("ok", overheads, gaps, least, wall_s, cpu_s, rss)
    head = {"ops": len(graph.ops), "full_peak_bytes": full.peak_bytes, "budgets_bytes": budgets}
    return {**head, "contestant": asdict(found)}


def _plan(planner: Planner, budget_bytes: int) -> Schedule | None:
    try:
        return planner.solve(budget_bytes)
    except BudgetError:
        return None


def measure(name: str, limit_s: float) -> GraphScale | None:
    """Let every solver run on a graph; None when auto itself doesn't come back."""
    ours = in_fresh_process("benchmarks.solver.scale", "--child", "auto", name, limit_s=limit_s)
    if "contestant" not in ours:
        print(f"{name}: auto: {ours['status']}", file=sys.stderr)
        return None
    budgets: list[int] = ours["budgets_bytes"]
    contestants = {"auto": Contestant.from_dict(ours["contestant"])}
    for solver in (solver for solver in BASELINES if solver in solvers()):
        arguments = ("--child", solver, name, "--budgets", *map(str, budgets))
        found = in_fresh_process("benchmarks.solver.scale", *arguments, limit_s=limit_s)
        contestants[solver] = Contestant.from_dict(found.get("contestant", found))
    return GraphScale(name, ours["ops"], ours["full_peak_bytes"], tuple(budgets), contestants)


def main() -> int:
    """Measure, print a line per graph, write the record."""
    args = _parse()
    if args.child:
        print(json.dumps(contest(args.graphs[0], args.child, args.budgets)))
        return 0
    now = provenance("benchmarks.solver.scale", sys.argv[1:], PACKAGES)
    path = args.output or (None if args.graphs else FILE)
    rows = {row.graph: row for row in (resumed(path, GraphScale, now) if path and args.resume else ())}
    failed = False
    print(f"{'graph':24s}{'ops':>7s}{'budgets':>9s}{'wall s':>9s}{'cpu s':>9s}{'RSS MiB':>9s}  auto above")
    for name in args.graphs or large():
        if name not in rows:
            row = measure(name, args.limit)
            if row is None:
                failed = True
                continue
            rows[name] = row
            if path:
                Record(now, tuple(rows.values())).save(path)
        row = rows[name]
        above, ours = row.above(), row.contestants["auto"]
        failed |= bool(above)
        costs = f"{ours.wall_s:9.2f}{ours.cpu_s:9.2f}{(ours.peak_rss_bytes or 0) / 2**20:9.0f}"
        who = ", ".join(f"{who} at {100 * budget / row.full_peak_bytes:.1f}%" for budget, who in above) or "none"
        print(f"{row.graph:24s}{row.ops:7d}{len(row.budgets_bytes):9d}{costs}  {who}", flush=True)
    return int(failed)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solver.scale", description=__doc__)
    parser.add_argument("graphs", nargs="*", metavar="GRAPH")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one solver on one graph")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the same code has written")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--child", metavar="SOLVER", help=argparse.SUPPRESS)
    parser.add_argument("--budgets", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
