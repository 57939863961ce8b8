"""The exact solver against enumeration, and its promises."""

from __future__ import annotations

from itertools import product
from math import inf

import pytest
from hypothesis import given, settings

from benchmarks.solver import graphs
from rematerialize.errors import ScheduleError
from rematerialize.ir import Op, TrainingGraph
from rematerialize.simulate import simulate
from rematerialize.solve import Planner
from rematerialize.solve.exact import exact, solve_exact
from rematerialize.solve.retention import RetentionModel
from rematerialize.solve.step import Plan, Step, compile_step
from tests.strategies import budgets, training_graphs

cp_model = pytest.importorskip("ortools.sat.python.cp_model")


def enumerate_staged(graph: TrainingGraph, step: Step, budget: int, copies: int) -> float:
    """Return the least makespan of all staged schedules, each judged by the simulator."""
    late = any(0 <= step.producer[value] < step.forwards for value in step.held_gradients)
    stages = [*range(step.forwards, len(step.names)), *([None] if late else [])]
    best = inf
    for picked in product((False, True), repeat=step.forwards * (len(stages) + 1)):
        counts = [sum(picked[op :: step.forwards]) for op in range(step.forwards)]
        time_s = sum(t * n for t, n in zip(step.time_s, [*counts, *[1] * len(step.names)], strict=False))
        if time_s >= best or any(n - picked[op] > copies - 1 for op, n in enumerate(counts)):
            continue
        forward = [step.names[op] for op in range(step.forwards) if picked[op]]
        backward: list[str] = []
        for stage, last in enumerate(stages, 1):
            chosen = picked[stage * step.forwards : (stage + 1) * step.forwards]
            backward += [step.names[op] for op in range(step.forwards) if chosen[op]]
            backward += [] if last is None else [step.names[last]]
        try:
            if simulate(graph, forward, backward).peak_bytes <= budget:
                best = time_s
        except ScheduleError:
            continue
    return best


@settings(max_examples=60, deadline=None)
@given(training_graphs(max_forward=3, max_backward=3))
def test_equals_enumeration_on_random_steps(graph: TrainingGraph) -> None:
    step = compile_step(graph)
    high = step.peak_bytes(step.store_all())
    for budget in budgets(high // 3, high, 5):
        found = solve_exact(step, budget)
        assert found.proven
        assert found.bound_s == enumerate_staged(graph, step, budget, 3)
        assert (found.plan is None) == (found.bound_s == inf)
        if found.plan is not None:
            names = [step.names[op] for op in found.plan.order]
            result = simulate(graph, names[: found.plan.split], names[found.plan.split :])
            assert result.peak_bytes <= budget
            assert result.time_s == found.bound_s


@settings(max_examples=20, deadline=None)
@given(training_graphs(max_forward=6, max_backward=6))
def test_a_plan_of_the_formulation_maps_onto_every_variable(graph: TrainingGraph) -> None:
    step = compile_step(graph)
    high = step.peak_bytes(step.store_all())
    for budget in (high * 3 // 4, high):
        plan = solve_exact(step, budget).plan
        if plan is not None:
            model = RetentionModel(cp_model, step, budget, 3, plan)
            model.suggest(plan)
            solver = cp_model.CpSolver()
            solver.parameters.fix_variables_to_their_hinted_value = True
            assert solver.solve(model.cp) == cp_model.OPTIMAL
            assert step.duration_s(model.plan(solver).order) == step.duration_s(plan.order)


def test_a_foreign_hint_is_used_as_far_as_it_goes() -> None:
    """Computations beyond the number of copies are dropped; the order of the backward is kept."""
    step = compile_step(graphs.chain(6))
    low = Planner(graphs.chain(6)).minimum()
    tight = Planner(graphs.chain(6)).solve(low)
    number = {name: op for op, name in enumerate(step.names)}
    hint = Plan(tuple(number[name] for name in (*tight.forward, *tight.backward)), len(tight.forward))
    order = step.store_all().order[: step.forwards] + tuple(range(step.forwards)) * 2
    for plan in (hint, Plan(order + tuple(range(step.forwards, len(step.names))), step.forwards)):
        found = solve_exact(step, step.peak_bytes(step.store_all()), copies=2, hint=plan)
        assert found.proven
        assert found.plan is not None
        assert found.plan.split == step.forwards
        assert sorted(found.plan.order) == list(step.store_all().order)
        backward = [op for op in found.plan.order if op >= step.forwards]
        assert backward == [op for op in plan.order if op >= step.forwards]


@pytest.mark.parametrize("name", ["gpt", "chain", "resnet"])
def test_never_slower_than_the_portfolio(name: str) -> None:
    graph = {"gpt": graphs.gpt(1), "chain": graphs.chain(8), "resnet": graphs.resnet((1,))}[name]
    step, planner = compile_step(graph), Planner(graph)
    high = planner.store_all().peak_bytes
    number = {name: op for op, name in enumerate(step.names)}
    for budget in (high * 4 // 5, high * 3 // 5):
        ours = planner.solve(budget)
        # In the order of the portfolio's plan: it may be faster than every plan in the graph's order.
        order = tuple(number[name] for name in (*ours.forward, *ours.backward))
        found = solve_exact(step, budget, hint=Plan(order, len(ours.forward)))
        assert found.proven
        assert found.plan is not None
        assert found.bound_s <= step.duration_s(found.plan.order) <= ours.time_s + 1e-12


def test_sizes_above_float_precision_keep_the_budget_to_the_byte() -> None:
    big = 2**61
    ops = (
        Op("f1", "forward", 1.0, (), ("a",)),
        Op("f2", "forward", 1.0, ("a",), ("b",)),
        Op("b2", "backward", 1.0, ("a", "b"), ("d",)),
        Op("b1", "backward", 1.0, ("d",), ("g",)),
    )
    graph = TrainingGraph(ops, {"a": big, "b": big + 1, "d": 3, "g": 5}, frozenset(), (), (), ("g",)).verify()
    step = compile_step(graph)
    need = 2 * big + 4
    assert step.peak_bytes(step.store_all()) == need
    assert solve_exact(step, need - 1).plan is None
    found = solve_exact(step, need + 2**20).plan
    assert found is not None
    assert step.peak_bytes(found) <= need


def step_of(*ops: Op, gradients: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> Step:
    sizes = {name: 4 for op in ops for name in (*op.inputs, *op.outputs)} | {"t": 4}
    return compile_step(TrainingGraph(ops, sizes, frozenset(), ("t",), outputs, gradients).verify())


@pytest.mark.parametrize(
    "step",
    [
        step_of(Op("b", "backward", 1.0, ("t",), ("g",)), gradients=("g",)),
        step_of(Op("f", "forward", 1.0, (), ("a",)), gradients=("a",)),
        step_of(Op("f", "forward", 0.0, (), ("a",)), outputs=("a",), gradients=("a", "t")),
        step_of(Op("f", "forward", 0.0, (), ("a",)), Op("b", "backward", 0.0, ("a",), ()), gradients=("t",)),
        step_of(),
    ],
    ids=["no forward", "no backward", "output and gradient", "zero times", "empty"],
)
def test_degenerate_steps(step: Step) -> None:
    high = step.peak_bytes(step.store_all())
    found = solve_exact(step, high)
    assert found.plan is not None
    assert (found.proven, found.bound_s) == (True, step.duration_s(found.plan.order))
    if high:
        below = solve_exact(step, high - 1)
        assert (below.plan, below.bound_s, below.proven) == (None, inf, True)


def test_the_limit_gives_the_same_answer_twice() -> None:
    step = compile_step(graphs.resnet((1, 1)))
    budget = step.peak_bytes(step.store_all()) * 3 // 5
    first, second = (solve_exact(step, budget, deterministic_time_s=0.05, workers=2) for _ in range(2))
    assert first == second
    assert not first.proven


def test_as_a_solver_it_yields_a_plan_per_level_and_skips_what_fits_nothing() -> None:
    step = compile_step(graphs.chain(5))
    high = step.peak_bytes(step.store_all())
    levels = [1, high * 3 // 4, high]
    plans: list[Plan] = list(exact(step, levels))
    assert len(plans) == 2
    assert [step.peak_bytes(plan) <= level for plan, level in zip(plans, levels[:0:-1], strict=True)] == [True, True]
