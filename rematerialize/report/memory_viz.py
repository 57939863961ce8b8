"""A step as a snapshot of a CUDA allocator, for the tools that people look at those with.

What ``torch.cuda.memory._dump_snapshot`` writes is a pickle of plain dicts and lists; https://pytorch.org/memory_viz
and torch's own ``torch/cuda/_memory_viz.py`` read it. Here its allocations are those that the plan foresees, at
addresses that an allocator could have given: no two live tensors overlap.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rematerialize.report.lanes import held_to_the_end, lane_of_each
from rematerialize.report.timeline import Execution, Timeline
from rematerialize.simulate import Instance

PROTOCOL = 4  # the newest that the viewer's own unpickler knows
_BASE = 0x7F0000000000  # where device memory tends to begin
_ALIGNMENT = 512
# Without a frame, the viewer guesses why there is none.
_STEP = [{"name": "all that the step allocates, as planned", "filename": "rematerialize", "line": 0}]
_KINDS = {
    "stored": "stored for the backward",
    "dropped": "freed, recomputed later",
    "freed": "freed in the forward",
    "recomputed": "recomputed",
    "backward": "gradients",
}


def memory_snapshot(timeline: Timeline) -> bytes:
    """Return the pickle of a snapshot in which the step's allocations are recorded, those live at its end as blocks.

    Allocations keep their exact sizes, a workspace is one too, and colours tell kinds apart: the largest amount
    allocated is the step's peak. O(n log n + n f) for n allocations and f gaps between blocks.
    """
    return pickle.dumps(snapshot(timeline), protocol=PROTOCOL)


def snapshot(timeline: Timeline) -> dict[str, Any]:
    """The snapshot before it is pickled."""
    space = _Space()
    kinds = lane_of_each(timeline)
    held = held_to_the_end(timeline)
    born: list[list[int]] = [[] for _ in timeline.executions]
    dying: list[list[_Block]] = [[] for _ in timeline.executions]
    for index, one in enumerate(timeline.instances):
        born[one.birth].append(index)
    events: list[dict[str, Any]] = []
    alive: list[_Block] = []
    for at, run in enumerate(timeline.executions):
        for index in born[at]:
            one = timeline.instances[index]
            size = timeline.graph.storages[one.storage]
            block = space.take(size, _frames(run, timeline.label(one.storage), one.storage), _kind(run, one, kinds[at]))
            (alive if index in held else dying[one.death]).append(block)
            events += _events(("alloc",), block, run)
        if run.op.transient_bytes:
            block = space.take(run.op.transient_bytes, _frames(run, "workspace", ""), "workspace")
            events += _events(("alloc", "free_requested", "free_completed"), block, run)
            space.give(block)
        for block in dying[at]:
            events += _events(("free_requested", "free_completed"), block, run)
            space.give(block)
    return {
        "segments": [_segment(space.end, alive)] if events else [],
        "device_traces": [[_whole_segment(space.end), *events]] if events else [],
        "allocator_settings": {},
        "external_annotations": [],
    }


@dataclass(frozen=True, slots=True)
class _Block:
    """A range of addresses, counted from the segment's begin."""

    offset: int
    size: int
    frames: list[dict[str, Any]]
    kind: str

    @property
    def rounded(self) -> int:
        """The bytes that it keeps others from using."""
        return -(-self.size // _ALIGNMENT) * _ALIGNMENT


class _Space:
    """Addresses, given first-fit: the lowest gap that is large enough."""

    def __init__(self) -> None:
        self.end = 0
        self._gaps: list[tuple[int, int]] = []  # (begin, end), in order, none touching another

    def take(self, size: int, frames: list[dict[str, Any]], kind: str) -> _Block:
        block = _Block(0, size, frames, kind)
        for at, (begin, end) in enumerate(self._gaps):
            if end - begin >= block.rounded:
                self._gaps[at : at + 1] = [(begin + block.rounded, end)] if end - begin > block.rounded else []
                return _Block(begin, size, frames, kind)
        begin = self._gaps.pop()[0] if self._gaps and self._gaps[-1][1] == self.end else self.end
        self.end = max(self.end, begin + block.rounded)
        return _Block(begin, size, frames, kind)

    def give(self, block: _Block) -> None:
        begin, end = block.offset, block.offset + block.rounded
        at = next((at for at, gap in enumerate(self._gaps) if gap[0] >= end), len(self._gaps))
        if at < len(self._gaps) and self._gaps[at][0] == end:
            end = self._gaps.pop(at)[1]
        if at and self._gaps[at - 1][1] == begin:
            begin = self._gaps.pop(at - 1)[0]
            at -= 1
        if end > begin:
            self._gaps.insert(at, (begin, end))


def _kind(run: Execution, one: Instance, lane: str) -> str:
    return _KINDS[lane] if one.storage in run.op.outputs else "given to the backward"


def _frames(run: Execution, label: str, storage: str) -> list[dict[str, Any]]:
    """A stack trace as the viewer shows it, "file:line:name" per frame: the tensor, the op, the module."""
    file, _, line = run.op.source.rpartition(":")
    given = bool(storage) and storage not in run.op.outputs
    names = (
        [label] if given else [label, f"{run.op.name} {run.op.target}".strip(), f"module {run.op.module or '(model)'}"]
    )
    at = {"filename": file, "line": int(line)} if line.isdecimal() else {"filename": run.op.source, "line": 0}
    return [{"name": name, **(at if not given else {"filename": "", "line": 0})} for name in names]


def _events(actions: Sequence[str], block: _Block, run: Execution) -> list[dict[str, Any]]:
    if not block.size:
        return []  # an allocator isn't asked for nothing
    common = {
        "addr": _BASE + block.offset,
        "size": block.size,
        "stream": 0,
        "frames": block.frames,
        "time_us": round(run.start_s * 1e6),
        "category": block.kind,
    }
    return [{"action": action, **common} for action in actions]


def _whole_segment(size: int) -> dict[str, Any]:
    # Once there are categories, the viewer needs one of that name.
    segment = {"action": "segment_alloc", "addr": _BASE, "size": size, "stream": 0, "frames": _STEP, "time_us": 0}
    return {**segment, "category": "unknown"}


def _segment(size: int, alive: Sequence[_Block]) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    now = 0
    for block in sorted((block for block in alive if block.size), key=lambda block: block.offset):
        if block.offset > now:
            blocks.append(_inactive(now, block.offset - now))
        now = block.offset + block.rounded
        blocks.append(
            {
                "address": _BASE + block.offset,
                "size": block.rounded,
                "requested_size": block.size,
                "state": "active_allocated",
                "frames": block.frames,
            }
        )
    if now < size:
        blocks.append(_inactive(now, size - now))
    return {
        "device": 0,
        "address": _BASE,
        "total_size": size,
        "allocated_size": sum(block["size"] for block in blocks if block["state"] == "active_allocated"),
        "active_size": sum(block["size"] for block in blocks if block["state"] == "active_allocated"),
        "requested_size": sum(block["requested_size"] for block in blocks if block["state"] == "active_allocated"),
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": _STEP,
        "blocks": blocks,
    }


def _inactive(offset: int, size: int) -> dict[str, Any]:
    return {"address": _BASE + offset, "size": size, "requested_size": 0, "state": "inactive", "frames": []}
