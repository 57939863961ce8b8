"""The files for other tools: their rules, and that they hold the step exactly."""

from __future__ import annotations

import csv
import io
import itertools
import json
import pickle
import pickletools
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings

from rematerialize.ir import TrainingGraph
from rematerialize.report.lanes import held_to_the_end
from rematerialize.report.memory_viz import memory_snapshot, snapshot
from rematerialize.report.perfetto import chrome_trace
from rematerialize.report.table_csv import COLUMNS, executions_csv
from rematerialize.report.timeline import Timeline, of_schedule, store_all
from tests.reports import a_long_step, a_schedule, a_step
from tests.strategies import training_graphs

# What the viewer's own unpickler knows, of the opcodes that Python writes for dicts, lists, texts and numbers.
VIEWER_OPCODES = {
    *("APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINUNICODE", "EMPTY_DICT"),
    *("EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LONG1", "LONG_BINGET", "MARK", "MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE"),
    *("PROTO", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}


def planned() -> Timeline:
    graph = a_step()
    return of_schedule(graph, a_schedule(graph))


def trace_of(plan: Timeline) -> list[dict[str, Any]]:
    text = chrome_trace(plan, store_all(plan.graph), budget_bytes=4600)
    events = json.loads(text)["traceEvents"]
    assert isinstance(events, list)
    return events


def test_the_trace_has_a_slice_for_each_execution_in_its_track() -> None:
    plan = planned()
    slices = [event for event in trace_of(plan) if event["ph"] == "X" and event["pid"] == 1]
    by_time = sorted(slices, key=lambda event: event["ts"])
    assert [event["name"] for event in by_time] == [run.op.name for run in plan.executions]
    assert [event["tid"] for event in by_time] == [2 if run.recomputes else 1 for run in plan.executions]
    assert by_time[-1] == {
        "ph": "X",
        "pid": 1,
        "tid": 1,
        "cat": "backward",
        "name": "b0",
        "ts": 16e6 + 1,
        "dur": 2e6,
        "args": {
            "module": "net.layers.0",
            "source": "model.py:10",
            "target": "aten.relu_backward",
            "phase": "backward",
            "run": 0,
            "made_bytes": 1000,
            "workspace_bytes": 500,
            "live_bytes": 4500,
        },
    }


def test_the_traces_counters_are_the_memory_of_plan_and_store_all() -> None:
    plan = planned()
    counters = defaultdict(list)
    for event in trace_of(plan):
        if event["ph"] == "C":
            counters[event["name"]].append(event["args"]["bytes"])
    assert set(counters) == {"memory: plan", "memory: store-all", "budget"}
    assert max(counters["memory: plan"]) == plan.peak_bytes
    assert counters["memory: plan"][-1] == 2000  # what the forward returned, and the gradient
    assert max(counters["memory: store-all"]) == store_all(plan.graph).peak_bytes
    assert counters["budget"] == [4600, 4600]


def test_the_trace_leaves_its_unit_to_the_format() -> None:
    document = json.loads(chrome_trace(planned(), store_all(a_step()), budget_bytes=4600))
    assert set(document) == {"traceEvents", "otherData"}  # by "displayTimeUnit" an old viewer shows seconds


@settings(max_examples=60, deadline=None)
@given(training_graphs())
def test_traces_obey_the_formats_rules(graph: TrainingGraph) -> None:
    events = trace_of(store_all(graph))
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    assert min(times, default=1) > 0  # Perfetto takes what a counter says at time 0 for nothing
    ends: dict[tuple[int, int], float] = {}
    for event in events:
        assert {"ph", "pid", "name"} <= set(event)
        assert event["ph"] in "MXCi"
        if event["ph"] == "X":
            track = (event["pid"], event["tid"])
            assert event["ts"] >= ends.get(track, 0.0) - 1e-6  # slices of a track follow one another
            assert event["dur"] >= 0
            ends[track] = event["ts"] + event["dur"]


def test_torchs_own_tools_read_the_snapshot() -> None:
    viz = pytest.importorskip("torch.cuda._memory_viz")
    data = pickle.loads(memory_snapshot(planned()))
    text = viz.trace(data)
    assert "1000.0B" in text or "1000" in text
    assert "raise OutOfMemoryError" not in text
    assert "segments: 1" in viz.segsum(data)
    assert "snapshot.pickle" in viz.trace_plot(data)
    assert "snapshot.pickle" in viz.segment_plot(data)


def test_the_viewers_unpickler_knows_every_opcode() -> None:
    for graph in (a_step(), a_long_step(2000)):
        names = {opcode.name for opcode, _, _ in pickletools.genops(memory_snapshot(store_all(graph)))}
        assert names <= VIEWER_OPCODES


def test_the_first_allocation_says_what_made_it_and_where() -> None:
    segment, first, *_ = snapshot(planned())["device_traces"][0]
    assert segment["action"] == "segment_alloc"
    assert [frame["name"] for frame in segment["frames"]] == ["all that the step allocates, as planned"]
    assert [f"{frame['filename']}:{frame['line']}:{frame['name']}" for frame in first["frames"]] == [
        "model.py:10:net.layers.0 output float32[250]",
        "model.py:10:f0 aten.relu.default",
        "model.py:10:module net.layers.0",
    ]
    assert (first["action"], first["size"], first["stream"]) == ("alloc", 1000, 0)
    assert first["category"] == "freed, recomputed later"


def test_what_is_left_at_the_end_stands_in_the_segments_blocks() -> None:
    plan = planned()
    (segment,) = snapshot(plan)["segments"]
    left = [block for block in segment["blocks"] if block["state"] == "active_allocated"]
    assert [block["requested_size"] for block in left] == [1000, 1000]
    assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
    assert segment["allocated_size"] == sum(block["size"] for block in left)


@settings(max_examples=80, deadline=None)
@given(training_graphs())
def test_allocations_never_overlap_and_peak_where_the_simulator_says(graph: TrainingGraph) -> None:
    timeline = store_all(graph)
    check_snapshot(timeline)


def test_a_plan_with_recomputation_is_a_sound_snapshot_too() -> None:
    for layers in (1, 2, 9):
        graph = a_step(layers)
        check_snapshot(of_schedule(graph, a_schedule(graph)))


def check_snapshot(timeline: Timeline) -> None:
    data = snapshot(timeline)
    live: dict[int, int] = {}
    peak = 0
    events = data["device_traces"][0] if data["device_traces"] else []
    for event in events:
        if event["action"] == "alloc":
            begin, end = event["addr"], event["addr"] + event["size"]
            assert all(end <= other or other + size <= begin for other, size in live.items())
            live[begin] = event["size"]
        elif event["action"] == "free_completed":
            assert live.pop(event["addr"]) == event["size"]
        peak = max(peak, sum(live.values()))
    assert peak == timeline.peak_bytes
    sizes = timeline.graph.storages
    held = [sizes[timeline.instances[index].storage] for index in held_to_the_end(timeline)]
    assert sorted(live.values()) == sorted(filter(None, held))
    blocks = [block for segment in data["segments"] for block in segment["blocks"]]
    active = {block["address"]: block["requested_size"] for block in blocks if block["state"] == "active_allocated"}
    assert active == live
    for one, other in itertools.pairwise(blocks):
        assert one["address"] + one["size"] == other["address"]


def test_each_execution_is_a_row_of_the_csv() -> None:
    plan = planned()
    header, *rows = csv.reader(io.StringIO(executions_csv(plan)))
    assert tuple(header) == COLUMNS
    assert len(rows) == len(plan.executions)
    assert dict(zip(COLUMNS, rows[-1], strict=True)) == {
        "position": "13",
        "phase": "backward",
        "op": "b0",
        "op_phase": "backward",
        "run": "0",
        "lane": "backward",
        "module": "net.layers.0",
        "source": "model.py:10",
        "target": "aten.relu_backward",
        "start_s": "16.0",
        "time_s": "2.0",
        "live_bytes": "4500",
        "made_bytes": "1000",
        "workspace_bytes": "500",
        "freed_bytes": "2000",
        "inputs": "a0 d1",
        "outputs": "d0",
    }


def test_texts_that_look_like_formulas_stay_texts() -> None:
    graph = a_step(1)
    hostile = TrainingGraph(
        tuple(type(op)(**{**_fields(op), "source": '=HYPERLINK("http://a","b"),\n'}) for op in graph.ops),
        graph.storages,
        graph.resident,
        graph.tangents,
        graph.outputs,
        graph.gradients,
    )
    rows = list(csv.reader(io.StringIO(executions_csv(store_all(hostile)))))
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert rows[1][COLUMNS.index("source")].startswith("'=HYPERLINK")


def _fields(op: Any) -> dict[str, Any]:
    return {name: getattr(op, name) for name in type(op).__slots__}


@settings(max_examples=60, deadline=None)
@given(training_graphs())
def test_the_rows_of_the_csv_balance(graph: TrainingGraph) -> None:
    timeline = store_all(graph)
    rows = list(csv.DictReader(io.StringIO(executions_csv(timeline))))
    assert max(int(row["live_bytes"]) for row in rows) == timeline.peak_bytes
    assert sum(float(row["time_s"]) for row in rows) == pytest.approx(timeline.time_s)
    made = sum(int(row["made_bytes"]) for row in rows)
    given_bytes = sum(graph.storages[i.storage] for i in timeline.instances if i.storage in graph.tangents)
    held = sum(graph.storages[timeline.instances[index].storage] for index in held_to_the_end(timeline))
    assert made + given_bytes == sum(int(row["freed_bytes"]) for row in rows) + held
