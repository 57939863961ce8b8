"""Every registered solver on every kind of graph, replayed by the judge; the planner's promises."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.solver import graphs
from rematerialize.errors import BudgetError
from rematerialize.ir import Op, TrainingGraph
from rematerialize.simulate import simulate
from rematerialize.solve import Planner, frontier, minimum, solve, solvers, store_all
from rematerialize.solve.native import FlatStep, Workbench
from rematerialize.solve.step import Plan, Step, compile_step
from tests.strategies import budgets, chains, training_graphs

SMALL = {
    "gpt": lambda: graphs.gpt(1),
    "unet": lambda: graphs.unet(2),
    "resnet": lambda: graphs.resnet((1, 1)),
    "densenet": lambda: graphs.densenet((2, 3)),
    "lstm": lambda: graphs.lstm(6),
    "towers": lambda: graphs.towers(3, 4),
    "chain": lambda: graphs.chain(12),
    "uneven": lambda: graphs.chain(10, uneven=True),
}


def check(graph: TrainingGraph, planner: Planner) -> None:
    """Promises: valid, within budget, as reported, monotone, exact at the minimum."""
    full = planner.store_all()
    least = planner.minimum()
    last = float("inf")
    for budget in budgets(least, max(full.peak_bytes, least)):
        plan = planner.solve(budget)
        result = simulate(graph, plan.forward, plan.backward)
        assert (result.peak_bytes, result.time_s) == (plan.peak_bytes, plan.time_s)
        assert plan.peak_bytes <= budget == plan.budget_bytes
        assert plan.minimum_bytes == least
        assert plan.time_s <= last
        last = plan.time_s
    with pytest.raises(BudgetError) as caught:
        planner.solve(least - 1)
    assert caught.value.minimum_bytes == least


FAST = sorted(set(solvers()) - {"exact"})  # which has tests of its own


@pytest.mark.parametrize("solver", ["auto", *FAST])
@pytest.mark.parametrize("name", SMALL)
def test_every_solver_keeps_the_promises(solver: str, name: str) -> None:
    graph = SMALL[name]()
    check(graph, Planner(graph, solver=solver))


@settings(max_examples=60, deadline=None)
@given(training_graphs())
def test_promises_hold_on_random_steps(graph: TrainingGraph) -> None:
    check(graph, Planner(graph))


@pytest.mark.parametrize("solver", sorted({*FAST} - {"store_all"}))
@settings(max_examples=20, deadline=None)
@given(graph=training_graphs())
def test_each_solver_is_valid_on_random_steps(solver: str, graph: TrainingGraph) -> None:
    check(graph, Planner(graph, solver=solver))


def test_store_all_runs_everything_needed_once_and_nothing_else() -> None:
    graph = TrainingGraph(
        (
            Op("f", "forward", 1.0, (), ("a",)),
            Op("dead", "forward", 9.0, ("a",), ("z",)),
            Op("b", "backward", 1.0, ("a",), ("g",)),
        ),
        {"a": 1, "z": 1, "g": 1},
        frozenset(),
        (),
        (),
        ("g",),
    ).verify()
    plan = store_all(graph)
    assert (plan.forward, plan.backward, plan.time_s) == (("f",), ("b",), 2.0)


def test_functions_agree_with_the_planner() -> None:
    graph = graphs.chain(8)
    least = minimum(graph)
    assert solve(graph, least) == Planner(graph).solve(least)
    front = frontier(graph, 6)
    assert front[0].peak_bytes == store_all(graph).peak_bytes
    assert front[-1].peak_bytes == least
    times = [plan.time_s for plan in front]
    assert times == sorted(times)


def test_a_search_that_began_with_storing_everything_is_not_named_after_it() -> None:
    front = frontier(graphs.lstm(4), 6)
    assert {"store_all", "search"} <= {plan.solver for plan in front}
    for plan in front:
        order = (*plan.forward, *plan.backward)
        if plan.solver in {"store_all", "search"}:
            assert (plan.solver == "search") == (len(order) > len({*order}))


def test_a_callable_is_a_solver() -> None:
    def once_more(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
        yield step.store_all()

    graph = graphs.chain(4)
    plan = solve(graph, 10**9, solver=once_more)
    assert plan.peak_bytes == store_all(graph).peak_bytes


def test_unknown_solver_is_named() -> None:
    with pytest.raises(ValueError, match="nope"):
        solve(graphs.chain(3), 1, solver="nope")


def relabel(graph: TrainingGraph) -> TrainingGraph:
    """Give every op and storage another name, in reverse alphabetical order."""
    new = {name: f"s{len(graph.storages) - k:04d}" for k, name in enumerate(graph.storages)}
    ops = tuple(
        Op(
            f"o{len(graph.ops) - k:04d}",
            op.phase,
            op.time_s,
            tuple(new[n] for n in op.inputs),
            tuple(new[n] for n in op.outputs),
            op.transient_bytes,
            op.recomputable,
        )
        for k, op in enumerate(graph.ops)
    )
    return TrainingGraph(
        ops,
        {new[name]: size for name, size in graph.storages.items()},
        frozenset(new[n] for n in graph.resident),
        tuple(new[n] for n in graph.tangents),
        tuple(new[n] for n in graph.outputs),
        tuple(new[n] for n in graph.gradients),
    ).verify()


def test_names_do_not_matter() -> None:
    graph = SMALL["gpt"]()
    plain, other = Planner(graph), Planner(relabel(graph))
    for budget in budgets(plain.minimum(), plain.store_all().peak_bytes):
        a, b = plain.solve(budget), other.solve(budget)
        assert (a.peak_bytes, a.time_s, len(a.backward)) == (b.peak_bytes, b.time_s, len(b.backward))


@pytest.mark.slow  # test_determinism compares processes at every run
def test_plans_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "from benchmarks.solver import graphs; from rematerialize.solve import Planner;"
        "p = Planner(graphs.resnet((1, 1))); low = p.minimum(); high = p.store_all().peak_bytes;"
        "print([p.solve((low * k + high * (4 - k)) // 4).to_json() for k in range(5)])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def per_block(graph: TrainingGraph, block: int) -> tuple[int, float]:
    """Peak and time of hand-placed checkpointing on `graphs.chain`: keep every block-th value."""
    forward = [op.name for op in graph.ops if op.phase == "forward"]
    backward = [op for op in graph.ops if op.phase == "backward"]
    order: list[str] = []
    done: set[int] = {len(forward) // block} if len(forward) % block else set()
    for op in backward:
        for read in op.inputs:
            if read.startswith("op"):
                index = int(read[2:])
                if index // block not in done and index % block != block - 1:
                    done.add(index // block)
                    start = index // block * block
                    order += forward[start : min(start + block - 1, len(forward))]
        order.append(op.name)
    result = simulate(graph, forward, order)
    return result.peak_bytes, result.time_s


def test_never_slower_than_hand_placed_blocks_at_their_peak() -> None:
    graph = graphs.chain(30)
    planner = Planner(graph)
    for block in (2, 3, 5, 7):
        peak, time_s = per_block(graph, block)
        assert peak < store_all(graph).peak_bytes
        assert planner.solve(peak).time_s <= time_s


def brute_force(graph: TrainingGraph, budget: int, most: int) -> float:
    """Return the least makespan over every order with up to ``most`` recomputations (inf if none)."""
    forward = [op.name for op in graph.ops if op.phase == "forward"]
    backward = [op.name for op in graph.ops if op.phase == "backward"]
    best = float("inf")
    costs = {op.name: op.time_s for op in graph.ops}
    ready = {op.name: op.inputs for op in graph.ops}
    made = {op.name: op.outputs for op in graph.ops}

    def extend(done: list[str], index: int, live: frozenset[str], time_s: float, left: int) -> None:
        nonlocal best
        if time_s >= best:
            return
        if index == len(backward):
            if simulate(graph, forward, done).peak_bytes <= budget:
                best = time_s
            return
        extend([*done, backward[index]], index + 1, live, time_s + costs[backward[index]], left)
        if left:
            for name in forward:
                if set(ready[name]) <= live | graph.resident:
                    extend([*done, name], index, live | set(made[name]), time_s + costs[name], left - 1)

    everything = frozenset(s for name in forward for s in made[name])
    extend([], 0, everything, sum(costs[name] for name in forward), most)
    return best


@settings(max_examples=12, deadline=None)
@given(chains(max_length=4))
def test_equals_brute_force_on_small_chains(graph: TrainingGraph) -> None:
    planner = Planner(graph)
    low, high = planner.minimum(), planner.store_all().peak_bytes
    for budget in budgets(low, high, 4):
        assert planner.solve(budget).time_s <= brute_force(graph, budget, 4)


def test_a_long_chain_does_not_hit_the_recursion_limit() -> None:
    graph = graphs.chain(1200)
    planner = Planner(graph, solver="descent")
    assert planner.minimum() < planner.store_all().peak_bytes


def test_solve_never_imports_torch() -> None:
    code = "import sys, rematerialize.solve; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workbench_memory_is_exact_where_the_backward_reads_an_output() -> None:
    """An output's instance lives to the end although its last reader comes earlier."""
    ops = (
        Op("f1", "forward", 1.0, ("x",), ("a",)),
        Op("f2", "forward", 1.0, ("a",), ("loss",)),
        Op("b2", "backward", 1.0, ("t", "loss", "a"), ("da",)),
        Op("b1", "backward", 1.0, ("da", "a"), ("dx",)),
    )
    sizes = {"x": 8, "a": 100, "loss": 1000, "t": 1000, "da": 100, "dx": 10}
    graph = TrainingGraph(ops, sizes, frozenset({"x"}), ("t",), ("loss",), ("dx",))
    step = compile_step(graph)
    again = Plan((0, 1, 0, 1, 2, 3), 2)  # both forward ops run again in the backward
    bench = Workbench(FlatStep(step), 8)
    assert bench.load(again)
    assert bench.peak_bytes() == step.peak_bytes(again)
    bench.spend(10**9)
    plan = bench.plan()
    assert (bench.peak_bytes(), bench.time_s) == (step.peak_bytes(plan), step.duration_s(plan.order))
    assert len(plan.order) == 4


@settings(max_examples=100, deadline=None)
@given(training_graphs(), st.integers(1, 10**6))
def test_bench_memory_and_time_are_those_of_its_plan_after_any_search(graph: TrainingGraph, seed: int) -> None:
    step = compile_step(graph)
    bench = Workbench(FlatStep(step), 60)
    assert bench.load(step.store_all())
    full = bench.peak_bytes()
    assert full == step.peak_bytes(step.store_all())
    for share in (0.9, 0.7, 0.5):
        bench.descend(int(full * share), noise=0.5, stretch=0.0)
        bench.improve(bench.peak_bytes(), 200, seed=seed)
        plan = bench.plan()
        result = simulate(graph, *names(step, plan))
        assert result.peak_bytes == bench.peak_bytes()
        assert result.time_s == pytest.approx(bench.time_s)


def names(step: Step, plan: Plan) -> tuple[list[str], list[str]]:
    order = [step.names[op] for op in plan.order]
    return order[: plan.split], order[plan.split :]


def test_without_the_compiled_kernel_plans_are_valid_still(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("native", "planner", "sweep", "descent", "join", "rotor"):
        found = importlib.import_module(f"rematerialize.solve.{module}")
        for name, value in (("available", False), ("_library", None)):
            if hasattr(found, name):
                monkeypatch.setattr(found, name, value)
    graph = SMALL["unet"]()
    planner = Planner(graph)
    check(graph, planner)
    assert planner.minimum() < planner.store_all().peak_bytes // 2


@pytest.mark.skipif(not importlib.import_module("rematerialize.solve.native").available, reason="not compiled")
def test_a_kernel_of_another_version_is_left_alone_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    native = importlib.import_module("rematerialize.solve.native")

    def declare(library: object) -> None:
        raise AttributeError("undefined symbol: shift")

    monkeypatch.setattr(native, "_declare", declare)
    with pytest.warns(RuntimeWarning, match="install the package again"):
        assert native._load() is None
