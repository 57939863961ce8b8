"""A step as a trace in Chrome's JSON format, which https://ui.perfetto.dev and chrome://tracing open.

Two processes: the plan and store-all. Each has a track with a slice per execution, and a counter with the memory that
is live meanwhile; the plan has a second track for what it recomputes. Times are predicted.
"""

from __future__ import annotations

import json
from typing import Any

from rematerialize.report.lanes import held_to_the_end, lane_of_each
from rematerialize.report.timeline import Timeline

_PLAN, _STORED = 1, 2
_MAIN, _RECOMPUTATION = 1, 2
_BEGIN_US = 1.0  # Perfetto takes the value of a counter at time 0 for none, and its viewer of 2021 stops there


def chrome_trace(plan: Timeline, stored: Timeline, *, budget_bytes: int) -> str:
    """Return the JSON text of a trace of a plan beside the same step under store-all.

    Parameters
    ----------
    plan, stored : Timeline
    budget_bytes : int
        A counter of its own, to compare with.
    """
    events = [
        *_names(_PLAN, "plan", {_MAIN: "forward and backward", _RECOMPUTATION: "recomputation"}),
        *_names(_STORED, "store-all", {_MAIN: "forward and backward"}),
        *_slices(plan, _PLAN),
        *_slices(stored, _STORED),
        *_memory(plan, _PLAN, "memory: plan"),
        *_memory(stored, _STORED, "memory: store-all"),
        *_budget(plan, budget_bytes),
        *_boundary(plan, _PLAN),
        *_boundary(stored, _STORED),
    ]
    # Metadata first, then by time; equal times keep their order, so that a slice without length stays in its place.
    events.sort(key=lambda event: (event["ph"] != "M", event.get("ts", 0.0)))
    # No "displayTimeUnit": Perfetto's viewer of 2021 reads times in it, a thousand times too long.
    summary = {"budget_bytes": budget_bytes, "peak_bytes": plan.peak_bytes}
    return json.dumps({"traceEvents": events, "otherData": summary}, separators=(",", ":"))


def _names(process: int, name: str, threads: dict[int, str]) -> list[dict[str, Any]]:
    named = [{"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}]
    for thread, title in threads.items():
        named.append({"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": title}})
    return named


def _slices(timeline: Timeline, process: int) -> list[dict[str, Any]]:
    sizes = timeline.graph.storages
    lanes = lane_of_each(timeline)
    found = []
    for run, lane in zip(timeline.executions, lanes, strict=True):
        start_us, end_us = _us(run.start_s), _us(run.start_s + run.op.time_s)
        found.append(
            {
                "ph": "X",
                "pid": process,
                "tid": _RECOMPUTATION if lane == "recomputed" else _MAIN,
                "cat": lane,
                "name": run.op.name,
                "ts": start_us,
                "dur": round(end_us - start_us, 3),
                "args": {
                    "module": run.op.module,
                    "source": run.op.source,
                    "target": run.op.target,
                    "phase": run.phase,
                    "run": run.run,
                    "made_bytes": sum(sizes[name] for name in run.op.outputs),
                    "workspace_bytes": run.op.transient_bytes,
                    "live_bytes": run.live_bytes,
                },
            }
        )
    return found


def _memory(timeline: Timeline, process: int, name: str) -> list[dict[str, Any]]:
    """A counter whose value holds until the next event: one for each execution that changes it, and what is left."""
    found: list[dict[str, Any]] = []
    before = -1
    for run in timeline.executions:
        if run.live_bytes != before:
            found.append(_counter(process, name, _us(run.start_s), run.live_bytes))
            before = run.live_bytes
    if found:
        sizes = timeline.graph.storages
        held = sum(sizes[timeline.instances[index].storage] for index in held_to_the_end(timeline))
        found.append(_counter(process, name, _us(timeline.time_s), held))
    return found


def _budget(timeline: Timeline, budget_bytes: int) -> list[dict[str, Any]]:
    return [_counter(_PLAN, "budget", at_us, budget_bytes) for at_us in (_us(0.0), _us(timeline.time_s))]


def _boundary(timeline: Timeline, process: int) -> list[dict[str, Any]]:
    if timeline.boundary >= len(timeline.executions):
        return []
    start_us = _us(timeline.executions[timeline.boundary].start_s)
    return [{"ph": "i", "s": "p", "pid": process, "tid": _MAIN, "name": "the backward begins", "ts": start_us}]


def _counter(process: int, name: str, at_us: float, value: int) -> dict[str, Any]:
    return {"ph": "C", "pid": process, "name": name, "ts": at_us, "args": {"bytes": value}}


def _us(time_s: float) -> float:
    """Microseconds, as the format asks, to the nanosecond: what ends there and what begins there agree."""
    return round(_BEGIN_US + time_s * 1e6, 3)
