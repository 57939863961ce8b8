"""What a page's script knows of a step: every execution and every tensor's life, in columns of numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rematerialize.ir import TrainingGraph
from rematerialize.report.curves import Frame
from rematerialize.report.lanes import lane_of_each
from rematerialize.report.timeline import Timeline


def page_data(plan: Timeline, stored: Timeline, area: Frame, budget_bytes: int) -> dict[str, Any]:
    """The data of a page as JSON-ready columns; names stand once, in tables. About 60 bytes per execution."""
    graph = plan.graph
    op_at = {op.name: at for at, op in enumerate(graph.ops)}
    tensor_at = {name: at for at, name in enumerate(graph.storages)}
    return {
        "budget": budget_bytes,
        "span": area.span,
        "top": area.top_bytes,
        "timed": area.timed,
        "ops": _ops(graph),
        "tensors": {
            "label": [plan.label(name) for name in graph.storages],
            "size": list(graph.storages.values()),
            "given": [tensor_at[name] for name in graph.tangents],
        },
        "plan": {
            **_runs(plan, op_at),
            "lane": _indexed(lane_of_each(plan)),
            "birth": [one.birth for one in plan.instances],
            "death": [one.death for one in plan.instances],
            "tensor": [tensor_at[one.storage] for one in plan.instances],
            "boundary": plan.boundary,
            "peak": plan.peak_position,
        },
        "stored": {**_runs(stored, op_at), "pace": _pace(stored)},
    }


def embedded_json(data: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _runs(timeline: Timeline, op_at: dict[str, int]) -> dict[str, Any]:
    return {
        "op": [op_at[run.op.name] for run in timeline.executions],
        "live": [run.live_bytes for run in timeline.executions],
    }


def _pace(timeline: Timeline) -> float:
    """What an op takes in a timeline for each second that it takes in the table of ops."""
    listed_s = {op.name: op.time_s for op in timeline.graph.ops}
    whole_s = sum(listed_s[run.op.name] for run in timeline.executions)
    return timeline.time_s / whole_s if whole_s else 1.0


def _ops(graph: TrainingGraph) -> dict[str, Any]:
    """Columns over the ops; a column of texts that repeat is a table and the rows' indices in it."""
    return {
        "name": [op.name for op in graph.ops],
        "module": _indexed(op.module for op in graph.ops),
        "source": _indexed(op.source for op in graph.ops),
        "target": _indexed(op.target for op in graph.ops),
        "time": [op.time_s for op in graph.ops],
        "workspace": [op.transient_bytes for op in graph.ops],
    }


def _indexed(texts: Iterable[str]) -> dict[str, list[Any]]:
    table: dict[str, int] = {}
    at = [table.setdefault(text, len(table)) for text in texts]
    return {"table": list(table), "at": at}
