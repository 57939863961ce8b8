"""What the three benchmarks of the solver record, as frozen data that goes to JSON and back.

Overheads and gaps are ratios: 0.12 is 12 percentage points. A gap is how far a schedule's time may lie above
the best possible, by a lower bound; None where there is no bound.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

from rematerialize.schedule import Schedule
from rematerialize.solve import Solver
from rematerialize.solve.step import Plan, Step

RESULTS = Path(__file__).resolve().parents[1] / "results" / "solver"
PACKAGES = ("rematerialize", "numpy")
EQUAL = 1e-9  # sums of the same times in another order differ by less, relatively
Status = Literal["ok", "infeasible", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class QualityCell:
    """Auto on one budget, against the best that is known.

    Attributes
    ----------
    budget_bytes : int
    overhead, best_overhead : float
        Auto's, and the least of any plan known within the budget.
    best_by : str
        Who found that plan: "auto", a solver's name, "exact" or "long".
    proven : bool
        CP-SAT proved that nothing of its formulation is faster than the best known plan.
    gap : float or None
    """

    budget_bytes: int
    overhead: float
    best_overhead: float
    best_by: str
    proven: bool
    gap: float | None

    @property
    def difference(self) -> float:
        return self.overhead - self.best_overhead


@dataclass(frozen=True, slots=True)
class GraphQuality:
    """One small graph; budgets fall from 80% of store-all's peak to auto's minimum.

    ``least_bytes`` holds the lowest peak of each solver alone and, as "known", of any plan; ``bound_bytes`` is
    a lower bound of them all.
    """

    FORMAT: ClassVar[str] = "rematerialize.solver-quality/1"
    graph: str
    ops: int
    full_peak_bytes: int
    cpu_s: float
    cells: tuple[QualityCell, ...]
    least_bytes: dict[str, int]
    bound_bytes: int | None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraphQuality:
        return cls(**{**data, "cells": tuple(QualityCell(**cell) for cell in data["cells"])})


@dataclass(frozen=True, slots=True)
class Contestant:
    """One solver alone on one large graph: an overhead per budget, None where it has no schedule."""

    status: Status
    overheads: tuple[float | None, ...] = ()
    gaps: tuple[float | None, ...] = ()
    least_bytes: int | None = None
    wall_s: float | None = None
    cpu_s: float | None = None
    peak_rss_bytes: int | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Contestant:
        tuples = {key: tuple(data.get(key, ())) for key in ("overheads", "gaps")}
        return cls(**{**data, **tuples})


@dataclass(frozen=True, slots=True)
class GraphScale:
    """One large graph: auto and each baseline on the same budgets."""

    FORMAT: ClassVar[str] = "rematerialize.solver-scale/1"
    graph: str
    ops: int
    full_peak_bytes: int
    budgets_bytes: tuple[int, ...]
    contestants: dict[str, Contestant]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraphScale:
        contestants = {name: Contestant.from_dict(found) for name, found in data["contestants"].items()}
        return cls(**{**data, "budgets_bytes": tuple(data["budgets_bytes"]), "contestants": contestants})

    def above(self) -> list[tuple[int, str]]:
        """Return (budget, baseline) wherever a baseline is faster than auto, or feasible where auto isn't."""
        found = []
        ours = self.contestants["auto"].overheads
        for name, contestant in self.contestants.items():
            for budget, auto, theirs in zip(self.budgets_bytes, ours, contestant.overheads, strict=False):
                if theirs is not None and (auto is None or 1 + auto > (1 + theirs) * (1 + EQUAL)):
                    found.append((budget, name))
        return found


@dataclass(frozen=True, slots=True)
class Speed:
    """Planning one graph for half of store-all's peak; one figure per run, each run a process of its own.

    ``read_*`` is reading and verifying the JSON file, ``plan_*`` everything after; ``infeasible`` means that
    the search was run, but half is below the minimum. ``shape`` is "" for a captured graph.
    """

    FORMAT: ClassVar[str] = "rematerialize.solver-speed/1"
    graph: str
    shape: str
    ops: int
    status: Status
    overhead: float | None = None
    plan_wall_s: tuple[float, ...] = ()
    plan_cpu_s: tuple[float, ...] = ()
    read_wall_s: tuple[float, ...] = ()
    read_cpu_s: tuple[float, ...] = ()
    peak_rss_bytes: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Speed:
        frozen: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**frozen)

    @property
    def ran(self) -> bool:
        return bool(self.plan_wall_s)

    @property
    def wall_s(self) -> float:
        """Median seconds of planning."""
        return statistics.median(self.plan_wall_s)


def falling(high_bytes: int, least_bytes: int, count: int) -> list[int]:
    """Return budgets spread evenly from 80% of a peak down to the least, both included; fewer if they meet."""
    top = max(high_bytes * 80 // 100, least_bytes)
    budgets = (top - (top - least_bytes) * rank // max(count - 1, 1) for rank in range(count))
    return list(dict.fromkeys(budgets))


def asked_for(solver: Solver, budgets: Sequence[int]) -> Solver:
    """Return the solver with these budgets among its levels: plans in between are then the best that it can do."""

    def asked(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
        yield from solver(step, sorted({*levels, *budgets}, reverse=True))

    return asked


def gap_of(schedule: Schedule, step: Step) -> float | None:
    """Return the schedule's own gap, or the one by `solve.bounds`; None without either."""
    own: float | None = getattr(schedule, "gap", None)
    if own is not None:
        return own
    bound_s = time_bound(step, schedule.budget_bytes)
    if not bound_s:
        return None
    assert schedule.time_s >= bound_s * (1 - EQUAL), "the lower bound is wrong: a valid schedule is below it"
    return max(schedule.time_s / bound_s - 1, 0.0)


def time_bound(step: Step, budget_bytes: int) -> float | None:
    """Return a lower bound in seconds of every schedule within a budget; None without `solve.bounds`."""
    return _bounds("makespan_bound", step, budget_bytes)


def least_bound(step: Step) -> int | None:
    """Return a lower bound of every schedule's peak; None without `solve.bounds`."""
    found = _bounds("minimum_bytes_bound", step)
    return None if found is None else int(found)


def _bounds(name: str, *arguments: object) -> float | None:
    try:
        function = getattr(import_module("rematerialize.solve.bounds"), name, None)
    except ModuleNotFoundError:
        return None
    return None if function is None else function(*arguments)
