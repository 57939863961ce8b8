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
from rematerialize.solve.step import Plan, Step, compile_step

Solver = Callable[[Step, Sequence[int]], Iterable[Plan]]


@dataclass(frozen=True, slots=True)
class _Point:
    peak_bytes: int
    time_s: float
    length: int
    solver: str
    plan: Plan


class Planner:
    """Plan one graph for any number of budgets.

    Parameters
    ----------
    graph : TrainingGraph
    solvers : mapping of str to Solver
        The portfolio, in the order in which it runs.
    time_limit_s : float, optional
        Safety limit on the search; plans are deterministic as long as it isn't reached.
    """

    def __init__(
        self, graph: TrainingGraph, solvers: dict[str, Solver], *, time_limit_s: float | None = None
    ) -> None:
        self.graph = graph
        self._solvers = solvers
        self._time_limit_s = time_limit_s
        self._step = compile_step(graph)
        self._store_all = self._point(self._step.store_all(), "store_all")
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
        return self._schedule(archive[at - 1], budget_bytes)

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
        start = time.monotonic()
        points = [self._store_all]
        high = self._store_all.peak_bytes
        levels = [high * percent // 100 for percent in range(95, 5, -5)]
        for name, solver in self._solvers.items():
            for plan in solver(self._step, levels):
                points.append(self._point(plan, name))
                if self._time_limit_s is not None and time.monotonic() - start > self._time_limit_s:
                    break
        points.sort(key=lambda p: (p.peak_bytes, p.time_s, p.length))
        for point in points:
            if not self._archive or point.time_s < self._archive[-1].time_s:
                self._archive.append(point)
        return self._archive

    def _point(self, plan: Plan, solver: str) -> _Point:
        order = plan.order
        return _Point(self._step.peak_bytes(plan), self._step.duration_s(order), len(order), solver, plan)

    def _schedule(self, point: _Point, budget_bytes: int) -> Schedule:
        names = [self._step.names[op] for op in point.plan.order]
        forward, backward = tuple(names[: point.plan.split]), tuple(names[point.plan.split :])
        result = simulate(self.graph, forward, backward)
        assert result.peak_bytes == point.peak_bytes, "the solvers' memory model disagrees with the judge"
        least = self._archive[0].peak_bytes if self._archive else point.peak_bytes
        return Schedule(
            forward, backward, budget_bytes, point.solver, result.peak_bytes, result.time_s, least
        )
