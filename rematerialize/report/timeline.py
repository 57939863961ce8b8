"""A step as it unfolds: what runs when, what is live meanwhile. What every report is made from.

The simulator's replay decides what is live; nothing here looks at a solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from rematerialize.ir import Op, TrainingGraph
from rematerialize.schedule import Schedule
from rematerialize.simulate import Instance, lifetimes, simulate

_NAMED = 3  # calls of one kernel, so that a column of them stays readable


@dataclass(frozen=True, slots=True)
class Execution:
    """One run of an op.

    Attributes
    ----------
    op : Op
    phase : {"forward", "backward"}
        When it runs; a forward op that runs in the backward is a recomputation.
    run : int
        0 for the op's first run, 1 for its second.
    start_s : float
        Predicted, from the beginning of the step.
    live_bytes : int
        Memory while it runs, its workspace included.
    """

    op: Op
    phase: str
    run: int
    start_s: float
    live_bytes: int

    @property
    def recomputes(self) -> bool:
        """Whether the op ran before."""
        return self.run > 0


@dataclass(frozen=True, slots=True)
class Timeline:
    """A schedule of a graph, replayed.

    Attributes
    ----------
    graph : TrainingGraph
    executions : tuple of Execution
        In order; positions of instances count them.
    instances : tuple of Instance
        What is computed and how long it lives, ordered by birth.
    boundary : int
        Position of the first execution of the backward.
    peak_bytes, time_s : int, float
    peak_position : int
        The first execution during which the peak is reached; -1 for an empty step.
    """

    graph: TrainingGraph
    executions: tuple[Execution, ...]
    instances: tuple[Instance, ...]
    boundary: int
    peak_bytes: int
    time_s: float
    peak_position: int

    def live_at(self, position: int) -> list[Instance]:
        """The instances that are live while an execution runs, largest first, then oldest. Linear in all instances."""
        live = [one for one in self.instances if one.birth <= position <= one.death]
        return sorted(live, key=lambda one: (-self.graph.storages[one.storage], one.birth, one.storage))

    def label(self, storage: str) -> str:
        """What people call a storage: its label in the graph, or its name."""
        return self.graph.labels.get(storage, storage)


def kernel_title(target: str) -> str:
    """What a kernel is called in a table: its calls that aren't mere allocations, without torch's decoration.

    >>> kernel_title("aten.empty_strided.default bernoulli_as aten.div.Scalar")
    'bernoulli_as + div.Scalar'
    >>> kernel_title("aten.addmm.default")
    'addmm'
    >>> kernel_title("aten.mul.Tensor aten.add.Tensor aten.relu.default aten.neg.default aten.exp.default")
    'mul.Tensor + add.Tensor + relu + 2 more'
    """
    calls = target.split(" ")
    telling = [call for call in calls if not call.startswith(("aten.empty", "aten.new_empty"))] or calls[:1]
    names = [call.removeprefix("aten.").removesuffix(".default") for call in telling]
    rest = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return " + ".join([*names[:_NAMED], *rest])


def replay(graph: TrainingGraph, forward: Sequence[str], backward: Sequence[str]) -> Timeline:
    """Replay a schedule into a timeline. O(executed ops + their edges).

    Raises
    ------
    ScheduleError
        If it isn't valid.
    """
    result = simulate(graph, forward, backward)
    ops = {op.name: op for op in graph.ops}
    runs: dict[str, int] = {}
    executions: list[Execution] = []
    now = 0.0
    for position, name in enumerate((*forward, *backward)):
        phase = "forward" if position < len(forward) else "backward"
        run = runs.get(name, 0)
        executions.append(Execution(ops[name], phase, run, now, result.timeline[position]))
        runs[name] = run + 1
        now += ops[name].time_s
    return Timeline(
        graph=graph,
        executions=tuple(executions),
        instances=lifetimes(graph, forward, backward),
        boundary=len(forward),
        peak_bytes=result.peak_bytes,
        time_s=result.time_s,
        peak_position=result.peak_index,
    )


def of_schedule(graph: TrainingGraph, schedule: Schedule) -> Timeline:
    """The timeline of a schedule."""
    return replay(graph, schedule.forward, schedule.backward)


def store_all(graph: TrainingGraph, *, time_s: float | None = None, peak_bytes: int | None = None) -> Timeline:
    """The timeline of the step that runs every op once, in the graph's order.

    Parameters
    ----------
    graph : TrainingGraph
    time_s, peak_bytes : optional
        What the step that stores everything is known to take, where the graph is of another way to run it: one that
        splits a recurrence over time, say. The timeline is drawn out to that time and that peak, so that a report has
        one number for each.
    """
    forward = [op.name for op in graph.ops if op.phase == "forward"]
    backward = [op.name for op in graph.ops if op.phase == "backward"]
    found = replay(graph, forward, backward)
    longer = time_s / found.time_s if time_s and found.time_s else 1.0
    higher = Fraction(peak_bytes, found.peak_bytes) if peak_bytes and found.peak_bytes else Fraction(1)
    if longer == higher == 1:
        return found
    drawn = (
        replace(
            run,
            op=replace(run.op, time_s=run.op.time_s * longer),
            start_s=run.start_s * longer,
            live_bytes=round(run.live_bytes * higher),
        )
        for run in found.executions
    )
    sizes = {name: round(size * higher) for name, size in graph.storages.items()}
    return replace(
        found,
        graph=graph if higher == 1 else replace(graph, storages=sizes),
        executions=tuple(drawn),
        peak_bytes=round(found.peak_bytes * higher),
        time_s=found.time_s if longer == 1 else time_s or 0.0,
    )
