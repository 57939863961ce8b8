"""The planner: one budget-independent search per graph, whose archive of plans by peak answers every budget.

What follows from that, by construction: `minimum` is exact (the archive's lowest peak), overhead
never rises with the budget, and planning several budgets costs one search and a little for each (`between.py`).
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rematerialize.errors import BudgetError
from rematerialize.ir import TrainingGraph
from rematerialize.schedule import Schedule
from rematerialize.simulate import simulate
from rematerialize.solve.between import Between
from rematerialize.solve.bounds import makespan_bound
from rematerialize.solve.native import FlatStep, available
from rematerialize.solve.order import RULES, canonical_orders
from rematerialize.solve.polish import MEDIUM, SMALL, Point, Polisher, fronts, side_by_side
from rematerialize.solve.step import Plan, Step, compile_step

LEVELS = 18  # between the minimum and store-all
NEAR = (0, 1, 2, 4, 7, 11)  # more levels near the minimum, in percent above it,
NEARER = (3, 5, 9, 14, 17, 25, 35)  # and on small steps: on large ones plans are too long there to be searched around
STEEP = 3  # levels at the minimum for which plans from store-all down are tried, too
TWICE = ("chain", "descent")  # the solvers that plan larger steps in two orders
EXACTLY = "descent"  # the solver that goes down to the very levels it is asked for: once more, when they are known
DOWN_TO, SETTLE = ("sweep", "descent"), 3  # are asked for the least peak so far, this often at most
LOWER = 5  # turns at most in which small steps' lowest plans are lowered once more after the search around them,
LOWEST = 3  # from how many of these
MOST_RUNS = 1_000  # per op, on average, of a plan: some steps get lower still by any number of executions
FINE, COARSE = 0.2, 0.05  # effort of the lower bound, for small steps and others
ROUNDED = 1 + 1e-12  # the judge may add times up in another order
Solver = Callable[[Step, Sequence[int]], Iterable[Plan]]


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
        solvers: Mapping[str, Solver],
        *,
        refine: bool = True,
        time_limit_s: float | None = None,
    ) -> None:
        self.graph = graph
        self._solvers = solvers
        self._time_limit_s = time_limit_s
        self._given = compile_step(graph)
        ops = len(self._given.names)
        orders = [tuple(range(ops))]
        if ops <= MEDIUM:
            orders = canonical_orders(self._given, RULES if ops <= SMALL else RULES[:2])
        self._orders = [(self._given.reordered(order), order) for order in orders]
        self._step = self._orders[0][0]
        self._place = {op: at for at, op in enumerate(orders[0])}
        self._flat = FlatStep(self._step)
        self._store_all = self._point(self._mapped(self._given.store_all(), range(ops)), "store_all")
        self._deadline = float("inf")
        self._polisher = Polisher(self._flat, self._point, self._late) if refine and available else None
        self._between: Between | None = None
        self._archive: list[Point] = []
        self._bounds: dict[int, float] = {}

    def store_all(self) -> Schedule:
        """Return the schedule that recomputes nothing."""
        return self._schedule(self._store_all, self._store_all.peak_bytes)

    def minimum(self) -> int:
        """Return the smallest budget in bytes for which `solve` succeeds."""
        return self._search()[0].peak_bytes

    def lowest(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return what the plan of least memory runs in the forward and in the backward, without a proof of its time."""
        return self._runs(self._search()[0])

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
        assert self._between is not None, "the search makes it"
        return self._schedule(self._between.plan(at - 1, budget_bytes), budget_bytes)

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

    def _late(self) -> bool:
        return time.monotonic() > self._deadline

    def _search(self) -> list[Point]:
        """Run the portfolio once; return the Pareto front of the levels that were searched, by rising peak."""
        if self._archive:
            return self._archive
        if self._time_limit_s is not None:
            self._deadline = time.monotonic() + self._time_limit_s
        points = [
            self._point(self._mapped(step.store_all(), order), "store_all", rank)
            for rank, (step, order) in enumerate(self._orders)
        ]
        self._starts = points[: len(self._orders)] if len(self._given.names) <= MEDIUM else []
        high, unit = points[0].peak_bytes, self._flat.scale
        asked = [high * percent // 100 // unit for percent in range(95, 3, -5)]

        def run(name: str, levels: Sequence[int] = asked) -> list[Point]:
            return [self._point(plan, name, rank) for rank, plan in self._plans(name, unit, levels)]

        points += [point for found in side_by_side(run, self._solvers) for point in found]
        levels: list[Point] = []
        if self._polisher and not self._late():
            points += self._polisher.squeeze(points, self._by_depth())
            points += self._settled(run, min(point.peak_bytes for point in points) // unit)
            least = min(point.peak_bytes for point in points)
            stride = self._polisher.effort.stride
            wanted = [least + (high - least) * part // LEVELS for part in range(1, LEVELS)][::stride]
            near = (*NEAR, *NEARER) if len(self._given.names) <= SMALL else NEAR
            wanted += [min(least * (100 + percent) // 100, high) for percent in near][::stride]
            points += run(EXACTLY, [level // unit for level in wanted])
            levels = self._polisher.levels(points, wanted, self._starts)
            lowest = [(start, level) for start in self._starts for level in sorted(wanted)[:STEEP]]
            levels += filter(None, (self._polisher.down(start, level, work=0) for start, level in lowest))
            points, levels = self._lowered(self._polisher, points, levels, least)
        raw = list(fronts([*points, *levels, self._store_all]))
        self._archive = list(fronts([*(levels or points), raw[0], self._store_all]))
        self._between = Between(self._polisher, self._archive, raw, self._starts, self._late)
        return self._archive

    def _lowered(
        self, polisher: Polisher, points: list[Point], levels: list[Point], least: int
    ) -> tuple[list[Point], list[Point]]:
        """Return the plans and those of levels with more of both below the least peak so far, as far down as it gets.

        First from what stores everything in the given order: only what the canonical orders can't reach may depend on
        that. Then from the lowest plans, which searches around them have made shorter, again and again.
        """
        for turn in range(LOWER):
            lowest = list(fronts([*points, *levels]))[:LOWEST]
            found = polisher.lower(lowest, turn) if turn else polisher.squeeze([self._store_all])
            lower = [point for point in found if point.peak_bytes < least]
            if lower:
                floor = min(point.peak_bytes for point in lower)
                below = polisher.levels(lower, [floor + (least - floor) * part // 4 for part in range(4)])
                levels = [*levels, *below, *polisher.raised(below, levels)]
                points = [*points, *lower]
                least = floor
            elif turn:
                break
        return points, levels

    def _settled(self, run: Callable[[str, Sequence[int]], list[Point]], level: int) -> list[Point]:
        """Return plans at the least memory so far, in scaled bytes, or lower, of solvers that get there if asked to."""
        points: list[Point] = []
        for _ in range(SETTLE):
            found = [point for name in DOWN_TO if name in self._solvers for point in run(name, [level])]
            points += found
            least = min((point.peak_bytes // self._flat.scale for point in found), default=level)
            if least >= level:
                break
            level = least
        return points

    def _by_depth(self) -> list[Point]:
        """Return small steps' plans that store everything, in orders that the portfolio doesn't try."""
        if len(self._given.names) > SMALL:
            return []
        orders = canonical_orders(self._given, by_depth=True)
        plans = [self._mapped(self._given.reordered(order).store_all(), order) for order in orders]
        return [self._point(plan, "store_all", len(self._orders) + rank) for rank, plan in enumerate(plans)]

    def _plans(self, name: str, unit: int, levels: Sequence[int]) -> Iterator[tuple[int, Plan]]:
        """Yield what a solver makes of the step in its canonical order, and in the order it was given in.

        In the portfolio for larger steps only the solver that gains most from a second order gets it.
        """
        every = len(self._solvers) == 1 or len(self._given.names) <= SMALL or name in TWICE
        for rank, (step, order) in enumerate(self._orders if every else self._orders[:1]):
            if self._late():
                return
            for plan in self._solvers[name](step.coarsened(unit) if unit > 1 else step, levels):
                if len(plan.order) <= MOST_RUNS * len(self._given.names):
                    yield rank, self._mapped(plan, order) if rank else plan
                if self._late():
                    return

    def _mapped(self, plan: Plan, order: Sequence[int]) -> Plan:
        """Return a plan for the step in some order of the given ops as one for the step that is planned."""
        return Plan(tuple(self._place[order[op]] for op in plan.order), plan.split)

    def _point(self, plan: Plan, solver: str, rank: int = 0) -> Point:
        peak_bytes, time_s = self._flat.replay(plan)
        return Point(peak_bytes, time_s, len(plan.order), solver, plan, rank)

    def _runs(self, point: Point) -> tuple[tuple[str, ...], tuple[str, ...]]:
        names = [self._step.names[op] for op in point.plan.order]
        return tuple(names[: point.plan.split]), tuple(names[point.plan.split :])

    def _schedule(self, point: Point, budget_bytes: int) -> Schedule:
        forward, backward = self._runs(point)
        result = simulate(self.graph, forward, backward)
        assert result.peak_bytes <= budget_bytes, "the solvers' memory model disagrees with the judge"
        least = self._archive[0].peak_bytes if self._archive else point.peak_bytes
        gap = self._gap(result.time_s, budget_bytes)
        # A search that began with storing everything, and recomputes: that name would mislead.
        recomputes = len(point.plan.order) > len({*point.plan.order})
        solver = "search" if point.solver == "store_all" and recomputes else point.solver
        return Schedule(forward, backward, budget_bytes, solver, result.peak_bytes, result.time_s, least, gap)

    def _gap(self, time_s: float, budget_bytes: int) -> float | None:
        """Return how far a makespan is above what no schedule within the budget can beat; None out of time."""
        if time_s <= self._store_all.time_s * ROUNDED:
            return 0.0
        if self._late():
            return None
        if budget_bytes not in self._bounds:
            effort = FINE if len(self._step.names) <= SMALL else COARSE
            self._bounds[budget_bytes] = makespan_bound(self._step, budget_bytes, effort=effort, fits=True)
        bound_s = self._bounds[budget_bytes]
        return max(time_s / bound_s - 1, 0.0) if bound_s else float("inf")
