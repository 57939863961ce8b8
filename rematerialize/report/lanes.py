"""What a schedule does with each op: stored, freed and recomputed, freed for good. The strip of a report."""

from __future__ import annotations

from dataclasses import dataclass

from rematerialize.report.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Lane:
    """The executions that have one thing in common.

    Attributes
    ----------
    key, title, meaning : str
        For programs, for a heading, and in a sentence.
    positions : tuple of int
        Of the executions, in order. Every execution stands in exactly one lane.
    size_bytes : int
        What these executions make.
    time_s : float
        What they take.
    """

    key: str
    title: str
    meaning: str
    positions: tuple[int, ...]
    size_bytes: int
    time_s: float


_MEANINGS = (
    ("stored", "Stored", "a result is kept in memory from the forward to the backward"),
    ("dropped", "Freed, recomputed later", "results are freed within the forward and computed again when needed"),
    ("freed", "Freed", "results are freed after their last use and not needed again"),
    ("recomputed", "Recomputed", "a forward op runs again"),
    ("backward", "Backward", "gradients are computed"),
)


def lanes(timeline: Timeline) -> tuple[Lane, ...]:
    """The five lanes of a schedule, empty ones included. O(executions + instances)."""
    found: dict[str, list[int]] = {key: [] for key, _, _ in _MEANINGS}
    for position, key in enumerate(lane_of_each(timeline)):
        found[key].append(position)
    sizes = timeline.graph.storages
    made = [sum(sizes[name] for name in run.op.outputs) for run in timeline.executions]
    return tuple(
        Lane(
            key,
            title,
            meaning,
            tuple(found[key]),
            sum(made[at] for at in found[key]),
            sum(timeline.executions[at].op.time_s for at in found[key]),
        )
        for key, title, meaning in _MEANINGS
    )


def lane_of_each(timeline: Timeline) -> tuple[str, ...]:
    """The key of the lane of each execution.

    A forward op that runs for the first time in the backward is neither stored nor recomputed: it counts as freed.
    """
    kept = {one.birth for one in timeline.instances if one.birth < timeline.boundary <= one.death}
    runs_again: set[str] = set()
    keys: list[str] = []
    for position in range(len(timeline.executions) - 1, -1, -1):
        run = timeline.executions[position]
        if run.op.phase == "backward":
            keys.append("backward")
        elif run.recomputes:
            keys.append("recomputed")
        elif position in kept:
            keys.append("stored")
        else:
            keys.append("dropped" if run.op.name in runs_again else "freed")
        runs_again.add(run.op.name)
    return tuple(reversed(keys))


def held_to_the_end(timeline: Timeline) -> frozenset[int]:
    """Indices of the instances that outlive the step: what the forward returned, and the gradients."""
    newest: dict[str, int] = {}
    returned: dict[str, int] = {}
    for index, one in enumerate(timeline.instances):
        newest[one.storage] = index
        if one.birth < timeline.boundary:
            returned[one.storage] = index
    graph = timeline.graph
    held = [*(returned.get(name) for name in graph.outputs), *(newest.get(name) for name in graph.gradients)]
    return frozenset(index for index in held if index is not None)
