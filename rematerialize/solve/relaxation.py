"""A linear relaxation of all schedules at certain moments, and a bound on the makespan from its dual.

Checkmate's program (Jain et al., MLSys 2020) at few moments and over every valid schedule: m_0 is the split
between forward and backward, m_1 <= m_2 <= ... <= m_K are backward ops that depend on one another, so they
run in this order in any schedule. Window 0 is the forward, window k lies between m_(k-1) and m_k, window
K + 1 after m_K. A schedule gives keep[k, v] = 1 if an instance of v is live while m_k runs (at the split:
across it) and made[k, o] = 1 if op o runs in window k at least once. Then for every recomputable v that is
no held output, made by op p:

1. keep[k, v] <= keep[k-1, v] + made[k, p]; the same with made[k, o] on the left, for each o that reads v.
2. A backward op that reads v and can only run in windows l to h (by its dependencies on the moments) has
   1 <= keep[l-1, v] + sum of made[l..h, p]; if it is m_k itself, 1 <= keep[k, v]; a gradient v is read at
   the end.
3. While m_k runs, the kept values and all else that is live for certain fit the budget; so do the large
   ones alone, and in whole multiples of their common divisor.
4. An op that must run before the split has made[0, o] = 1; any other runs in some window.
5. made[k, o] = 0 if its operands and what is live for certain throughout the window exceed the budget.

The makespan is at least the sum of time_s x made plus the times of the backward ops, so it is at least any
value of the program's dual.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd, inf

import numpy as np

from rematerialize.solve.ascent import Program
from rematerialize.solve.necessity import Necessity
from rematerialize.solve.step import Step

ENTRIES_PER_OP = 300  # of the matrix, all moments together
ENTRIES = 1_500_000
WORK = 600_000_000  # entries x iterations
ITERATIONS = 3000
SMALL = 100  # sizes below 1 / SMALL of the room are no large ones
SAFETY = 1e-9


@dataclass(slots=True)
class _Rows:
    """A x >= q, row by row."""

    entries: list[tuple[int, int, float]] = field(default_factory=list)
    least: list[float] = field(default_factory=list)

    def add(self, least: float, *terms: tuple[int, float]) -> None:
        """Add a row; variables that don't exist (-1) are 0."""
        self.entries += [(len(self.least), column, factor) for column, factor in terms if column >= 0]
        self.least.append(least)


class Relaxation:
    """The program of one step and budget."""

    def __init__(self, step: Step, budget_bytes: int) -> None:
        self.step, self.need = step, Necessity(step)
        self.room = budget_bytes // self.need.unit
        self.fits = True
        self.cost: list[float] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.rows = _Rows()
        edges = sum(len(reads) for reads in step.inputs) + len(step.size_bytes)
        path = self._path()
        most = max(1, min(ENTRIES_PER_OP * len(step.names), ENTRIES) // (3 * edges + 1))
        self.moments = [
            path[(2 * k + 1) * len(path) // (2 * min(most, len(path)))] for k in range(min(most, len(path)))
        ]
        self._windows()
        self._variables()
        self._forward_rows()
        self._backward_rows()
        self._memory_rows()

    def bound_s(self) -> float:
        """Return the best bound found on the makespan of any schedule within the budget."""
        step, forced = self.step, self.need.forced
        if not self.fits:
            return inf
        fixed = sum(step.time_s[step.forwards :]) + sum(step.time_s[op] for op in range(step.forwards) if forced[op])
        if not self.rows.entries:
            return fixed * (1 - SAFETY)
        scale = max(self.cost) or 1.0
        row, column, factor = (np.array(part) for part in zip(*self.rows.entries, strict=True))
        program = Program(
            cost=np.array(self.cost) / scale,
            low=np.array(self.low),
            high=np.array(self.high),
            least=np.array(self.rows.least),
            row=row,
            column=column,
            factor=factor.astype(np.float64),
        )
        best = program.dual(min(ITERATIONS, WORK // len(row)))
        return (fixed + max(0.0, best) * scale) * (1 - SAFETY)

    def _path(self) -> list[int]:
        """Return the longest path of backward ops that depend on one another."""
        step = self.step
        length: dict[int, int] = {}
        before: dict[int, int] = {}
        for op in range(step.forwards, len(step.names)):
            makers = [step.producer[v] for v in step.inputs[op] if step.producer[v] >= step.forwards]
            before[op] = max(makers, key=lambda maker: length[maker], default=-1)
            length[op] = length.get(before[op], 0) + 1
        path = []
        op = max(length, key=lambda op: length[op], default=-1)
        while op >= 0:
            path.append(op)
            op = before[op]
        return path[::-1]

    def _windows(self) -> None:
        """Find the first and last window of each backward op, the last of each forward op, what is live."""
        step, need, end = self.step, self.need, len(self.moments) + 1
        self.at = {op: k for k, op in enumerate(self.moments, 1)}
        self.first: dict[int, int] = {}
        for op in range(step.forwards, len(step.names)):
            makers = [step.producer[v] for v in step.inputs[op] if step.producer[v] >= step.forwards]
            self.first[op] = max((max(self.first[m], self.at.get(m, 0) + 1) for m in makers), default=1)
        self.last = [end] * len(step.names)
        for op in range(len(step.names) - 1, -1, -1):
            users = [user for value in step.outputs[op] for user in step.users[value]]
            if op >= step.forwards:
                self.last[op] = min((self.at.get(user, self.last[user]) for user in users), default=end)
            elif step.held_gradients.isdisjoint(step.outputs[op]):
                self.last[op] = max((self.at.get(user, self.last[user]) for user in users), default=0)
        nodes = [need.split, *(need.node(op) for op in self.moments)]
        found = need.measure([*((node, node) for node in nodes), *pairwise(nodes)])
        total = found.total.tolist()
        self.certain = total[: len(nodes)]
        self.throughout = [0, *total[len(nodes) :], int(found.held[len(nodes) - 1])]

    def _variable(self, cost: float, low: float, high: float) -> int:
        self.cost.append(cost)
        self.low.append(low)
        self.high.append(high)
        return len(self.cost) - 1

    def _variables(self) -> None:
        """Make the variables that can matter: up to the last window in which anything reads them."""
        step, need, end = self.step, self.need, len(self.moments) + 2
        self.keep = [[-1] * len(step.size_bytes) for _ in range(end)]
        self.made = [[-1] * step.forwards for _ in range(end)]
        for op in range(step.forwards):
            if not step.recomputable[op]:
                continue
            again = need.own(op, again=True)
            for k in range(self.last[op] + 1):
                if k == 0 and need.forced[op]:
                    continue
                fits = k == 0 or self.throughout[k] + again <= self.room
                self.made[k][op] = self._variable(step.time_s[op], 0.0, float(fits)) if fits else -1
            for value in step.outputs[op]:
                if value not in step.held_outputs:
                    for k in range(min(self.last[op], len(self.moments)) + 1):
                        self.keep[k][value] = self._variable(0.0, 0.0, 1.0)

    def _supply(self, k: int, value: int) -> tuple[tuple[int, float], ...]:
        """Return where a value of window k can come from."""
        kept = self.keep[k - 1][value] if k else -1
        return (kept, 1.0), (self.made[k][self.step.producer[value]], 1.0)

    def _forward_rows(self) -> None:
        step, need = self.step, self.need
        for op in range(step.forwards):
            if not step.recomputable[op]:
                continue
            if not need.forced[op]:
                self.rows.add(1.0, *((made[op], 1.0) for made in self.made))
            for k in range(need.forced[op], self.last[op] + 1):
                for value in need.reads(op, again=True):
                    if (k or not need.forced[step.producer[value]]) and self.made[k][op] >= 0:
                        self.rows.add(0.0, *self._supply(k, value), (self.made[k][op], -1.0))
                for value in step.outputs[op]:
                    if self.keep[k][value] >= 0:
                        self.rows.add(0.0, *self._supply(k, value), (self.keep[k][value], -1.0))

    def _backward_rows(self) -> None:
        step, need = self.step, self.need
        for op in range(step.forwards, len(step.names)):
            for value in need.reads(op):
                if op in self.at:
                    self.low[self.keep[self.at[op]][value]] = 1.0
                else:
                    self._demand(value, self.first[op], self.last[op])
        for value in step.held_gradients - need.ends:
            self._demand(value, len(self.moments) + 1, len(self.moments) + 1)

    def _demand(self, value: int, first: int, last: int) -> None:
        maker = self.step.producer[value]
        made = ((self.made[k][maker], 1.0) for k in range(first, last + 1))
        self.rows.add(1.0, (self.keep[first - 1][value], 1.0), *made)

    def _memory_rows(self) -> None:
        step, need = self.step, self.need
        for k, certain in enumerate(self.certain):
            if k == 0 and len(step.names) == step.forwards:
                continue
            room, reads = self.room - certain, 0
            if k:
                op = self.moments[k - 1]
                reads = sum(need.sizes[value] for value in need.reads(op))
                room -= need.own(op) - reads
            self.fits &= reads <= room
            sizes = [(kept, size) for kept, size in zip(self.keep[k], need.sizes, strict=True) if kept >= 0 and size]
            self._at_most(room, sizes)
            large = [(kept, size) for kept, size in sizes if size * SMALL > room]
            whole = gcd(*(size for _, size in large)) or 1
            if room % whole * SMALL > room:
                self._at_most(room - room % whole, large)

    def _at_most(self, room: int, sizes: list[tuple[int, int]]) -> None:
        self.rows.add(-1.0 if room > 0 else 0.0, *((kept, -size / max(room, 1)) for kept, size in sizes))
