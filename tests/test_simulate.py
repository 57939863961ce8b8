"""The judge, on figures counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from rematerialize.errors import ScheduleError
from rematerialize.ir import Op, TrainingGraph
from rematerialize.simulate import simulate
from rematerialize.solve.step import Plan, compile_step
from tests.strategies import training_graphs


def graph(**changes: object) -> TrainingGraph:
    """w -> a (10) -> b (20) -> c (output, 1); db reads b, da reads a."""
    fields: dict[str, object] = {
        "ops": (
            Op("f1", "forward", 1.0, ("w",), ("a",)),
            Op("f2", "forward", 2.0, ("a",), ("b",), 5),
            Op("f3", "forward", 4.0, ("b",), ("c",)),
            Op("b3", "backward", 8.0, ("dc", "b"), ("db",)),
            Op("b2", "backward", 16.0, ("db", "a"), ("dw",)),
        ),
        "storages": {"w": 100, "a": 10, "b": 20, "c": 1, "dc": 1, "db": 20, "dw": 100},
        "resident": frozenset({"w"}),
        "tangents": ("dc",),
        "outputs": ("c",),
        "gradients": ("dw",),
    }
    return TrainingGraph(**(fields | changes)).verify()  # type: ignore[arg-type]


def test_store_all_timeline_is_the_one_counted_by_hand() -> None:
    result = simulate(graph(), ["f1", "f2", "f3"], ["b3", "b2"])
    assert result.timeline == (10, 35, 31, 52, 131)
    assert (result.peak_bytes, result.peak_op, result.time_s) == (131, "b2", 31.0)
    assert sorted(result.live_at_peak) == ["a", "c", "db", "dw"]


def test_recomputation_makes_a_new_instance_and_the_old_one_dies_at_its_last_use() -> None:
    result = simulate(graph(), ["f1", "f2", "f3"], ["b3", "f1", "b2"])
    # a dies after f2: it is not there during f3 and b3, and again from the second f1 on.
    assert result.timeline == (10, 35, 21, 42, 31, 131)
    assert result.recomputed_ops == 1
    assert result.time_s == 32.0


def test_an_instance_that_nobody_reads_lives_only_while_its_op_runs() -> None:
    result = simulate(graph(), ["f1", "f1", "f2", "f3"], ["b3", "b2"])
    assert result.timeline[:3] == (10, 10, 35)


def test_the_caller_holds_the_output_that_the_forward_made() -> None:
    result = simulate(graph(), ["f1", "f2", "f3"], ["f3", "b3", "b2"])
    assert result.timeline[3] == 10 + 20 + 1 + 1 + 1  # a, b, held c, its copy, the tangent
    assert result.timeline[4] == 52


@pytest.mark.parametrize(
    ("forward", "backward", "named"),
    [
        (["f1", "f2", "f3"], ["b3"], "b2"),
        (["f1", "f2", "f3"], ["b3", "b2", "b2"], "b2"),
        (["f1", "f2", "f3", "b3"], ["b2"], "b3"),
        (["f2", "f1", "f3"], ["b3", "b2"], "'a'"),
        (["f1", "f2"], ["f3", "b3", "b2"], "'c'"),
        (["f1", "f2", "f3"], ["b2", "b3"], "'db'"),
        (["f1", "f2", "f3", "nope"], ["b3", "b2"], "nope"),
        ([], [], "b3"),
    ],
)
def test_invalid_schedules_are_refused(forward: list[str], backward: list[str], named: str) -> None:
    with pytest.raises(ScheduleError, match=named):
        simulate(graph(), forward, backward)


@pytest.mark.parametrize("backward", [["b3", "f1", "b2"], ["b3", "b2"]])
def test_ops_that_run_once_are_not_recomputed(backward: list[str]) -> None:
    once = tuple(
        Op(o.name, o.phase, o.time_s, o.inputs, o.outputs, o.transient_bytes, o.name != "f1") for o in graph().ops
    )
    forward = ["f1", "f2", "f3"] if len(backward) == 3 else ["f1", "f1", "f2", "f3"]
    with pytest.raises(ScheduleError, match="f1"):
        simulate(graph(ops=once), forward, backward)


@settings(max_examples=150, deadline=None)
@given(training_graphs())
def test_the_solvers_memory_model_agrees_with_the_judge(graph: TrainingGraph) -> None:
    step = compile_step(graph)
    recomputable = [op for op in range(step.forwards) if step.recomputable[op]]
    split = step.forwards
    order = [*range(split), *recomputable, *range(split, len(step.names))]
    names = [step.names[op] for op in order]
    result = simulate(graph, names[:split], names[split:])
    assert list(result.timeline) == step.timeline(Plan(tuple(order), split))
