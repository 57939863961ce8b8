"""Legal but unpleasant steps: every answer of every solver is judged; files that are no graph are refused in a line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.solver import graphs, suite
from rematerialize.errors import BudgetError, GraphError
from rematerialize.ir import Op, TrainingGraph
from rematerialize.schedule import Schedule
from rematerialize.simulate import simulate
from rematerialize.solve import Planner, polish, solvers
from rematerialize.solve.native import available
from tests import hostile
from tests.strategies import budgets
from tests.test_cli import run_cli, the_error

FEW = polish.Effort(
    starts=2,
    first=200,
    second=600,
    squeeze=600,
    deepest=1,
    lanes=2,
    patient=200,
    rounds=3,
    idle=2,
    spliced=3,
    halfway=200,
    halvings=7,
    exchanges=1,
    stride=1,
)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the local search do all that it does, in fewer moves: what is promised doesn't depend on how many."""
    monkeypatch.setattr(polish, "effort_for", lambda ops: FEW)


def judge(graph: TrainingGraph, planner: Planner, count: int = 12) -> list[Schedule]:
    """Assert every promise at even and odd budgets from the minimum to above store-all; return the schedules."""
    full = planner.store_all()
    least, high = planner.minimum(), full.peak_bytes
    assert simulate(graph, full.forward, full.backward).peak_bytes == high
    assert least <= high
    asked = {budget + odd for budget in budgets(least, high, count) for odd in (0, 1)} | {2 * high + 1}
    found, last = [], float("inf")
    for budget in sorted(asked):
        plan = planner.solve(budget)
        verdict = simulate(graph, plan.forward, plan.backward)
        assert (verdict.peak_bytes, verdict.time_s) == (plan.peak_bytes, plan.time_s)
        assert plan.peak_bytes <= budget == plan.budget_bytes
        assert plan.minimum_bytes == least
        assert full.time_s <= plan.time_s <= last
        assert plan.gap is None or plan.gap >= 0
        assert Schedule.from_json(plan.to_json()) == plan
        last = plan.time_s
        found.append(plan)
    assert found[0].peak_bytes == least
    assert found[-1].time_s == full.time_s
    with pytest.raises(BudgetError, match=str(least)[:4000]) as caught:
        planner.solve(least - 1)
    assert caught.value.minimum_bytes == least
    return found


# Every hostile step.


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("name", hostile.SMALL)
def test_every_promise_holds_on_a_hostile_step(name: str) -> None:
    graph = hostile.SMALL[name]()
    judge(graph, Planner(graph))


@pytest.mark.parametrize("name", hostile.SMALL)
def test_every_solver_alone_keeps_its_promises_on_a_hostile_step(name: str) -> None:
    graph = hostile.SMALL[name]()
    for solver in sorted({*solvers()} - {"exact"}):
        judge(graph, Planner(graph, solver=solver), 3)


@pytest.mark.parametrize("name", hostile.SMALL)
def test_a_hostile_step_survives_its_file(name: str) -> None:
    graph = hostile.SMALL[name]()
    assert TrainingGraph.from_json(graph.to_json()) == graph


@pytest.mark.parametrize(
    "name", ["no ops", "nothing costs anything", "sizes above 2^64", "forward ops none of which is needed"]
)
def test_the_command_line_solves_a_hostile_step(name: str, tmp_path: Path) -> None:
    graph = hostile.SMALL[name]()
    (tmp_path / "graph.json").write_text(graph.to_json(), encoding="utf-8")
    budget = str(max(Planner(graph, solver="chain").minimum(), 1))
    done = run_cli("solve", "graph.json", "--budget", budget, "--solver", "chain", "-o", "s.json", cwd=tmp_path)
    assert "gap to lower bound" in done.stdout
    plan = Schedule.from_json((tmp_path / "s.json").read_bytes())
    assert simulate(graph, plan.forward, plan.backward).peak_bytes == plan.peak_bytes <= int(budget)


# What some of them are about.


@pytest.mark.usefixtures("hurried")
def test_each_output_of_an_op_is_freed_on_its_own() -> None:
    graph = hostile.multi_output()
    planner = Planner(graph)
    plan = planner.solve(planner.minimum())
    assert planner.minimum() < planner.store_all().peak_bytes
    assert simulate(graph, plan.forward, plan.backward).recomputed_ops > 0


def test_a_step_that_may_recompute_nothing_has_one_schedule() -> None:
    graph = hostile.chain(once=lambda at: True)
    planner = Planner(graph)
    assert planner.minimum() == planner.store_all().peak_bytes
    assert planner.solve(10**9).forward == planner.store_all().forward


@pytest.mark.usefixtures("hurried")
def test_what_may_not_be_recomputed_runs_once_and_the_rest_is_recomputed() -> None:
    graph = hostile.chain(once=lambda at: at % 2 == 0)
    planner = Planner(graph)
    plan = planner.solve(planner.minimum())
    once = {op.name for op in graph.ops if not op.recomputable}
    runs = [*plan.forward, *plan.backward]
    assert all(runs.count(name) == 1 for name in once)
    assert len(runs) > len(set(runs))


@pytest.mark.usefixtures("hurried")
def test_ops_that_nothing_needs_are_never_run() -> None:
    plan = Planner(hostile.unneeded()).solve(10**6)
    assert (plan.forward, plan.backward) == ((), ("b0", "b1"))


@pytest.mark.usefixtures("hurried")
@pytest.mark.skipif(not available, reason="the local search is not compiled")
def test_an_op_whose_output_the_caller_holds_is_run_again_for_its_other_one() -> None:
    graph = hostile.held_outputs()
    planner = Planner(graph)
    plan = planner.solve(planner.minimum())
    makers = {op.name for op in graph.ops if {*op.outputs} & {*graph.outputs}}
    assert makers & {*plan.backward}
    assert planner.minimum() < planner.store_all().peak_bytes


@pytest.mark.usefixtures("hurried")
def test_no_byte_is_lost_beyond_what_floats_and_machine_words_hold() -> None:
    small, huge = hostile.chain(), hostile.resized(hostile.chain(), lambda at: 8 * 2**70)
    mine, theirs = Planner(small), Planner(huge)
    assert theirs.minimum() == mine.minimum() * 2**70
    assert theirs.store_all().peak_bytes == mine.store_all().peak_bytes * 2**70
    odd = hostile.resized(hostile.chain(), lambda at: 2**62 if at % 5 == 0 else 1)
    assert any(plan.peak_bytes % 2**62 for plan in judge(odd, Planner(odd)))


def test_a_transient_above_all_else_is_the_peak_of_every_schedule() -> None:
    graph = hostile.with_transient()
    planner = Planner(graph, solver="chain")
    assert 10**6 < planner.minimum() <= planner.store_all().peak_bytes < 10**6 + 1000


# Large ones.


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("backward", [True, False])
def test_a_value_used_ten_thousand_times_is_planned(backward: bool) -> None:
    graph = hostile.fan(10_000, backward=backward)
    planner = Planner(graph, time_limit_s=4.0)
    start_s = time.perf_counter()
    for percent in (100, 97, 80, 61):
        plan = planner.solve(max(planner.store_all().peak_bytes * percent // 100, planner.minimum()))
        assert simulate(graph, plan.forward, plan.backward).peak_bytes == plan.peak_bytes <= plan.budget_bytes
    assert time.perf_counter() - start_s < 60


def test_a_chain_of_a_hundred_thousand_ops_hits_no_recursion_limit() -> None:
    graph = graphs.chain(50_000)
    assert len(graph.ops) >= 100_000
    planner = Planner(graph, solver="revolve", time_limit_s=20.0)
    least, full = planner.minimum(), planner.store_all()
    plan = planner.solve(least)
    assert simulate(graph, plan.forward, plan.backward).peak_bytes == least < full.peak_bytes // 4


def test_a_chain_far_beyond_the_recursion_limit_is_planned_by_everything() -> None:
    """12,000 ops: 100,000 are planned by ``python -m benchmarks.solver.speed``, which records it."""
    graph = graphs.chain(6_000)
    planner = Planner(graph)
    least, full = planner.minimum(), planner.store_all()
    last = float("inf")
    for budget in budgets(least, full.peak_bytes, 4):
        plan = planner.solve(budget)
        assert simulate(graph, plan.forward, plan.backward).peak_bytes <= budget
        assert plan.time_s <= last
        last = plan.time_s


# The time limit.


@pytest.mark.parametrize("limit_s", [0.0, 0.5, 2.0])
def test_a_time_limit_returns_the_best_so_far_soon_after_it(limit_s: float) -> None:
    graph = suite.synthetic()["lstm-10k"]
    planner = Planner(graph, time_limit_s=limit_s)
    full = planner.store_all()
    start_s = time.perf_counter()
    plan = planner.solve(full.peak_bytes)
    assert time.perf_counter() - start_s < limit_s + 10  # a loaded machine; alone it is well within a second
    assert plan.time_s == full.time_s
    if not limit_s:
        assert planner.minimum() == full.peak_bytes
        assert plan.gap == 0


@pytest.mark.parametrize("part", range(6))
def test_a_time_limit_that_passes_in_any_part_of_the_search_returns_a_plan(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may pass after the portfolio, before levels have plans: then the lowest of them has no number."""
    graph = graphs.chain(12)
    looks = [0]

    def late(self: Planner) -> bool:
        looks[0] += 1
        return looks[0] > 4**part

    monkeypatch.setattr(Planner, "_late", late)
    planner = Planner(graph)
    plan = planner.solve(planner.minimum())
    assert simulate(graph, plan.forward, plan.backward).peak_bytes <= planner.minimum()


def test_the_command_line_keeps_a_time_limit(tmp_path: Path) -> None:
    graph = suite.synthetic()["lstm-10k"]
    (tmp_path / "graph.json").write_text(graph.to_json(), encoding="utf-8")
    args = ("solve", "graph.json", "--budget", "100%", "-o", "s.json", "--force", "--json", "--time-limit")
    for limit in ("0", "1"):
        done = run_cli(*args, limit, cwd=tmp_path)
        answer = json.loads(done.stdout)
        assert answer["solve_s"] < float(limit) + 10
        assert (answer["overhead"], answer["gap"]) == (0.0, 0.0)
    assert "best schedule found" in " ".join(run_cli("solve", "--help", cwd=tmp_path).stdout.split())


# Files that are no graph.

Change = Callable[[dict[str, Any]], object]


def op_of(data: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(op for op in data["ops"] if op["name"] == name)
    return found


BROKEN: dict[str, tuple[Change, str]] = {
    "a cycle": (lambda d: op_of(d, "f0").update(inputs=["a2"]), "'f0'"),
    "an op that reads itself": (lambda d: op_of(d, "f1").update(inputs=["a1"]), "'f1'"),
    "an unknown input": (lambda d: op_of(d, "f1").update(inputs=["nowhere"]), "'nowhere'"),
    "an unknown output": (lambda d: op_of(d, "f1").update(outputs=["nowhere"]), "'nowhere'"),
    "an unknown gradient": (lambda d: d.update(gradients=["nowhere"]), "'nowhere'"),
    "an unknown held output": (lambda d: d.update(outputs=["nowhere"]), "'nowhere'"),
    "an unknown tangent": (lambda d: d.update(tangents=["nowhere"]), "'nowhere'"),
    "an unknown resident": (lambda d: d.update(resident=["x", "nowhere"]), "'nowhere'"),
    "a forward op that reads a tangent": (lambda d: op_of(d, "f1").update(inputs=["t"]), "'f1'"),
    "a forward op that reads a gradient": (lambda d: op_of(d, "f1").update(inputs=["d1"]), "'f1'"),
    "a gradient made by nobody": (lambda d: d["ops"].pop(), "'d0'"),
    "a held output made backward": (lambda d: d.update(outputs=["d1"]), "'d1'"),
    "a forward op after the backward": (lambda d: d["ops"].append(d["ops"].pop(0)), "'f0'"),
    "a negative size": (lambda d: d["storages"].update(a1=-1), "'a1'"),
    "a fractional size": (lambda d: d["storages"].update(a1=1.5), "'a1'"),
    "a size in words": (lambda d: d["storages"].update(a1="8 MiB"), "'a1'"),
    "a size of null": (lambda d: d["storages"].update(a1=None), "'a1'"),
    "a size of true": (lambda d: d["storages"].update(a1=True), "'a1'"),
    "a size of NaN": (lambda d: d["storages"].update(a1=float("nan")), "'a1'"),
    "an infinite size": (lambda d: d["storages"].update(a1=float("inf")), "'a1'"),
    "a negative time": (lambda d: op_of(d, "f1").update(time_s=-1.0), "'f1'"),
    "a time of NaN": (lambda d: op_of(d, "f1").update(time_s=float("nan")), "'f1'"),
    "an infinite time": (lambda d: op_of(d, "f1").update(time_s=float("inf")), "'f1'"),
    "a time in words": (lambda d: op_of(d, "f1").update(time_s="fast"), "'f1'"),
    "a time of null": (lambda d: op_of(d, "f1").update(time_s=None), "'f1'"),
    "a whole time beyond all floats": (lambda d: op_of(d, "f1").update(time_s=10**400), "'f1'"),
    "times that add up to infinity": (lambda d: [op.update(time_s=1e308) for op in d["ops"]], "'f0'"),
    "a negative transient": (lambda d: op_of(d, "f1").update(transient_bytes=-8), "'f1'"),
    "a transient in words": (lambda d: op_of(d, "f1").update(transient_bytes="8"), "'f1'"),
    "recomputable in words": (lambda d: op_of(d, "f1").update(recomputable="no"), "'f1'"),
    "an unknown phase": (lambda d: op_of(d, "f1").update(phase="sideways"), "'f1'"),
    "a phase that is a list": (lambda d: op_of(d, "f1").update(phase=["forward"]), "'f1'"),
    "inputs that are a string": (lambda d: op_of(d, "f1").update(inputs="a0"), "'f1'"),
    "inputs that are numbers": (lambda d: op_of(d, "f1").update(inputs=[0]), "'f1'"),
    "two ops of one name": (lambda d: op_of(d, "f1").update(name="f0"), "'f0'"),
    "a name that is a number": (lambda d: op_of(d, "f1").update(name=1), "number 1"),
    "no name": (lambda d: op_of(d, "f1").pop("name"), "number 1"),
    "an op that is a list": (lambda d: d["ops"].insert(1, []), "number 1"),
    "ops that are an object": (lambda d: d.update(ops={}), "ops"),
    "storages that are a list": (lambda d: d.update(storages=[]), "storages"),
    "storages of null": (lambda d: d.update(storages=None), "storages"),
    "one storage made twice": (lambda d: op_of(d, "f1").update(outputs=["a0"]), "'a0'"),
    "one output twice in one op": (lambda d: op_of(d, "f1").update(outputs=["a1", "a1"]), "'a1'"),
    "a resident twice": (lambda d: d.update(resident=["x", "x"]), "'x'"),
    "a tangent that is resident": (lambda d: d.update(resident=["x", "t"]), "'t'"),
    "an op that writes a resident": (lambda d: op_of(d, "f1").update(outputs=["a1", "x"]), "'x'"),
    "an op that writes a tangent": (lambda d: op_of(d, "f1").update(outputs=["a1", "t"]), "'t'"),
    **{
        f"without {key}": (lambda d, key=key: d.pop(key), f"'{key}'")  # type: ignore[misc]
        for key in ("storages", "resident", "tangents", "ops", "outputs", "gradients")
    },
    **{
        f"an op without {key}": (lambda d, key=key: op_of(d, "f1").pop(key), "'f1'")  # type: ignore[misc]
        for key in ("phase", "time_s", "inputs", "outputs")
    },
}
GOOD = hostile.chain(3).to_json()
NO_GRAPHS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a JSON file"),
    "spaces": (b" \n\t", "not a JSON file"),
    "truncated": (GOOD[: len(GOOD) * 2 // 3].encode(), "not a JSON file"),
    "two of them": ((GOOD + GOOD).encode(), "not a JSON file"),
    "not UTF-8": (GOOD.replace("f1", "\xff").encode("latin-1"), "not a JSON file"),
    "UTF-16 without a mark": (GOOD.encode("utf-16-be")[1:], "not a JSON file"),
    "zeros": (b"\0" * 64, "not a JSON file"),
    "nested lists": (b"[" * 100_000 + b"]" * 100_000, "not a JSON file"),
    "nested objects": (b'{"a":' * 100_000, "not a JSON file"),
    "a list": (b"[]", "one object"),
    "null": (b"null", "one object"),
    "a huge time": (GOOD.replace('"time_s": 1.0', '"time_s": 1e999', 1).encode(), "'f0'"),
    "a huge size": (GOOD.replace('"a1": 8', '"a1": 1e999', 1).encode(), "'a1'"),
    "a size of too many digits": (GOOD.replace('"a1": 8', f'"a1": {"9" * 5000}', 1).encode(), "digits"),
    "one storage twice": (GOOD.replace('"a1": 8', '"a1": 8, "a1": 9', 1).encode(), "'a1'"),
    "one key twice": (GOOD.replace('"outputs": []', '"outputs": [], "outputs": []', 1).encode(), "'outputs'"),
}


def broken(name: str) -> tuple[bytes, str]:
    if name in NO_GRAPHS:
        return NO_GRAPHS[name]
    change, culprit = BROKEN[name]
    data = json.loads(GOOD)
    change(data)
    return json.dumps(data).encode(), culprit


@pytest.mark.parametrize("name", [*BROKEN, *NO_GRAPHS])
def test_a_malformed_file_is_one_error_that_names_the_culprit(name: str) -> None:
    content, culprit = broken(name)
    with pytest.raises(GraphError) as caught:
        TrainingGraph.from_json(content)
    message = str(caught.value)
    assert culprit in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "name",
    [
        "a cycle",
        "a forward op that reads a tangent",
        "a huge time",
        "an infinite size",
        "truncated",
        "not UTF-8",
        "nested objects",
        "one storage twice",
    ],
)
def test_the_command_line_refuses_a_malformed_file_in_one_line(name: str, tmp_path: Path) -> None:
    content, culprit = broken(name)
    (tmp_path / "graph.json").write_bytes(content)
    done = run_cli("solve", "graph.json", "--budget", "1GiB", cwd=tmp_path, code=2)
    assert culprit in the_error(done)
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_directory_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "graph.json").mkdir()
    done = run_cli("solve", "graph.json", "--budget", "1GiB", cwd=tmp_path, code=2)
    assert "graph.json" in the_error(done)


def test_names_with_line_breaks_and_quotes_stay_in_one_line(tmp_path: Path) -> None:
    content = GOOD.replace('"a1"', '"a\\n\\"1\\u2028"').replace("8,", "8.5,")
    (tmp_path / "graph.json").write_text(content, encoding="utf-8")
    done = run_cli("solve", "graph.json", "--budget", "1GiB", cwd=tmp_path, code=2)
    assert len(done.stderr.splitlines()) == 1


def test_an_op_of_the_wrong_kind_in_python_is_refused_as_well() -> None:
    with pytest.raises(GraphError, match="'f'"):
        hostile.step([Op("f", "forward", float("nan"), (), ("a",))])
