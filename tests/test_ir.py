"""The graph file: what it holds survives the round trip, what is wrong is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from rematerialize.errors import GraphError
from rematerialize.ir import TrainingGraph
from tests.strategies import training_graphs


def small() -> dict[str, Any]:
    return {
        "format": "rematerialize.graph/1",
        "storages": {"w": 8, "a": 4, "dy": 4, "dw": 8},
        "resident": ["w"],
        "tangents": ["dy"],
        "ops": [
            {"name": "f", "phase": "forward", "time_s": 1, "inputs": ["w"], "outputs": ["a"]},
            {"name": "b", "phase": "backward", "time_s": 2.5, "inputs": ["a", "dy"], "outputs": ["dw"]},
        ],
        "outputs": ["a"],
        "gradients": ["dw"],
    }


@settings(max_examples=60, deadline=None)
@given(training_graphs())
def test_json_round_trip_is_exact(graph: TrainingGraph) -> None:
    again = TrainingGraph.from_json(graph.to_json())
    assert again == graph
    assert again.content_hash() == graph.content_hash()
    assert again.dump() == graph.dump()


def test_unknown_keys_are_ignored_and_defaults_filled() -> None:
    data = small() | {"comment": "x"}
    data["ops"][0]["stride"] = 3
    op = TrainingGraph.from_json(data).ops[0]
    assert (op.transient_bytes, op.recomputable, op.target, op.source) == (0, True, "", "")


def test_hash_ignores_where_the_op_came_from_but_not_what_it_costs() -> None:
    data = small()
    plain = TrainingGraph.from_json(data).content_hash()
    data["ops"][0]["source"] = "model.py:3"
    assert TrainingGraph.from_json(data).content_hash() == plain
    data["ops"][0]["time_s"] = 1.5
    assert TrainingGraph.from_json(data).content_hash() != plain


def edit(path: str, value: Any) -> dict[str, Any]:
    data: Any = small()
    at = data
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in keys:
        at = at[key]
    at[last] = value
    return dict(data)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("format", "rematerialize.graph/9", "graph/9"),
        ("storages.a", -1, "'a'"),
        ("storages.a", True, "'a'"),
        ("storages.a", 1.5, "'a'"),
        ("storages", [], "storages"),
        ("ops", {}, "ops"),
        ("ops.0", "f", "number 0"),
        ("ops.0.name", 3, "number 0"),
        ("ops.0.name", "b", "'b'"),
        ("ops.0.time_s", float("nan"), "'f'"),
        ("ops.0.time_s", float("inf"), "'f'"),
        ("ops.0.time_s", -1.0, "'f'"),
        ("ops.0.time_s", True, "'f'"),
        ("ops.0.time_s", "1", "'f'"),
        ("ops.0.time_s", 10**400, "'f'"),
        ("ops.0.transient_bytes", True, "'f'"),
        ("ops.0.transient_bytes", -3, "'f'"),
        ("ops.0.recomputable", 1, "'f'"),
        ("ops.0.phase", "sideways", "'f'"),
        ("ops.0.phase", "backward", "'a'"),
        ("ops.0.inputs", ["zz"], "'zz'"),
        ("ops.0.inputs", "w", "'f'"),
        ("ops.0.inputs", [["w"]], "'f'"),
        ("ops.0.inputs", ["dy"], "tangent 'dy'"),
        ("ops.0.inputs", ["dw"], "backward op 'b'"),
        ("ops.0.inputs", ["a"], "'f'"),
        ("ops.0.outputs", ["a", "a"], "'a'"),
        ("ops.1.outputs", ["a"], "'a'"),
        ("ops.1.outputs", ["w"], "'w'"),
        ("ops.1.phase", "forward", "'b'"),
        ("resident", ["w", "w"], "'w'"),
        ("resident", ["zz"], "'zz'"),
        ("tangents", ["dy", "w"], "'w'"),
        ("outputs", ["dw"], "'dw'"),
        ("outputs", ["a", "a"], "'a'"),
        ("gradients", ["zz"], "'zz'"),
        ("gradients", None, "gradients"),
    ],
)
def test_every_fault_is_one_error_that_names_the_culprit(path: str, value: Any, named: str) -> None:
    with pytest.raises(GraphError) as caught:
        TrainingGraph.from_json(edit(path, value))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", sorted(small()))
def test_missing_keys_are_named(key: str) -> None:
    data = small()
    del data[key]
    with pytest.raises(GraphError, match=key):
        TrainingGraph.from_json(data)


def test_forward_after_backward_is_refused() -> None:
    data = small()
    data["storages"]["z"] = 1
    data["ops"].append({"name": "late", "phase": "forward", "time_s": 1, "inputs": [], "outputs": ["z"]})
    with pytest.raises(GraphError, match="'late'"):
        TrainingGraph.from_json(data)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", json.dumps(small())[:-20], "[" * 100_000, b"\xff\xfe"])
def test_text_that_is_not_a_graph_is_refused(text: str | bytes) -> None:
    with pytest.raises(GraphError):
        TrainingGraph.from_json(text)


def test_duplicate_json_keys_are_refused() -> None:
    text = json.dumps(small()).replace('"w": 8', '"w": 8, "w": 9')
    with pytest.raises(GraphError, match="'w'"):
        TrainingGraph.from_json(text)


def test_nan_literal_is_refused() -> None:
    text = json.dumps(small()).replace("2.5", "NaN")
    with pytest.raises(GraphError, match="'b'"):
        TrainingGraph.from_json(text)
