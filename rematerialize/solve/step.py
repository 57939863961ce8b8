"""The solvers' view of a training step: integers instead of names, dead ops left out.

Ops keep the graph's order; a *value* is a storage that counts (produced by a live op, or a tangent);
resident storages are left out altogether, for they cost nothing and never die.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from rematerialize.ir import TrainingGraph


@dataclass(frozen=True, slots=True)
class Plan:
    """A candidate schedule: op indices in running order.

    Attributes
    ----------
    order : tuple of int
        Op indices of the step, recomputations included.
    split : int
        How many of them run in the forward.
    """

    order: tuple[int, ...]
    split: int


@dataclass(frozen=True, slots=True)
class Step:
    """A training graph compiled to integers.

    Attributes
    ----------
    names : tuple of str
        Name of each live op; ops below ``forwards`` are forward ops.
    forwards : int
        Number of live forward ops.
    time_s : tuple of float
    transient_bytes : tuple of int
    inputs, outputs : tuple of tuple of int
        Distinct values read and written by each op.
    recomputable : tuple of bool
        False for backward ops too.
    size_bytes : tuple of int
        Size of each value.
    producer : tuple of int
        Op that makes each value, -1 for a tangent.
    users : tuple of tuple of int
        Ops that read each value, in the graph's order.
    held_outputs, held_gradients : frozenset of int
        Values that live to the end of the step.
    tangents : tuple of int
    """

    names: tuple[str, ...]
    forwards: int
    time_s: tuple[float, ...]
    transient_bytes: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    recomputable: tuple[bool, ...]
    size_bytes: tuple[int, ...]
    producer: tuple[int, ...]
    users: tuple[tuple[int, ...], ...]
    held_outputs: frozenset[int]
    held_gradients: frozenset[int]
    tangents: tuple[int, ...]

    def store_all(self) -> Plan:
        """Return the plan that runs every live op once, in the graph's order."""
        return Plan(tuple(range(len(self.names))), self.forwards)

    def duration_s(self, order: Sequence[int]) -> float:
        """Return the makespan of an order."""
        return sum(self.time_s[op] for op in order)

    def timeline(self, plan: Plan) -> list[int]:
        """Return the memory in bytes while each op of a plan runs. O(length + edges)."""
        order, end = plan.order, len(plan.order)
        delta = [0] * (end + 1)
        newest: dict[int, tuple[int, int]] = {}  # value -> (birth, last use)
        size = self.size_bytes

        def close(value: int, birth: int, death: int) -> None:
            delta[birth] += size[value]
            delta[death + 1] -= size[value]

        def hold() -> None:
            for value in self.held_outputs:
                if value in newest:
                    newest[value] = (newest[value][0], end - 1)

        for position, op in enumerate(order):
            if position == plan.split:
                hold()
                for value in self.tangents:
                    newest[value] = (position, position - 1)
            for value in self.inputs[op]:
                birth, death = newest[value]
                newest[value] = (birth, max(death, position))
            for value in self.outputs[op]:
                if value in newest:
                    close(value, *newest[value])
                newest[value] = (position, position)
        if plan.split == end:
            hold()
        for value, (birth, death) in newest.items():
            close(value, birth, end - 1 if value in self.held_gradients else death)
        live, memory = 0, []
        for position, op in enumerate(order):
            live += delta[position]
            memory.append(live + self.transient_bytes[op])
        return memory

    def peak_bytes(self, plan: Plan) -> int:
        """Return the peak memory of a plan."""
        return max(self.timeline(plan), default=0)

    def permanent(self, value: int) -> bool:
        """Whether no plan decides over a forward value once it is made: it is held, or can't be made again."""
        return value in self.held_outputs or not self.recomputable[self.producer[value]]

    def coarsened(self, unit: int) -> Step:
        """Return the step with sizes in another unit, rounded up: what fits it fits this one too."""
        sizes, transients = ((-(-size // unit) for size in all_) for all_ in (self.size_bytes, self.transient_bytes))
        return replace(self, size_bytes=tuple(sizes), transient_bytes=tuple(transients))

    def reordered(self, order: Sequence[int]) -> Step:
        """Return the step as if the graph had its ops in another executable order. O(edges)."""
        place = {op: at for at, op in enumerate(order)}
        old = (*self.tangents, *chain.from_iterable(self.outputs[op] for op in order))
        new = {value: at for at, value in enumerate(old)}

        def renumbered(values: Iterable[int]) -> tuple[int, ...]:
            return tuple(new[value] for value in values)

        return Step(
            names=tuple(self.names[op] for op in order),
            forwards=self.forwards,
            time_s=tuple(self.time_s[op] for op in order),
            transient_bytes=tuple(self.transient_bytes[op] for op in order),
            inputs=tuple(tuple(sorted(renumbered(self.inputs[op]))) for op in order),
            outputs=tuple(renumbered(self.outputs[op]) for op in order),
            recomputable=tuple(self.recomputable[op] for op in order),
            size_bytes=tuple(self.size_bytes[value] for value in old),
            producer=tuple(place.get(self.producer[value], -1) for value in old),
            users=tuple(tuple(sorted(place[op] for op in self.users[value])) for value in old),
            held_outputs=frozenset(renumbered(self.held_outputs)),
            held_gradients=frozenset(renumbered(self.held_gradients)),
            tangents=renumbered(self.tangents),
        )

    def prune(self, order: Sequence[int], split: int) -> Plan:
        """Return the plan without executions whose results nobody reads. O(length + edges)."""
        wanted = set(self.held_gradients)
        kept: list[int] = []
        kept_forward = 0
        if split == len(order):
            wanted |= self.held_outputs
        for position in range(len(order) - 1, -1, -1):
            op = order[position]
            if position == split - 1:
                wanted |= self.held_outputs
            if op >= self.forwards or not wanted.isdisjoint(self.outputs[op]):
                wanted.difference_update(self.outputs[op])
                wanted.update(self.inputs[op])
                kept.append(op)
                kept_forward += position < split
        return Plan(tuple(reversed(kept)), kept_forward)


def compile_step(graph: TrainingGraph) -> Step:
    """Compile a verified graph; forward ops that nothing needs are dropped. O(edges)."""
    needed = set(graph.outputs) | set(graph.gradients)
    live = []
    for op in reversed(graph.ops):
        if op.phase == "backward" or not needed.isdisjoint(op.outputs):
            needed.update(op.inputs)
            live.append(op)
    live.reverse()
    names = dict.fromkeys(chain(graph.tangents, chain.from_iterable(op.outputs for op in live)))
    index = {name: value for value, name in enumerate(names)}
    producer = [-1] * len(index)
    users: list[list[int]] = [[] for _ in index]
    inputs = [tuple(dict.fromkeys(index[n] for n in op.inputs if n in index)) for op in live]
    outputs = [tuple(index[n] for n in op.outputs) for op in live]
    for at, (reads, writes) in enumerate(zip(inputs, outputs, strict=True)):
        for value in reads:
            users[value].append(at)
        for value in writes:
            producer[value] = at
    return Step(
        names=tuple(op.name for op in live),
        forwards=sum(op.phase == "forward" for op in live),
        time_s=tuple(op.time_s for op in live),
        transient_bytes=tuple(op.transient_bytes for op in live),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        recomputable=tuple(op.recomputable and op.phase == "forward" for op in live),
        size_bytes=tuple(graph.storages[n] for n in names),
        producer=tuple(producer),
        users=tuple(tuple(u) for u in users),
        held_outputs=frozenset(index[n] for n in graph.outputs if n in index),
        held_gradients=frozenset(index[n] for n in graph.gradients if n in index),
        tangents=tuple(index[n] for n in graph.tangents),
    )
