"""A linear relaxation of all schedules at certain moments, and a bound on the makespan from its dual.

Checkmate's program (Jain et al., "Checkmate", MLSys 2020) at few moments, and over every valid schedule:
m_0 is the split between forward and backward, m_1 <= m_2 <= ... <= m_K are backward ops that depend on one
another, so they run in this order in any schedule. Window 0 is the forward, window k lies between m_(k-1)
and m_k, window K + 1 after m_K. A schedule gives keep[k, v] = 1 if an instance of v is live while m_k runs
(at the split: across it) and made[i..j, o] = 1 if op o runs at least once in the windows i to j; these
spans are 0..0, 1..K+1, its halves, and so on down to single windows. Then, for every recomputable v that
is no held output, made by op p, and every span i..j:

1. keep[j, v] <= keep[i-1, v] + made[i..j, p]: an instance live at m_j was live at m_(i-1) or made since.
2. made[i..j, o] <= keep[i-1, v] + made[i..j, p] if o reads v. Likewise with 1 on the left if the span has
   all windows in which some backward op that reads v can run (by its dependencies on the moments; m_k
   itself runs at the end of window k), whether or not these windows are a span; 1 <= keep[k, v] if m_k
   reads v. A recomputable gradient is read at the end.
3. made[i..j, o] <= the sum of made over both halves of i..j.
4. While m_k runs, the kept values and all else that is live for certain fit the budget; so do the large
   ones alone, and in whole multiples of their common divisor.
5. An op that must run before the split has made[0..0, o] = 1; any other runs in some window.
6. made[k..k, o] = 0 if its operands and what is live for certain throughout the window exceed the budget.

The makespan is at least the sum of time_s x made over single windows plus the times of the backward ops,
so it is at least any value of the program's dual. It is also at least the sum, over spans that don't
overlap, of what must be recomputed in each (`rematerialize.solve.closure`), which needs no iterations and
so is what counts on large steps. Spans matter: within one, a value is kept or made once,
while single windows alone let fractions add up, and more of them could make the bound weaker.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd, inf

import numpy as np

from rematerialize.solve.ascent import Program
from rematerialize.solve.closure import Closure
from rematerialize.solve.necessity import Necessity

ENTRIES = (60_000, 1_000_000)  # least and most of the matrix, by which moments are chosen; between them
ENTRIES_PER_OP = 100
WORK = 250_000_000  # entries x iterations
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

    def __init__(self, need: Necessity, budget_bytes: int, effort: float = 1.0) -> None:
        step = need.step
        self.step, self.need, self.effort = step, need, effort
        self.room = budget_bytes // self.need.unit
        self.fits = True
        self.cost: list[float] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.rows = _Rows()
        self.left: list[tuple[int, list[int]]] = []  # at each moment: room beside what it reads, and that
        least, most = ENTRIES
        edges = sum(len(reads) for reads in step.inputs) + len(step.size_bytes)
        self.moments = self._moments(
            int(effort * max(least, min(ENTRIES_PER_OP * len(step.names), most))) // (6 * edges + 1)
        )
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
        once = sum(step.time_s) + self._closures_s()
        if not self.rows.entries:
            return once * (1 - SAFETY)
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
        best = program.dual(int(min(ITERATIONS, self.effort * WORK / len(row))))
        return max(once, fixed + max(0.0, best) * scale) * (1 - SAFETY)

    def _closures_s(self) -> float:
        """Return the best sum of the least recomputed in spans that don't overlap."""
        if not self.left:
            return 0.0
        closure, best = Closure.of(self.need), dict[tuple[int, int], float]()
        for start, stop in self.spans:
            room, there = self.left[start - 1]
            middle = (start + stop) // 2
            halves = best[start, middle] + best[middle + 1, stop] if start < stop else 0.0
            best[start, stop] = max(halves, closure.least_s(self.within[start, stop], there, room))
        return best[self.spans[-1]]

    def _moments(self, most: int) -> list[int]:
        """Return the op with the largest operands of each stretch of the longest path."""
        path, need = self._path(), self.need
        count = min(max(most, 1), len(path))
        stretches = (path[k * len(path) // count : (k + 1) * len(path) // count] for k in range(count))
        return [max(ops, key=need.operands) for ops in stretches]

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
        step, need, end = self.step, self.need, len(self.moments) + 1
        self.spans = list(_halves(1, end))
        self.keep = [[-1] * len(step.size_bytes) for _ in range(end + 1)]
        self.made = {span: [-1] * step.forwards for span in [(0, 0), *self.spans]}
        for op in range(step.forwards):
            if not step.recomputable[op]:
                continue
            again = need.own(op, again=True)
            for k in range(need.forced[op], self.last[op] + 1):
                if k == 0 or self.throughout[k] + again <= self.room:
                    self.made[k, k][op] = self._variable(step.time_s[op], 0.0, 1.0)
            for start, stop in self.spans:
                if start < stop:
                    self.made[start, stop][op] = self._join(op, start, stop)
            for value in step.outputs[op]:
                if value not in step.held_outputs:
                    for k in range(min(self.last[op], len(self.moments)) + 1):
                        self.keep[k][value] = self._variable(0.0, 0.0, 1.0)

    def _join(self, op: int, start: int, stop: int) -> int:
        """Return the variable of an op in a span: at most the sum of those of its halves."""
        middle = (start + stop) // 2
        parts = [made for made in (self.made[start, middle][op], self.made[middle + 1, stop][op]) if made >= 0]
        if len(parts) < 2:
            return parts[0] if parts else -1
        whole = self._variable(0.0, 0.0, 1.0)
        self.rows.add(0.0, (whole, -1.0), *((part, 1.0) for part in parts))
        return whole

    def _require(self, least: float, start: int, stop: int, value: int, *terms: tuple[int, float]) -> None:
        """Add the row: what is kept before a span, and what is made in it, cover the terms."""
        kept = self.keep[start - 1][value] if start else -1
        made = self.made[start, stop][self.step.producer[value]]
        self.rows.add(least, (kept, 1.0), (made, 1.0), *terms)

    def _forward_rows(self) -> None:
        step, need = self.step, self.need
        for op in range(step.forwards):
            if not step.recomputable[op]:
                continue
            spans = [(start, stop) for start, stop in self.spans if start <= self.last[op]]
            if not need.forced[op]:
                self.rows.add(1.0, (self.made[0, 0][op], 1.0), (self.made[self.spans[-1]][op], 1.0))
                spans.append((0, 0))
            for start, stop in spans:
                made = self.made[start, stop][op]
                for value in need.reads(op, again=True):
                    if made >= 0 and (start or not need.forced[step.producer[value]]):
                        self._require(0.0, start, stop, value, (made, -1.0))
                for value in step.outputs[op]:
                    if self.keep[stop][value] >= 0:
                        self._require(0.0, start, stop, value, (self.keep[stop][value], -1.0))

    def _backward_rows(self) -> None:
        step, need, end = self.step, self.need, len(self.moments) + 1
        demands = {(value, end, end) for value in step.held_gradients - need.ends}
        for op in range(step.forwards, len(step.names)):
            for value in need.reads(op):
                if op in self.at:
                    self.low[self.keep[self.at[op]][value]] = 1.0
                demands.add((value, self.at.get(op, self.first[op]), self.at.get(op, self.last[op])))
        within: dict[tuple[int, int], set[int]] = {span: set() for span in self.spans}
        for value, first, last in sorted(demands):
            parts = list(_cover(1, end, first, last))
            if len(parts) > 1:
                made = ((self.made[part][step.producer[value]], 1.0) for part in parts)
                self.rows.add(1.0, (self.keep[first - 1][value], 1.0), *made)
            for start, stop in self.spans:
                if start <= first and last <= stop:
                    within[start, stop].add(value)
        self.within = {span: sorted(values) for span, values in within.items()}
        for (start, stop), values in self.within.items():
            for value in values:
                self._require(1.0, start, stop, value)

    def _memory_rows(self) -> None:
        step, need = self.step, self.need
        for k, certain in enumerate(self.certain if len(step.names) > step.forwards else []):
            room, reads = self.room - certain, list[int]()
            if k:
                op = self.moments[k - 1]
                reads = need.reads(op)
                room -= need.own(op) - sum(need.sizes[value] for value in reads)
            self.left.append((room - sum(need.sizes[value] for value in reads), reads))
            self.fits &= self.left[k][0] >= 0
            sizes = [(kept, size) for kept, size in zip(self.keep[k], need.sizes, strict=True) if kept >= 0 and size]
            self._at_most(room, sizes)
            large = [(kept, size) for kept, size in sizes if size * SMALL > room]
            whole = gcd(*(size for _, size in large)) or 1
            if room % whole * SMALL > room:
                self._at_most(room - room % whole, large)

    def _at_most(self, room: int, sizes: list[tuple[int, int]]) -> None:
        self.rows.add(-1.0 if room > 0 else 0.0, *((kept, -size / max(room, 1)) for kept, size in sizes))


def _halves(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield a span after its two halves, and they after theirs."""
    if start < stop:
        middle = (start + stop) // 2
        yield from _halves(start, middle)
        yield from _halves(middle + 1, stop)
    yield start, stop


def _cover(start: int, stop: int, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the fewest of the spans that make up the windows from first to last, both included."""
    if first <= start and stop <= last:
        yield start, stop
    elif first <= stop and start <= last:
        middle = (start + stop) // 2
        yield from _cover(start, middle, first, last)
        yield from _cover(middle + 1, stop, first, last)
