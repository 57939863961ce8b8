"""``plan.explain()``: what is stored, what is recomputed how often, and why."""

from __future__ import annotations

import json
from dataclasses import replace

from rematerialize.report.explain import Explanation, explain
from rematerialize.report.sparkline import sparkline
from rematerialize.report.timeline import of_schedule, replay, store_all
from tests.reports import a_schedule, a_step


def explained(depth: int = 3) -> Explanation:
    graph = a_step()
    return explain(of_schedule(graph, a_schedule(graph)), depth)


def test_every_forward_op_has_a_decision_and_its_runs() -> None:
    runs = {row.name: row.runs for row in explained().ops}
    assert runs == {"f0": 4, "f1": 3, "f2": 2, "f3": 1}
    assert {row.name: row.decision for row in explained().ops} == {
        "f0": "recomputed",
        "f1": "recomputed",
        "f2": "recomputed",
        "f3": "stored",
    }


def test_extra_time_is_that_of_the_runs_after_the_first() -> None:
    found = explained()
    assert {row.name: row.extra_s for row in found.ops} == {"f0": 3.0, "f1": 2.0, "f2": 1.0, "f3": 0.0}
    assert sum(row.extra_s for row in found.modules) == 6.0


def test_with_everything_stored_nothing_is_recomputed_and_all_that_crosses_is_counted() -> None:
    found = explain(store_all(a_step()))
    assert {row.decision for row in found.ops} == {"stored"}
    assert sum(row.stored_bytes for row in found.modules) == 4000
    assert all(row.recomputed_ops == 0 and row.most_runs == 1 for row in found.modules)


def test_reasons_name_the_price() -> None:
    why = {row.name: row.why for row in explained().ops}
    assert why["f3"] == "an output: the caller holds it"
    assert "3 times more" in why["f0"]
    assert "free" in why["f0"]
    assert "would cost" in {row.name: row.why for row in explain(store_all(a_step())).ops}["f0"]


def test_an_op_that_may_not_run_twice_says_so() -> None:
    graph = a_step()
    once = replace(graph, ops=(replace(graph.ops[0], recomputable=False), *graph.ops[1:]))
    assert "can't run twice" in explain(store_all(once)).ops[0].why


def test_modules_are_told_apart_to_the_depth_asked_for() -> None:
    assert [row.module for row in explained(1).modules] == ["net"]
    assert [row.module for row in explained(3).modules] == [f"net.layers.{at}" for at in range(4)]


def test_the_table_and_the_dictionary_hold_the_same() -> None:
    found = explained()
    data = json.loads(json.dumps(found.to_dict()))
    assert [row["module"] for row in data["modules"]] == [row.module for row in found.modules]
    assert all(row.module in str(found) for row in found.modules)


def test_a_step_without_ops_is_explained() -> None:
    graph = replace(a_step(), ops=(), outputs=(), gradients=(), tangents=())
    assert explain(replay(graph, (), ())).ops == ()


def test_a_sparkline_keeps_the_largest_of_each_share() -> None:
    assert sparkline([0] * 99 + [8], 10).count("█") == 1
    assert sparkline([], 10) == ""
    assert sparkline([0, 0], 10) == "  "
    assert len(sparkline(list(range(1000)), 60)) == 60
