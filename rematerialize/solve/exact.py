"""Exact schedules of small steps by constraint programming: the ruler for every other solver.

Bartan, Li, Teague, Lott, Dilkina, "Moccasin: efficient tensor rematerialization for neural networks"
(ICML 2023): time is a position in a *staged* order, each op has up to C computations, each output of a
computation is retained over an interval of positions, and one cumulative constraint keeps the budget.

The staged order here: stage 0 is the forward, every forward op at most once; then one stage per backward
op, in which forward ops may run again (in one fixed topological order) before that op runs. Departures
from the paper: stage 0 recomputes nothing (this is what makes it fast); a first computation may wait for
the backward; every output of an op is freed on its own; transients, tangents, held outputs and gradients
count exactly as in `rematerialize.simulate`.

Scope of the guarantee: optimal among schedules of that form with at most C computations per op, with the
backward ops in one order. A position at which nothing runs constrains nothing: what is live there is live
at the position that ran before it, or (tangents) at the one that runs next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from math import inf, nextafter

from rematerialize.solve.retention import RetentionModel
from rematerialize.solve.step import Plan, Step

LARGEST = 400  # ops of a step that `exact` tries


@dataclass(frozen=True, slots=True)
class ExactResult:
    """What CP-SAT found and proved.

    Attributes
    ----------
    plan : Plan or None
        The best plan found within the budget.
    bound_s : float
        No schedule of the formulation is faster; inf if none fits.
    proven : bool
        The search ended: the plan is optimal up to ``ops / 2**31`` of the makespan, or none fits.
    """

    plan: Plan | None
    bound_s: float
    proven: bool


def exact(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield one plan per level, from the highest down; nothing without ortools or for large steps."""
    if len(step.names) > LARGEST or not find_spec("ortools"):
        return
    hint = step.store_all()
    for level in sorted(levels, reverse=True):
        found = solve_exact(step, level, hint=hint, deterministic_time_s=10.0).plan
        if found is not None:
            hint = found
            yield found


def solve_exact(
    step: Step,
    budget_bytes: int,
    *,
    copies: int = 3,
    hint: Plan | None = None,
    deterministic_time_s: float = 60.0,
    workers: int = 1,
) -> ExactResult:
    """Return the fastest plan within the budget and a lower bound, by CP-SAT. Exponential in the worst case.

    Parameters
    ----------
    step : Step
    budget_bytes : int
        Limit on the peak, inclusive.
    copies : int
        Most computations of one op, the forward's among them.
    hint : Plan, optional
        Where to start; it also sets the order of the backward ops, and of the forward ops within a stage
        (by first computation). What can't be mapped is ignored. The graph's order without one.
    deterministic_time_s : float
        Limit in CP-SAT's deterministic seconds.
    workers : int
        Threads. They are interleaved, so that a limit reached gives the same plan on every run; one is
        usually the fastest.

    Notes
    -----
    Times become whole ticks rounded down and the bound a float rounded down, so the bound holds. Sizes
    are divided by their common divisor. Only where bytes x positions could overflow 63 bits are they
    also rounded, sizes up and budget down: plans stay valid, bound and proof hold within that rounding.

    Raises
    ------
    ImportError
        ortools (the optional extra "exact") is not installed.
    """
    from ortools.sat.python import cp_model

    model = RetentionModel(cp_model, step, budget_bytes, copies, hint or step.store_all())
    if hint is not None:
        model.suggest(hint)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = workers
    solver.parameters.interleave_search = workers > 1
    solver.parameters.max_deterministic_time = deterministic_time_s
    solver.parameters.random_seed = 0
    status = solver.solve(model.cp)
    assert status != cp_model.MODEL_INVALID, model.cp.validate()
    if status == cp_model.INFEASIBLE:
        return ExactResult(None, inf, True)
    bound = model.once_s + Fraction(max(0, round(solver.best_objective_bound)), model.ticks_per_s)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return ExactResult(None, _floor(bound), False)
    plan = model.plan(solver)
    assert step.peak_bytes(plan) <= budget_bytes, "CP-SAT's plan replays above the budget"
    bound_s = min(_floor(bound), step.duration_s(plan.order))
    return ExactResult(plan, bound_s, status == cp_model.OPTIMAL)


def _floor(value: Fraction) -> float:
    """Return the largest float that is at most the value."""
    near = float(value)
    return near if Fraction(near) <= value else nextafter(near, -inf)
