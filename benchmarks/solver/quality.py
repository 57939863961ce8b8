"""How far from the best: auto on small graphs against every solver, CP-SAT and long random searches.

    python -m benchmarks.solver.quality [--exact-s S [--exact-cells N]] [--long N] [--jobs N] [--resume]
        [held_out | GRAPH ... [-o FILE]]

Without ``--exact-s`` and ``--long`` the plans that earlier runs found stand in for theirs (`known.py`); every
run adds what it finds. ``held_out`` is the suite that nothing is tuned on, with a record of its own. Graphs by
name are a quick look: the record is only written with ``-o``.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.records import Record, resumed
from benchmarks.solver import known
from benchmarks.solver.known import Known
from benchmarks.solver.records import (
    EQUAL,
    PACKAGES,
    RESULTS,
    GraphQuality,
    QualityCell,
    asked_for,
    falling,
    gap_of,
    least_bound,
    time_bound,
)
from benchmarks.solver.suite import find, held_out, small
from rematerialize.errors import BudgetError
from rematerialize.ir import TrainingGraph
from rematerialize.schedule import Schedule
from rematerialize.solve import Planner, solvers
from rematerialize.solve.exact import solve_exact
from rematerialize.solve.native import FlatStep, Workbench
from rematerialize.solve.step import Plan, Step, compile_step

FILE = RESULTS / "quality.json"
HELD_OUT_FILE = RESULTS / "held_out.json"
BUDGETS = 8
LONG_MOVES = 200_000  # of one long search, about half a second; auto gives a level a few thousand
THRESHOLDS = (0.003, 0.0005, 0.01, 0.03)  # of the long searches, in turn: how much worse a move may be
SLOW = ("exact",)  # not run as a solver, but on every budget, with auto's plan as its hint


@dataclass(frozen=True, slots=True)
class Effort:
    """What to spend on finding better plans than auto's, per budget.

    Attributes
    ----------
    exact_s : float
        CP-SAT's deterministic seconds; 0: not at all.
    long : int
        Long random searches.
    seed : int
        First seed of these searches.
    exact_cells : int
        Budgets per graph that CP-SAT searches, those with the largest gap of auto's first.
    """

    exact_s: float
    long: int
    seed: int
    exact_cells: int = BUDGETS


class _Bench:
    """One graph and what is known of it."""

    def __init__(self, graph: TrainingGraph, known: Known) -> None:
        self.graph, self.known = graph, known
        self.step: Step = compile_step(graph)
        self._index = {name: at for at, name in enumerate(self.step.names)}

    def add(self, plan: Plan, by: str) -> None:
        names = [self.step.names[op] for op in plan.order]
        self.known.add(names[: plan.split], names[plan.split :], by)

    def best(self, budget_bytes: int) -> Plan:
        """Return the best known plan within a budget that has one."""
        found = self.known.best(budget_bytes)
        assert found is not None, "auto's plan is known"
        forward, backward = self.known.names(found)
        return Plan(tuple(self._index[name] for name in (*forward, *backward)), len(forward))

    def proven(self, budget_bytes: int) -> bool:
        best = self.known.best(budget_bytes)
        # CP-SAT counts time in ticks: its bound may lie ops / 2**31 of the makespan below its proved optimum.
        slack = max(EQUAL, len(self.graph.ops) / 2**31)
        return best is not None and best.time_s <= self.known.bound_s(budget_bytes) * (1 + slack)

    def exact(self, budget_bytes: int, limit_s: float, hint: Plan) -> None:
        """Let CP-SAT search from a hint; keep its plan and its bound."""
        found = solve_exact(self.step, budget_bytes, hint=hint, deterministic_time_s=limit_s)
        self.known.prove(budget_bytes, found.bound_s)
        if found.plan is not None:
            self.add(found.plan, "exact")

    def long(self, budget_bytes: int, seeds: range) -> None:
        """Search at random around the best known plan, again and again from the best of these."""
        flat = FlatStep(self.step)
        for seed in seeds:
            plan = self.best(budget_bytes)
            bench = Workbench(flat, 2 * len(plan.order) + len(self.step.names), varied=True)
            bench.load(plan)
            bench.spend(budget_bytes)
            threshold = THRESHOLDS[seed % len(THRESHOLDS)]
            if bench.improve(budget_bytes, LONG_MOVES, threshold=threshold, seed=seed + 1):
                self.add(bench.plan(), "long")


def measure(name: str, stored: dict[str, Any] | None, effort: Effort) -> tuple[GraphQuality, dict[str, Any]]:
    """Return one graph's figures, and everything that is known of it now."""
    graph = find(name)
    bench = _Bench(graph, Known(graph, stored))
    start = time.process_time()
    planner = Planner(graph)
    least, full = planner.minimum(), planner.store_all()
    cpu_s = time.process_time() - start
    budgets = falling(full.peak_bytes, least, BUDGETS)
    plans = [planner.solve(budget) for budget in budgets]
    for plan in plans:
        bench.known.add(plan.forward, plan.backward, "auto")
    leasts = {"auto": least} | _alone(bench, budgets)
    for budget in budgets:
        bench.long(budget, range(effort.seed, effort.seed + effort.long))
    if effort.exact_s:
        _rule(bench, plans, least, effort)
    leasts["known"] = min(plan.peak_bytes for plan in bench.known.plans)
    cells = tuple(_cell(bench, plan, full.time_s) for plan in plans)
    bound = least_bound(bench.step)
    assert leasts["known"] >= (bound or 0), "the lower bound is wrong: a known plan's peak is below it"
    row = GraphQuality(name, len(graph.ops), full.peak_bytes, cpu_s, cells, leasts, bound)
    return row, bench.known.to_dict()


def _rule(bench: _Bench, plans: list[Schedule], least: int, effort: Effort) -> None:
    """Let CP-SAT search from the best known plans where auto's gap is largest, and below auto's least budget."""
    unproven = [plan for plan in plans if not bench.proven(plan.budget_bytes)]
    unproven.sort(key=lambda plan: plan.gap or 0.0, reverse=True)
    for plan in unproven[: effort.exact_cells]:
        bench.exact(plan.budget_bytes, effort.exact_s, bench.best(plan.budget_bytes))
    if effort.exact_cells >= len(plans) and bench.known.bound_s(least - 1) < float("inf"):
        bench.exact(least - 1, effort.exact_s, bench.best(least))


def _cell(bench: _Bench, plan: Schedule, full_s: float) -> QualityCell:
    best = bench.known.best(plan.budget_bytes)
    assert best is not None, "auto's plan is known"
    equal = plan.time_s <= best.time_s * (1 + EQUAL)
    bound_s = time_bound(bench.step, plan.budget_bytes) or 0.0
    assert best.time_s >= bound_s * (1 - EQUAL), "the lower bound is wrong: a known plan is below it"
    return QualityCell(
        budget_bytes=plan.budget_bytes,
        overhead=plan.time_s / full_s - 1,
        best_overhead=(plan.time_s if equal else best.time_s) / full_s - 1,
        best_by="auto" if equal else best.by,
        proven=bench.proven(plan.budget_bytes),
        gap=gap_of(plan, bench.step),
    )


def _alone(bench: _Bench, budgets: list[int]) -> dict[str, int]:
    """Run every solver alone, asked for these very budgets; return the lowest peak of each."""
    leasts: dict[str, int] = {}
    for name, solver in solvers().items():
        if name in SLOW:
            continue
        planner = Planner(bench.graph, solver=asked_for(solver, budgets))
        leasts[name] = planner.minimum()
        for budget in (*budgets, leasts[name]):
            try:
                plan = planner.solve(budget)
            except BudgetError:
                continue
            bench.known.add(plan.forward, plan.backward, name)
    return leasts


def main() -> int:
    """Measure, print a line per graph, write the record."""
    args = _parse()
    now = provenance("benchmarks.solver.quality", sys.argv[1:], (*PACKAGES, "ortools"), args.seed)
    suites = {"small": (small(), FILE), "held_out": (held_out(), HELD_OUT_FILE)}
    asked = args.graphs or ["small"]
    wanted, path = suites[asked[0]] if len(asked) == 1 and asked[0] in suites else (asked, None)
    path = args.output or path
    before = known.load()
    rows = {row.graph: row for row in (resumed(path, GraphQuality, now) if path and args.resume else ())}
    names = [name for name in wanted if name not in rows]
    effort = Effort(args.exact_s, args.long, args.seed, args.exact_cells)
    print(f"{'graph':24s}{'ops':>6s}{'mean diff':>11s}{'max diff':>10s}{'proven':>8s}{'auto cpu s':>12s}   in points")
    with ProcessPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(measure, name, before.get(name), effort) for name in names]
        for job in jobs:
            row, found = job.result()
            rows[row.graph] = row
            known.save(known.load() | {row.graph: found})  # another run may have saved other graphs
            if path:
                ordered = tuple(rows[name] for name in wanted if name in rows)
                Record(now, ordered).save(path)
            apart = [100 * cell.difference for cell in row.cells]
            proven = f"{sum(cell.proven for cell in row.cells)}/{len(row.cells)}"
            figures = f"{sum(apart) / len(apart):11.3f}{max(apart):10.3f}{proven:>8s}{row.cpu_s:12.2f}"
            print(f"{row.graph:24s}{row.ops:6d}{figures}", flush=True)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solver.quality", description=__doc__)
    parser.add_argument("graphs", nargs="*", metavar="GRAPH")
    parser.add_argument(
        "--exact-s", type=float, default=0.0, help="CP-SAT's deterministic seconds per budget: one to ten of CPU each"
    )
    parser.add_argument(
        "--exact-cells", type=int, default=BUDGETS, help="budgets per graph that CP-SAT searches, most open first"
    )
    parser.add_argument("--long", type=int, default=0, help="long random searches per budget")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the long searches")
    parser.add_argument("--jobs", type=int, default=1, help="graphs side by side")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the same code has written")
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
