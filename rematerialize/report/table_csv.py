"""A step as CSV: one row per execution, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io

from rematerialize.report.lanes import held_to_the_end, lane_of_each
from rematerialize.report.timeline import Timeline

COLUMNS = (
    "position",
    "phase",
    "op",
    "op_phase",
    "run",
    "lane",
    "module",
    "source",
    "target",
    "start_s",
    "time_s",
    "live_bytes",
    "made_bytes",
    "workspace_bytes",
    "freed_bytes",
    "inputs",
    "outputs",
)
"""What each row holds; ``inputs`` and ``outputs`` are names of storages, a space between two."""


def executions_csv(timeline: Timeline) -> str:
    """Return a header and one row per execution of a step, in order, as RFC 4180 asks; numbers are exact.

    Parameters
    ----------
    timeline : Timeline

    Returns
    -------
    str
        ``live_bytes`` is the memory while the op runs, ``made_bytes`` the size of its outputs, ``freed_bytes`` what
        dies after it, ``lane`` what the schedule does with it: stored, dropped, freed, recomputed or backward.
    """
    sizes = timeline.graph.storages
    freed = [0] * len(timeline.executions)
    held = held_to_the_end(timeline)
    for index, one in enumerate(timeline.instances):
        if index not in held:
            freed[one.death] += sizes[one.storage]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    lanes = lane_of_each(timeline)
    for position, run in enumerate(timeline.executions):
        op = run.op
        made = sum(sizes[name] for name in op.outputs)
        what = (position, run.phase, op.name, op.phase, run.run, lanes[position])
        where = (op.module, op.source, op.target)
        cost = (repr(run.start_s), repr(op.time_s), run.live_bytes, made, op.transient_bytes, freed[position])
        writer.writerow(
            [*map(_tame, map(str, what + where)), *cost, _tame(" ".join(op.inputs)), _tame(" ".join(op.outputs))]
        )
    return text.getvalue()


def _tame(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
