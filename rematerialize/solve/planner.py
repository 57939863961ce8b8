"""The planner: one budget-independent search per graph, every answer a look-up in its archive.

What follows from that, by construction: `minimum` is exact (the archive's lowest peak), overhead
never rises with the budget, and planning several budgets costs one search.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rematerialize.errors import BudgetError
from rematerialize.ir import TrainingGraph
from rematerialize.schedule import Schedule
from rematerialize.simulate import simulate
from rematerialize.solve.descent import oscillate, spend, squeeze
from rematerialize.solve.step import Plan, Step, compile_step
from rematerialize.solve.workbench import Workbench

LONG = 3  # plans longer than this many times the step's ops are not polished: too slow
SUBLEVELS = 8  # levels at which the room between two archived plans is spent
Solver = Callable[[Step, Sequence[int]], Iterable[Plan]]


@dataclass(frozen=True, slots=True)
class _Point:
    """A plan that was replayed; ``peak_bytes`` is its peak or a level that it fits."""

    peak_bytes: int
    time_s: float
    length: int
    solver: str
    plan: Plan


@dataclass(frozen=True, slots=True)
class _Effort:
    """How much polishing a step of a size gets: counted work, so that plans are deterministic.

    ``depths`` are how far oscillation goes below a level; ``stride`` skips levels.
    """

    squeezes: int
    starts: int
    stride: int
    depths: tuple[float, ...]


def _effort(ops: int) -> _Effort:
    if ops <= 300:
        return _Effort(4, 5, 1, (0.03, 0.08, 0.2))
    if ops <= 700:
        return _Effort(2, 3, 1, (0.05,))
    if ops <= 2500:
        return _Effort(1, 2, 2, (0.05,))
    return _Effort(1, 1, 3, ())


class Planner:
    """Plan one graph for any number of budgets.

    Parameters
    ----------
    graph : TrainingGraph
    solvers : mapping of str to Solver
        The portfolio, in the order in which it runs.
    refine : bool
        Whether to squeeze and polish what the portfolio found.
    time_limit_s : float, optional
        Safety limit on the search; plans are deterministic as long as it isn't reached.
    """

    def __init__(
        self,
        graph: TrainingGraph,
        solvers: dict[str, Solver],
        *,
        refine: bool = True,
        time_limit_s: float | None = None,
    ) -> None:
        self.graph = graph
        self._solvers = solvers
        self._time_limit_s = time_limit_s
        self._step = compile_step(graph)
        self._store_all = self._point(self._step.store_all(), "store_all")
        self._refine = refine
        self._effort = _effort(len(self._step.names))
        self._finished: dict[int, list[_Point]] = {}
        self._deadline = float("inf")
        self._archive: list[_Point] = []

    def store_all(self) -> Schedule:
        """Return the schedule that recomputes nothing."""
        return self._schedule(self._store_all, self._store_all.peak_bytes)

    def minimum(self) -> int:
        """Return the smallest budget in bytes for which `solve` succeeds."""
        return self._search()[0].peak_bytes

    def solve(self, budget_bytes: int) -> Schedule:
        """Return the fastest schedule found whose peak is at most the budget.

        Raises
        ------
        BudgetError
            When ``budget_bytes < minimum()``.
        """
        archive = self._search()
        at = bisect_right(archive, budget_bytes, key=lambda point: point.peak_bytes)
        if at == 0:
            least = archive[0].peak_bytes
            raise BudgetError(
                f"no schedule found within {budget_bytes} bytes; the smallest budget that works is"
                f" {least} bytes (store-all needs {self._store_all.peak_bytes})",
                minimum_bytes=least,
            )
        return self._schedule(self._finish(at - 1, budget_bytes), budget_bytes)

    def frontier(self, points: int = 12) -> tuple[Schedule, ...]:
        """Return at most ``points`` schedules from store-all's peak down to the minimum."""
        low, high = self.minimum(), self._store_all.peak_bytes
        found: list[Schedule] = []
        for rank in range(points):
            budget = high - (high - low) * rank // max(points - 1, 1)
            schedule = self.solve(budget)
            if not found or schedule.peak_bytes < found[-1].peak_bytes:
                found.append(schedule)
        return tuple(found)

    def _search(self) -> list[_Point]:
        """Run the portfolio once; return the Pareto front by rising peak and falling time."""
        if self._archive:
            return self._archive
        self._deadline = time.monotonic() + (self._time_limit_s or float("inf"))
        points = [self._store_all]
        high = self._store_all.peak_bytes
        levels = [high * percent // 100 for percent in range(95, 5, -5)]
        for name, solver in self._solvers.items():
            for plan in solver(self._step, levels):
                points.append(self._point(plan, name))
                if time.monotonic() > self._deadline:
                    break
        if self._refine:
            self._squeeze(points)
            self._polish(points, levels)
        self._archive = _front(points)
        return self._archive

    def _finish(self, index: int, budget_bytes: int) -> _Point:
        """Return what spending a budget between two archived peaks makes of the lower one.

        Monotone by construction: fixed sublevels are spent one after the other, and what is faster
        than the upper archived plan is left out.
        """
        archive = self._archive
        best = archive[index]
        long = best.length > LONG * len(self._step.names)
        if not self._refine or long or index + 1 == len(archive) or budget_bytes == best.peak_bytes:
            return best
        low, above = best.peak_bytes, archive[index + 1]
        if index not in self._finished:
            self._finished[index] = []
            bench = Workbench(self._step, best.plan)
            for part in range(1, SUBLEVELS):
                level = low + (above.peak_bytes - low) * part // SUBLEVELS
                if spend(bench, level):
                    plan = bench.plan()
                    point = _Point(level, bench.time_s, len(plan.order), best.solver, plan)
                    self._finished[index].append(point)
        for point in self._finished[index]:
            if point.peak_bytes <= budget_bytes and above.time_s <= point.time_s < best.time_s:
                best = point
        return self._point(best.plan, best.solver)

    def _squeeze(self, points: list[_Point]) -> None:
        """Lower the minimum, starting from the lowest plans of different solvers."""
        lowest: dict[str, _Point] = {}
        for point in sorted(points, key=_by_peak):
            if point.length <= LONG * len(self._step.names):
                lowest.setdefault(point.solver, point)
        for name, point in list(lowest.items())[: self._effort.squeezes]:
            for plan in squeeze(self._step, point.plan):
                points.append(self._point(plan, name))
                if time.monotonic() > self._deadline:
                    return

    def _polish(self, points: list[_Point], levels: Sequence[int]) -> None:
        """Spend what each level leaves over, from the best plans below it, then oscillate."""
        least = min(point.peak_bytes for point in points)
        near = [least * (100 + percent) // 100 for percent in (0, 2, 5, 10, 20)][:: self._effort.stride]
        for level in sorted({*levels[:: self._effort.stride], *near}, reverse=True):
            best: _Point | None = None
            short = [p for p in points if p.length <= LONG * len(self._step.names)]
            for start in _starts(short, level)[: self._effort.starts]:
                bench = Workbench(self._step, start.plan)
                spend(bench, level)
                if best is None or bench.time_s < best.time_s:
                    plan = bench.plan()
                    peak, length = bench.peak_bytes(), len(plan.order)
                    best = _Point(peak, bench.time_s, length, start.solver, plan)
                if time.monotonic() > self._deadline:
                    break
            if best is None:
                continue
            points.append(best)
            plan = oscillate(self._step, best.plan, level, self._effort.depths)
            if plan is not best.plan:
                points.append(self._point(plan, best.solver))

    def _point(self, plan: Plan, solver: str) -> _Point:
        order = plan.order
        return _Point(self._step.peak_bytes(plan), self._step.duration_s(order), len(order), solver, plan)

    def _schedule(self, point: _Point, budget_bytes: int) -> Schedule:
        names = [self._step.names[op] for op in point.plan.order]
        forward, backward = tuple(names[: point.plan.split]), tuple(names[point.plan.split :])
        result = simulate(self.graph, forward, backward)
        assert result.peak_bytes == point.peak_bytes, "the solvers' memory model disagrees with the judge"
        least = self._archive[0].peak_bytes if self._archive else point.peak_bytes
        return Schedule(forward, backward, budget_bytes, point.solver, result.peak_bytes, result.time_s, least)


def _by_peak(point: _Point) -> tuple[int, float, int]:
    return point.peak_bytes, point.time_s, point.length


def _front(points: Sequence[_Point]) -> list[_Point]:
    """Return the Pareto front of peak and time, by rising peak."""
    front: list[_Point] = []
    for point in sorted(points, key=_by_peak):
        if not front or point.time_s < front[-1].time_s:
            front.append(point)
    return front


def _starts(points: Sequence[_Point], level: int) -> list[_Point]:
    """Return the fastest plan of each solver within a level, two of the solver that leads."""
    chosen: list[_Point] = []
    count: dict[str, int] = {}
    seen: set[float] = set()
    for point in sorted(points, key=lambda p: (p.time_s, p.peak_bytes)):
        taken = count.get(point.solver, 0)
        if point.peak_bytes <= level and taken < 1 + (not chosen) and point.time_s not in seen:
            count[point.solver] = taken + 1
            seen.add(point.time_s)
            chosen.append(point)
    return chosen
