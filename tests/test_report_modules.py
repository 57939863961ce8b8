"""The table per module: its figures by hand, and that they always add up to the step's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from rematerialize.ir import TrainingGraph
from rematerialize.report.modules import ModuleRow, module_rows, module_tree, rows_at_most, top_tensors
from rematerialize.report.timeline import Timeline, of_schedule, store_all
from tests.reports import a_schedule, a_step
from tests.strategies import training_graphs


@pytest.fixture
def planned() -> Timeline:
    graph = a_step()
    return of_schedule(graph, a_schedule(graph))


def test_each_module_has_its_times_and_bytes(planned: Timeline) -> None:
    assert module_rows(planned) == (
        ModuleRow("net.layers.0", forward_s=1.0, backward_s=2.0, recompute_s=3.0, peak_bytes=2500),
        ModuleRow("net.layers.1", forward_s=1.0, backward_s=2.0, recompute_s=2.0, peak_bytes=1000),
        ModuleRow("net.layers.2", forward_s=1.0, backward_s=2.0, recompute_s=1.0),
        ModuleRow("net.layers.3", forward_s=1.0, backward_s=2.0, stored_bytes=1000, peak_bytes=1000),
    )


def test_store_all_keeps_every_layer_and_recomputes_none() -> None:
    rows = module_rows(store_all(a_step()))
    assert [row.stored_bytes for row in rows] == [1000] * 4 + [0]
    assert [row.recompute_s for row in rows] == [0] * 5
    assert [row.title for row in rows][-1] == "(model)"  # whom the tangent at the peak belongs to


def test_a_depth_merges_what_is_below_it(planned: Timeline) -> None:
    (row,) = module_rows(planned, depth=2)
    assert row == ModuleRow("net.layers", 4.0, 8.0, 6.0, 1000, 4500)
    assert row.time_s == planned.time_s
    assert [row.title for row in module_rows(planned, depth=0)] == ["(model)"]


def test_many_layers_become_few_rows() -> None:
    timeline = store_all(a_step(24, "decoder.layers"))
    assert len(rows_at_most(timeline, 30)) == 25
    assert [row.title for row in rows_at_most(timeline, 20)] == ["decoder.layers", "(model)"]


def test_the_tree_has_every_module_under_its_parent_with_totals(planned: Timeline) -> None:
    tree = module_tree(planned)
    assert [(node.total.title, node.depth, node.parent, node.has_children) for node in tree] == [
        ("(model)", 0, -1, True),
        ("net", 1, 0, True),
        ("net.layers", 2, 1, True),
        *((f"net.layers.{at}", 3, 2, False) for at in range(4)),
    ]
    assert tree[0].total.time_s == planned.time_s
    assert tree[2].total.peak_bytes == planned.peak_bytes


def test_top_tensors_are_the_largest_with_the_op_that_made_them(planned: Timeline) -> None:
    found = top_tensors(planned, planned.peak_position)
    assert sum(one.size_bytes for one in found) == 4000
    first = next(one for one in found if one.op == "f0")
    assert (first.label, first.module, first.source) == (
        "net.layers.0 output float32[250]",
        "net.layers.0",
        "model.py:10",
    )
    assert len(top_tensors(planned, planned.peak_position, 2)) == 2
    tangent = next(one for one in top_tensors(planned, planned.boundary) if one.label == "dy")
    assert (tangent.op, tangent.module) == ("", "")


@settings(max_examples=60, deadline=None)
@given(training_graphs())
def test_the_rows_add_up_to_the_step(graph: TrainingGraph) -> None:
    timeline = store_all(graph)
    stored = sum(graph.storages[i.storage] for i in timeline.instances if i.birth < timeline.boundary <= i.death)
    for rows in (module_rows(timeline), module_rows(timeline, depth=0), (module_tree(timeline)[0].total,)):
        assert sum(row.time_s for row in rows) == pytest.approx(timeline.time_s)
        assert sum(row.peak_bytes for row in rows) == timeline.peak_bytes
        assert sum(row.stored_bytes for row in rows) == stored
