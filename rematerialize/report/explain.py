"""Why a plan keeps what it keeps: per op and per module, what is stored, recomputed how often, at what price."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rematerialize.ir import Op
from rematerialize.report.modules import WHOLE
from rematerialize.report.table import aligned_table
from rematerialize.report.timeline import Timeline
from rematerialize.simulate import Instance
from rematerialize.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class OpDecision:
    """What happens to a forward op's results.

    Attributes
    ----------
    name, target, module, source : str
    decision : {"stored", "recomputed", "both", "passing"}
        "stored": the backward reads the first computation; "recomputed": a later one; "both": some results, or some
        of the time; "passing": the backward reads none.
    runs : int
    stored_bytes : int
        Of the results held from the forward into the backward.
    output_bytes : int
        Of one computation.
    time_s, extra_s : float
        Of one run, and of all runs after the first.
    why : str
    """

    name: str
    target: str
    module: str
    source: str
    decision: str
    runs: int
    stored_bytes: int
    output_bytes: int
    time_s: float
    extra_s: float
    why: str

    def to_dict(self) -> dict[str, Any]:
        """The decision as JSON-ready data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ModuleDecision:
    """The decisions on the ops of one module, inner modules included below the depth of the table."""

    module: str
    ops: int
    stored_bytes: int
    recomputed_ops: int
    most_runs: int
    extra_s: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan, explained. ``print`` shows a table per module; ``ops`` has every forward op."""

    ops: tuple[OpDecision, ...]
    modules: tuple[ModuleDecision, ...]

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON-ready data."""
        return {"modules": [asdict(row) for row in self.modules], "ops": [asdict(row) for row in self.ops]}

    @property
    def headers(self) -> tuple[str, ...]:
        """Of the table of modules."""
        return ("module", "forward ops", "stored", "recomputed ops", "at most", "extra time")

    def rows(self, size: Callable[[int], str] = format_bytes) -> list[tuple[str, ...]]:
        """Rows of the table of modules; ``size`` formats bytes."""
        return [
            (
                row.module or WHOLE,
                str(row.ops),
                size(row.stored_bytes) if row.stored_bytes else "-",
                str(row.recomputed_ops) if row.recomputed_ops else "-",
                f"{row.most_runs - 1}x" if row.most_runs > 1 else "-",
                format_seconds(row.extra_s) if row.extra_s else "-",
            )
            for row in self.modules
        ]

    def __str__(self) -> str:
        return aligned_table(self.headers, self.rows())

    __repr__ = __str__


def explain(timeline: Timeline, depth: int = 2) -> Explanation:
    """Explain a timeline; modules are told apart down to ``depth`` names. O(executions + instances).

    Parameters
    ----------
    timeline : Timeline
        Of the planned schedule.
    depth : int
        1 tells "encoder" from "decoder", 2 "encoder.0" from "encoder.1".
    """
    runs: dict[str, int] = defaultdict(int)
    for execution in timeline.executions:
        runs[execution.op.name] += 1
    made: dict[str, list[Instance]] = defaultdict(list)
    for instance in timeline.instances:
        made[instance.storage].append(instance)
    forward = [op for op in timeline.graph.ops if op.phase == "forward"]
    decisions = tuple(
        _decision(timeline, op, runs[op.name], [made[name] for name in op.outputs])
        for op in forward
        if runs[op.name] and (op.time_s or any(timeline.graph.storages[name] for name in op.outputs))
    )
    return Explanation(decisions, tuple(_by_module(decisions, depth)))


def _decision(timeline: Timeline, op: Op, runs: int, outputs: list[list[Instance]]) -> OpDecision:
    sizes = timeline.graph.storages
    boundary, end = timeline.boundary, len(timeline.executions) - 1
    crossing = [one for results in outputs for one in results if one.birth < boundary <= one.death]
    stored = sum(sizes[one.storage] for one in crossing)
    size = sum(sizes[name] for name in op.outputs)
    again = runs > 1
    held = [name for name in op.outputs if name in timeline.graph.outputs]
    decision = ("both" if stored else "recomputed") if again else "stored" if stored else "passing"
    idle = 0.0
    if again and end > 0:
        idle = max((_longest_gap(timeline, results) for results in outputs), default=0.0)
    return OpDecision(
        name=op.name,
        target=op.target,
        module=op.module,
        source=op.source,
        decision=decision,
        runs=runs,
        stored_bytes=stored,
        output_bytes=size,
        time_s=op.time_s,
        extra_s=(runs - 1) * op.time_s,
        why=_why(op, decision, runs, size, stored, held, idle),
    )


def _longest_gap(timeline: Timeline, results: list[Instance]) -> float:
    """The longest time between two computations during which the value isn't held."""
    starts = [execution.start_s for execution in (timeline.executions[one.birth] for one in results)]
    ends = [timeline.executions[one.death].start_s for one in results]
    return max((birth - death for birth, death in zip(starts[1:], ends, strict=False)), default=0.0)


def _why(op: Op, decision: str, runs: int, size: int, stored: int, held: list[str], idle: float) -> str:
    if decision == "passing":
        return "the backward doesn't read it"
    if held and decision == "stored":
        return "an output: the caller holds it"
    if not op.recomputable:
        return "can't run twice: it is stored if the backward reads it"
    price = _price(op.time_s, size)
    if decision == "stored":
        return f"making it again would cost {price}"
    times = "once more" if runs == 2 else f"{runs - 1} times more"
    freed = f"{format_bytes(size)} free for {format_seconds(idle)}" if size else "it holds nothing"
    kept = f"; {format_bytes(stored)} of it stored" if decision == "both" else ""
    each = price.rpartition(", ")[2]  # the column of extra time has the rest
    return f"runs {times}, {each}: {freed}{kept}"


def _price(time_s: float, size: int) -> str:
    if not size:
        return format_seconds(time_s)
    per_mib = time_s / (size / 2**20)
    return f"{format_seconds(time_s)}, {format_seconds(per_mib)} per MiB"


def _by_module(decisions: Iterable[OpDecision], depth: int) -> Iterable[ModuleDecision]:
    groups: dict[str, list[OpDecision]] = {}
    for row in decisions:
        groups.setdefault(".".join(row.module.split(".")[:depth]) if row.module else "", []).append(row)
    for module, rows in groups.items():
        yield ModuleDecision(
            module=module,
            ops=len(rows),
            stored_bytes=sum(row.stored_bytes for row in rows),
            recomputed_ops=sum(row.runs > 1 for row in rows),
            most_runs=max(row.runs for row in rows),
            extra_s=sum(row.extra_s for row in rows),
        )
