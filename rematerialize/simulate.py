"""The judge: replay a schedule op by op and report validity, peak memory and makespan.

It shares no code with any solver, on purpose. Memory semantics (shared by every part of the project):

1. While an op runs, memory = all live instances (its inputs among them) + all its outputs + its
   transient bytes. Resident storages are never counted.
2. Running an op makes a new instance of each of its outputs; a use reads the newest instance.
3. An instance dies after its last use; one that nobody uses is live only while its op runs.
4. A graph output is held by the caller: its instance at the end of the forward lives to the end of
   the step. A gradient's last instance lives to the end of the step.
5. Tangents appear when the backward starts and count until their last use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rematerialize.errors import ScheduleError
from rematerialize.ir import Op, TrainingGraph


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What running a schedule costs.

    Attributes
    ----------
    peak_bytes : int
        Largest memory over the step.
    time_s : float
        Makespan: the sum of the times of all executions.
    timeline : tuple of int
        Memory in bytes while each executed op runs, forward then backward.
    peak_op : str
        The first op during which the peak is reached ("" for an empty step).
    peak_index : int
        Its position in ``timeline`` (-1 for an empty step).
    live_at_peak : tuple of str
        Storages with an instance counted at the peak (outputs of ``peak_op`` included).
    recomputed_ops : int
        Executions beyond the first of each op.
    """

    peak_bytes: int
    time_s: float
    timeline: tuple[int, ...]
    peak_op: str
    peak_index: int
    live_at_peak: tuple[str, ...]
    recomputed_ops: int


@dataclass(slots=True)
class Instance:
    """One computation of a storage: live from position ``birth`` to position ``death``, both inclusive."""

    storage: str
    birth: int
    death: int


def simulate(graph: TrainingGraph, forward: Sequence[str], backward: Sequence[str]) -> SimulationResult:
    """Replay a schedule on a graph. O(executed ops + their edges).

    Parameters
    ----------
    graph : TrainingGraph
    forward, backward : sequence of str
        Op names in the order in which they run.

    Returns
    -------
    SimulationResult

    Raises
    ------
    ScheduleError
        An unknown op, an input not live, a backward op not exactly once, a backward op in the forward,
        a non-recomputable op run twice or in the backward, a missing output or gradient.
    """
    ops = {op.name: op for op in graph.ops}
    _check_counts(graph, ops, forward, backward)
    executed = [ops[name] for name in forward] + [ops[name] for name in backward]
    instances = _trace(graph, executed, len(forward))
    delta = [0] * (len(executed) + 1)
    for instance in instances:
        size = graph.storages[instance.storage]
        delta[instance.birth] += size
        delta[instance.death + 1] -= size
    timeline: list[int] = []
    live = 0
    for position, op in enumerate(executed):
        live += delta[position]
        timeline.append(live + op.transient_bytes)
    peak = max(timeline, default=0)
    index = timeline.index(peak) if timeline else -1
    return SimulationResult(
        peak_bytes=peak,
        time_s=sum(op.time_s for op in executed),
        timeline=tuple(timeline),
        peak_op=executed[index].name if timeline else "",
        peak_index=index,
        live_at_peak=tuple(i.storage for i in instances if i.birth <= index <= i.death),
        recomputed_ops=len(executed) - len({op.name for op in executed}),
    )


def lifetimes(graph: TrainingGraph, forward: Sequence[str], backward: Sequence[str]) -> tuple[Instance, ...]:
    """Every instance of a storage that a valid schedule makes, tangents among them, ordered by birth.

    Positions count executed ops, the forward's first. Raises ScheduleError as `simulate` does.
    """
    ops = {op.name: op for op in graph.ops}
    _check_counts(graph, ops, forward, backward)
    executed = [ops[name] for name in (*forward, *backward)]
    return tuple(sorted(_trace(graph, executed, len(forward)), key=lambda instance: instance.birth))


def _check_counts(graph: TrainingGraph, ops: dict[str, Op], forward: Sequence[str], backward: Sequence[str]) -> None:
    once: set[str] = set()
    for phase, names in (("forward", forward), ("backward", backward)):
        for name in names:
            if name not in ops:
                raise ScheduleError(f"{phase}: unknown op {name!r}")
            op = ops[name]
            if op.phase == "backward" and phase == "forward":
                raise ScheduleError(f"backward op {name!r} stands in the forward")
            if op.phase == "forward" and op.recomputable:
                continue
            if name in once:
                raise ScheduleError(f"op {name!r} must not run more than once")
            if op.phase != phase:
                raise ScheduleError(f"op {name!r} is not recomputable and can't run in the backward")
            once.add(name)
    for op in graph.ops:
        if op.phase == "backward" and op.name not in once:
            raise ScheduleError(f"backward op {op.name!r} is missing")


def _trace(graph: TrainingGraph, executed: Sequence[Op], start: int) -> list[Instance]:
    """Return every instance with its first and last position (inclusive)."""
    instances: list[Instance] = []
    newest: dict[str, Instance] = {}
    held: dict[str, Instance] = {}
    last = len(executed) - 1
    for position, op in enumerate([*executed, None]):
        if position == start:
            held = _outputs_of_the_forward(graph, newest)
            for name in graph.tangents:
                newest[name] = Instance(name, start, -1)
        if op is None:
            break
        for name in op.inputs:
            if name in newest:
                newest[name].death = position
            elif name not in graph.resident:
                raise ScheduleError(f"op {op.name!r}: its input {name!r} is not live")
        for name in op.outputs:
            newest[name] = Instance(name, position, position)
            instances.append(newest[name])
    instances += [newest[name] for name in graph.tangents if name in newest]
    for name in graph.gradients:
        if name in newest:
            held[f"gradient {name}"] = newest[name]
        elif name not in graph.resident:
            raise ScheduleError(f"gradient {name!r} is never computed")
    for instance in held.values():
        instance.death = last
    return [i for i in instances if i.death >= i.birth]


def _outputs_of_the_forward(graph: TrainingGraph, newest: dict[str, Instance]) -> dict[str, Instance]:
    for name in graph.outputs:
        if name not in newest and name not in graph.resident:
            raise ScheduleError(f"output {name!r} is not computed in the forward")
    return {name: newest[name] for name in graph.outputs if name in newest}
