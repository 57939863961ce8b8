r"""Join networks: several chains (towers) whose outputs one more chain (the head) takes together.

Beaumont, Herrmann, Pallez, Shilova, "Optimal memory-aware backpropagation of deep join networks" (Phil.
Trans. R. Soc. A 378, 2019) solve, by dynamic programming, homogeneous chains that gather when the loss is
computed. The class here is another one: chains and head may be heterogeneous (`problem.Chain`), and whole
stages can be saved as well as values, but schedules are *stacked*, where theirs interleave towers freely:

1. What is kept stays until the backward that it is kept for (persistent, as in `rotor`).
2. What was kept last, in any tower, is used up first: recomputation starts from the newest kept value.
3. A tower is left in its forward only where the value reached is kept, or is its output.
4. The outputs stay until the first stage of the head is reversed.

Towers may so be swept and reversed piece by piece in any interleaving, but nobody leaves a tower in the
middle of recomputing a piece of it. What rule 2 costs is not proven: a piece whose gradients shrink on the
way could be left half done for another tower's sake. A search without it over 450 random networks of two
towers of one or two stages found nothing better at any of 2,700 budgets.

The program runs over the stack from its bottom. State: (t_1 .. t_k, f, m), stages below t_i being those
of tower i on the stack, f which a_{t_i} are part of a saved stage, m the memory that the stack leaves. In
it either stage t_i of a tower is saved or a_{t_i} is kept and stages up to some e are passed; what is left
of the step then costs

    V(.., t_i, .., m) = sum of u_F + C_i(t_i, e-1, m - kept - others' gradients) + V(.., e, .., m - kept)

with C_i rotor's table of tower i, the forward of the piece fitting in m beside the values that the other
towers have reached, and in the end C_head(m - outputs not yet counted). Within the class this is optimal,
exactly so when a slot divides every size. O(prod(n_i + 1) 2^k slots sum(n_i)) for all memories together.

`join` applies it to steps whose forward has such towers, on at most `TOWERS` of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np

from rematerialize.solve.native import JoinTables, available
from rematerialize.solve.problem import Action, Chain, vocabulary
from rematerialize.solve.rotor import slot_of
from rematerialize.solve.rotor import solve as solve_chain
from rematerialize.solve.step import Plan, Step
from rematerialize.solve.towers import TowerStages, find_towers

MOST = 8  # towers that join.c has room for
TOWERS = 4
STAGES = {2: 32, 3: 13, 4: 6}  # of each tower, by their number
SLOTS = 120
BUDGETS = {2: 48, 3: 24, 4: 16}  # most plans, likewise
MANY = 1_000_000  # ops of all plans together beyond which fewer are


@dataclass(frozen=True, slots=True)
class Work:
    """An action of one of the chains; the head's number is that of the towers."""

    chain: int
    action: Action


def join(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield plans for memories from what suffices to store all down to the least; none without towers.

    O(edges), O(length) per plan, and the tables: see `Solver`.
    """
    found = find_towers(step, TOWERS) if available else None
    if found is None:
        return
    stages = TowerStages(step, found, STAGES[len(found.towers)])
    most = stages.flat.peak_bytes(step.store_all()) * 5 // 4
    near = -(-most // SLOTS)
    solver = Solver(tuple(s.chain.rounded(near) for s in stages.towers), stages.head.chain.rounded(near), most)
    falls = solver.thresholds()
    if not falls:
        return
    low, count = falls[0], min(BUDGETS[len(found.towers)], max(MANY // len(step.names), 6)) - 1
    # Denser near the least memory, where other solvers fall behind.
    slots = (low + (solver.slots - low) * at * at // (count * count) for at in range(count + 1))
    for slot in sorted({falls[bisect_right(falls, slot) - 1] for slot in slots}, reverse=True):
        solution = solver.solve(slot)
        if solution is not None:
            yield stages.plan((work.chain, work.action) for work in solution.works)


@dataclass(frozen=True, slots=True)
class Solution:
    """Makespan in seconds and the schedule."""

    time_s: float
    works: tuple[Work, ...]


class Solver:
    """The program, run once for all memories up to a largest; `solve` reads off the schedule for one of them.

    Parameters
    ----------
    towers : tuple of Chain
        ``held_bytes[n]`` of each is the gradient of its output. Nobody counts their inputs.
    head : Chain
        Its a_0 stands for all outputs together and isn't counted; ``held_bytes[0]`` are all gradients in
        memory when its backward is done, those of the towers' outputs among them.
    reach_bytes : int
        The largest budget.
    slots : int
        Most memory slots; sizes stay exact when their greatest common divisor needs no more.
    """

    def __init__(self, towers: tuple[Chain, ...], head: Chain, reach_bytes: int, *, slots: int = SLOTS) -> None:
        assert len(towers) <= MOST, "the compiled program takes no more towers"
        self.towers = towers
        self.head = head
        self.slot_bytes = slot_of((*towers, head), reach_bytes, slots)
        self.slots = reach_bytes // self.slot_bytes
        self.tables = [solve_chain(c, reach_bytes, slot_bytes=self.slot_bytes) for c in (*towers, head)]
        self._words = [[Work(at, action) for action in vocabulary(len(c))] for at, c in enumerate(towers)]
        self._tables = self._fill()

    def _fill(self) -> JoinTables:
        towers, count, longest = self.towers, len(self.towers), max(map(len, self.towers))
        base = max(self.head.held_bytes[0] - sum(tower.held_bytes[-1] for tower in towers), 0)
        lengths = [len(tower) for tower in towers]
        times = np.zeros((2, count, longest))
        sizes = np.zeros((6, count, longest + 1), dtype=np.int64)
        pieces = np.full((count, longest, longest, self.slots + 1), inf)
        for at, tower in enumerate(towers):
            times[:, at, : len(tower)] = (tower.forward_s, tower.backward_s)
            pieces[at, : len(tower), : len(tower)] = self.tables[at].cost
            for row, of_tower in enumerate(_sizes(tower)):
                sizes[row, at, : len(of_tower)] = of_tower
        states = prod(length + 1 for length in lengths) << count
        strides = [prod(length + 1 for length in lengths[at + 1 :]) << count for at in range(count)]
        tables = {
            "length": np.array(lengths, dtype=np.int64),
            "stride": np.array(strides, dtype=np.int64),
            **dict(zip(("forward_s", "backward_s"), times, strict=True)),
            **dict(zip(("value", "held", "saved", "transit", "saving", "backward"), sizes, strict=True)),
            "piece_s": pieces,
            "head_s": self.tables[-1].cost[0, -1],
            "cost": np.empty((states, self.slots + 1)),
            "least": np.empty(states, dtype=np.int64),
        }
        return JoinTables((count, longest, self.slots, self.slot_bytes, base, states), tables)

    def solve(self, slots: int) -> Solution | None:
        """Return the fastest stacked schedule in a number of slots, None when there is none. O(its length)."""
        slots = min(slots, self.slots)
        rows = self._tables.pieces(slots)
        if rows is None:
            return None
        return Solution(float(self._tables.cost[0, slots]), tuple(self._works(rows)))

    def thresholds(self) -> list[int]:
        """Return the numbers of slots at which the makespan falls, least first."""
        whole = self._tables.cost[0]
        return [int(at) for at in np.flatnonzero(whole < np.concatenate(([inf], whole[:-1])))]

    def _works(self, rows: list[list[int]]) -> Iterator[Work]:
        *pieces, (head_slots, *_) = rows
        backward: list[list[Work]] = []
        for tower, start, stop, slots in pieces:
            if stop == start:
                yield self._words[tower][3 * start + 1]
                backward.append([self._words[tower][3 * start + 2]])
            else:
                yield from self._words[tower][3 * start : 3 * stop : 3]
                actions = self.tables[tower].actions(slots, start, stop - 1)
                backward.append([Work(tower, action) for action in actions])
        yield from (Work(len(self.towers), action) for action in self.tables[-1].actions(head_slots))
        for works in reversed(backward):
            yield from works


def _sizes(tower: Chain) -> tuple[tuple[int, ...], ...]:
    return (
        (0, *tower.value_bytes[1:]),
        tower.held_bytes,
        tower.saved_bytes,
        tower.transit_peak_bytes,
        tuple(map(max, tower.saving_peak_bytes, tower.saved_bytes)),
        tower.backward_peak_bytes,
    )
