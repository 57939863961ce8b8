"""Solvers: a training graph and a budget in, a schedule out. Never imports torch.

Adding a solver: one file with a function of the type `Solver`, one line in `_REGISTRY`.
"""

from __future__ import annotations

from importlib.util import find_spec

from rematerialize.ir import TrainingGraph
from rematerialize.schedule import Schedule
from rematerialize.solve.blocks import blocks
from rematerialize.solve.chain import chain
from rematerialize.solve.descent import descent
from rematerialize.solve.exact import exact
from rematerialize.solve.join import join
from rematerialize.solve.planner import Planner as _Planner
from rematerialize.solve.planner import Solver
from rematerialize.solve.revolve import revolve
from rematerialize.solve.rotor import rotor
from rematerialize.solve.sweep import least, sweep

__all__ = ["Planner", "Solver", "frontier", "minimum", "solve", "solvers", "store_all"]

_REGISTRY: dict[str, Solver] = {
    "store_all": lambda step, levels: (),
    "blocks": blocks,
    "descent": descent,
    "chain": chain,
    "sweep": sweep,
    "least": least,
    "rotor": rotor,
    "revolve": revolve,
    "join": join,
}
_EXTRA: dict[str, Solver] = {"exact": exact}  # by name only: too slow for the portfolio, or an extra is needed


def solvers() -> dict[str, Solver]:
    """Return the registered solvers by name; "auto" stands for all of them together."""
    return {**_REGISTRY, **(_EXTRA if find_spec("ortools") else {})}


class Planner(_Planner):
    """Plan one graph for any number of budgets with a named solver, a callable, or all ("auto")."""

    def __init__(
        self, graph: TrainingGraph, *, solver: str | Solver = "auto", time_limit_s: float | None = None
    ) -> None:
        super().__init__(graph, _portfolio(solver), refine=solver == "auto", time_limit_s=time_limit_s)


def _portfolio(solver: str | Solver) -> dict[str, Solver]:
    if callable(solver):
        return {getattr(solver, "__name__", "custom"): solver}
    if solver == "auto":
        return dict(_REGISTRY)
    if solver not in solvers():
        raise ValueError(f"unknown solver {solver!r}; known: auto, {', '.join(solvers())}")
    return {solver: solvers()[solver]}


def solve(
    graph: TrainingGraph,
    budget_bytes: int,
    *,
    solver: str | Solver = "auto",
    time_limit_s: float | None = None,
) -> Schedule:
    """Return the fastest schedule found whose peak is at most the budget.

    Parameters
    ----------
    graph : TrainingGraph
    budget_bytes : int
        Limit on the peak, inclusive; resident storages don't count.
    solver : str or Solver
        A name from `solvers`, "auto" for the whole portfolio, or a callable of the same type.
    time_limit_s : float, optional
        Safety limit on the search in seconds.

    Raises
    ------
    BudgetError
        Nothing fits; its ``minimum_bytes`` is the smallest budget that works.
    """
    return Planner(graph, solver=solver, time_limit_s=time_limit_s).solve(budget_bytes)


def store_all(graph: TrainingGraph) -> Schedule:
    """Return the schedule that recomputes nothing."""
    return Planner(graph, solver="store_all").store_all()


def minimum(graph: TrainingGraph) -> int:
    """Return the smallest budget in bytes for which `solve` succeeds."""
    return Planner(graph).minimum()


def frontier(graph: TrainingGraph, points: int = 12) -> tuple[Schedule, ...]:
    """Return schedules from store-all's peak down to the minimum, overhead rising."""
    return Planner(graph).frontier(points)
