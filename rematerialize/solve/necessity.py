"""What is live for certain at certain moments of every valid schedule of a step.

Nodes are the ops and *split*, the point between forward and backward. ``x <= y`` says that the first run
of x is never later than the first run of y, in any schedule:

(1) a producer runs before its users;
(2) an op that runs once, and the producer of a held output, run before the split;
(3) the split comes before every backward op, where tangents and held outputs start to be fixed.

A *single* value has one instance that can matter: what a backward op or an op that runs once makes,
tangents (made at the split), held outputs (the instance at the split is held). For moments a <= b:

(4) a single value with producer <= a and a user >= b (or held to the end) is live from a to b.
(5) Let phi(v) = min(size, sum of phi over the ops charged to v); phi(op) = the sum over its single outputs
    (phi of a held one is its size); each op that runs once is charged to one of its single inputs. Once v
    has been made, phi(v) bytes of v and of what was made out of it are live: either a charged op has not
    run, then v is live, or all have, then the claim holds for their outputs. Trees of charges don't meet,
    so the claims add up, for every value with producer <= a that (4) leaves out, over the charged ops
    that are not themselves <= a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import numpy as np
import numpy.typing as npt

from rematerialize.solve.step import Step

Bytes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Necessary:
    """Bytes live for certain throughout each window (a, b); a moment is the window (a, a).

    Attributes
    ----------
    fixed : array of int64
        By claim (4).
    held : array of int64
        The part of ``fixed`` that is held to the end.
    loose : array of int64
        By claim (5), to be added to ``fixed``.
    """

    fixed: Bytes
    held: Bytes
    loose: Bytes

    @property
    def total(self) -> Bytes:
        """Everything that is live for certain."""
        return self.fixed + self.loose


class Necessity:
    """The order of nodes and the single values of one step, sizes in units that add up in 64 bits."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.split = step.forwards
        self.unit = 1 << max(0, (2 * sum(step.size_bytes) + 2 * sum(step.transient_bytes)).bit_length() - 61)
        self.sizes = [size // self.unit for size in step.size_bytes]  # rounded down: bounds stay bounds
        self.transients = [size // self.unit for size in step.transient_bytes]
        self.single = [producer < 0 or not step.recomputable[producer] for producer in step.producer]
        self.forced = self._forced()
        self.before = self._predecessors()
        self.ends = step.held_outputs | {v for v in step.held_gradients if self.single[v]}
        self.charged = self._charges()

    def node(self, op: int) -> int:
        """Return the node of an op; nodes are numbered in the graph's order."""
        return op + (op >= self.split)

    def maker(self, value: int) -> int:
        """Return the node from which a single value, or a held output, is fixed."""
        producer = self.step.producer[value]
        return self.node(producer) if producer >= 0 and self.single[value] else self.split

    def _forced(self) -> list[bool]:
        """Return which forward ops must run before the split."""
        step = self.step
        forced = [not step.recomputable[op] for op in range(step.forwards)]
        for value in step.held_outputs:
            forced[step.producer[value]] = True
        for op in range(step.forwards - 1, -1, -1):
            if forced[op]:
                for value in step.inputs[op]:
                    forced[step.producer[value]] = True
        return forced

    def _predecessors(self) -> list[list[int]]:
        step = self.step
        before = [[self.node(step.producer[v]) for v in reads if step.producer[v] >= 0] for reads in step.inputs]
        for op in range(step.forwards, len(before)):
            before[op].append(self.split)
        return [*before[: self.split], [op for op in range(self.split) if self.forced[op]], *before[self.split :]]

    def _charges(self) -> list[list[tuple[int, int]]]:
        """Return the pairs (node, phi) of the ops charged to each value."""
        step, phi = self.step, [0] * len(self.sizes)
        charged: list[list[tuple[int, int]]] = [[] for _ in self.sizes]
        for op in range(len(step.names) - 1, -1, -1):
            if op < step.forwards and step.recomputable[op]:
                continue
            for value in step.outputs[op]:
                phi[value] = self.sizes[value]
                if value not in self.ends:
                    phi[value] = min(phi[value], sum(share for _, share in charged[value]))
            share = sum(phi[value] for value in step.outputs[op])
            candidates = [v for v in step.inputs[op] if self.single[v]]
            if share and candidates:
                charged[max(candidates, key=lambda v: self.sizes[v])].append((self.node(op), share))
        return charged

    def measure(self, windows: Sequence[tuple[int, int]]) -> Necessary:
        """Measure windows of nodes, each with a <= b. O((values + edges) x windows / machine word)."""
        count, last = len(windows), len(self.before)
        reached = [0] * last  # bit k of reached[x]: x <= a of window k
        follows = [0] * last  # bit k of follows[x]: b of window k <= x
        for at, (start, stop) in enumerate(windows):
            reached[start] |= 1 << at
            follows[stop] |= 1 << at
        for node in range(last - 1, -1, -1):
            for other in self.before[node]:
                reached[other] |= reached[node]
        for node in range(last):
            follows[node] = reduce(or_, (follows[other] for other in self.before[node]), follows[node])
        fixed, held, loose = (np.zeros(count, np.int64) for _ in range(3))
        for value, size in enumerate(self.sizes):
            if not size or not (self.single[value] or value in self.step.held_outputs):
                continue
            made = reached[self.maker(value)]
            if value in self.ends:
                held += size * _unpack(made, count)
                continue
            live = made & reduce(or_, (follows[self.node(user)] for user in self.step.users[value]), 0)
            if live:
                fixed += size * _unpack(live, count)
            if made != live and self.charged[value]:
                pending = sum(share * _unpack(made & ~live & ~reached[op], count) for op, share in self.charged[value])
                loose += np.minimum(size, pending)
        return Necessary(fixed + held, held, loose)

    def own(self, op: int, *, again: bool = False) -> int:
        """Return what an op adds to what is live for certain while it runs, for the first time or again."""
        size = self.transients[op] + sum(self.sizes[value] for value in self.reads(op, again=again))
        for value in self.step.outputs[op]:
            if not self.single[value] or not (self.step.users[value] or value in self.ends):
                size += self.sizes[value]
        return size

    def operands(self, op: int) -> int:
        """Return the size of what an op reads, writes and works with."""
        values = (*self.step.inputs[op], *self.step.outputs[op])
        return self.transients[op] + sum(self.sizes[value] for value in values)

    def reads(self, op: int, *, again: bool = False) -> list[int]:
        """Return the values that an op reads and that are not live for certain: some run had to make them."""
        pinned = self.step.held_outputs if again or op >= self.split else frozenset[int]()
        return [value for value in self.step.inputs[op] if not self.single[value] and value not in pinned]


def _unpack(bits: int, count: int) -> Bytes:
    raw = np.frombuffer(bits.to_bytes(count // 8 + 1, "little"), np.uint8)
    return np.unpackbits(raw, count=count, bitorder="little").astype(np.int64)
