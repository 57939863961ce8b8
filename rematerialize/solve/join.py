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

The program runs over the stack from its bottom. State: (t_1 .. t_k, f, K), stages below t_i being those
of tower i on the stack, K the memory that they keep, f which a_{t_i} are part of a saved stage. In it
either stage t_i of a tower is saved or a_{t_i} is kept and stages up to some e are passed:

    V(.., e, .., K + kept) = V(.., t_i, .., K) + sum of u_F + C_i(t_i, e-1, M - K - kept - others' gradients)

with C_i rotor's table of tower i, the forward of the piece fitting beside K and the values that the other
towers have reached, and in the end C_head(M - K - outputs not yet counted). Within the class this is
optimal, exactly so when a slot divides every size. O(prod(n_i + 1) 2^k slots sum(n_i)) for one memory M.

`join` applies it to steps whose forward has such towers, on at most `TOWERS` of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np
from numba import njit

from rematerialize.solve import rotor
from rematerialize.solve.problem import Action, Chain
from rematerialize.solve.step import Plan, Step
from rematerialize.solve.towers import TowerStages, find_towers

TOWERS = 4
STAGES = {2: 24, 3: 11, 4: 6}  # of each tower, by their number
SLOTS = 120
BUDGETS = {2: 48, 3: 24, 4: 16}  # memories to solve for, likewise


@dataclass(frozen=True, slots=True)
class Work:
    """An action of one of the chains; the head's number is that of the towers."""

    chain: int
    action: Action


def join(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield plans for memories from what suffices to store all down to the least; none without towers."""
    found = find_towers(step, TOWERS)
    if found is None:
        return
    stages = TowerStages(step, found, STAGES[len(found.towers)])
    most = step.peak_bytes(step.store_all()) * 5 // 4
    near = -(-most // SLOTS)
    solver = Solver(tuple(s.chain.rounded(near) for s in stages.towers), stages.head.chain.rounded(near), most)
    low = solver.least()
    if low < 0:
        return
    count = BUDGETS[len(found.towers)] - 1
    # Denser near the least memory, where other solvers fall behind.
    slots = {low + (solver.slots - low) * at * at // (count * count) for at in range(count + 1)}
    for slot in sorted(slots, reverse=True):
        solution = solver.solve(slot)
        if solution is not None:
            yield stages.plan((work.chain, work.action) for work in solution.works)


@dataclass(frozen=True, slots=True)
class Solution:
    """Makespan in seconds and the schedule."""

    time_s: float
    works: tuple[Work, ...]


class Solver:
    """Tables of all chains up to a memory; `solve` runs the program for any memory up to it.

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
        self.towers = towers
        self.head = head
        self.slot_bytes = rotor.slot_of((*towers, head), reach_bytes, slots)
        self.slots = reach_bytes // self.slot_bytes
        self.tables = [rotor.solve(c, reach_bytes, slot_bytes=self.slot_bytes) for c in (*towers, head)]
        self._base_bytes = max(head.held_bytes[0] - sum(tower.held_bytes[-1] for tower in towers), 0)
        self._lengths = np.array([len(tower) for tower in towers])
        longest, count = int(self._lengths.max()), len(towers)
        self._costs = np.full((count, longest, longest, self.slots + 1), inf)
        for at, tower in enumerate(towers):
            self._costs[at, : len(tower), : len(tower)] = self.tables[at].cost
        self._sizes = np.zeros((6, count, longest + 1), dtype=np.int64)
        for at, tower in enumerate(towers):
            for row, sizes in enumerate(_sizes(tower)):
                self._sizes[row, at, : len(sizes)] = sizes
        self._times = np.zeros((2, count, longest))
        for at, tower in enumerate(towers):
            self._times[:, at, : len(tower)] = (tower.forward_s, tower.backward_s)
        strides = [prod(len(later) + 1 for later in towers[at + 1 :]) for at in range(count)]
        self._strides = np.array(strides) * (1 << count)

    def least(self) -> int:
        """Return the least number of slots with a schedule, -1 when there is none. O(log slots) programs."""
        if self.solve(self.slots) is None:
            return -1
        low, high = -1, self.slots
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.solve(middle) is None else (low, middle)
        return high

    def solve(self, slots: int) -> Solution | None:
        """Return the fastest stacked schedule in a number of slots, None when there is none."""
        slots = min(slots, self.slots)
        count = len(self.towers)
        states = prod(int(n) + 1 for n in self._lengths) << count
        cost = np.full((states, slots + 1), inf)
        origin = np.full((states, slots + 1), -1, dtype=np.int32)
        cost[0, 0] = 0.0
        _fill(
            cost, origin, self._costs, self._lengths, self._strides, self._times, self._sizes,
            self._base_bytes, self.slot_bytes,
        )  # fmt: skip
        best, end, kept = inf, -1, 0
        for flags in range(1 << count):
            state = int((self._lengths * self._strides).sum()) + flags
            outputs = [t.value_bytes[-1] for at, t in enumerate(self.towers) if not flags >> at & 1]
            left = slots - self._slots_of(sum(outputs))
            for memory in range(max(left, -1) + 1):
                time_s = float(cost[state, memory] + self.tables[-1].cost[0, -1, left - memory])
                if time_s < best:
                    best, end, kept = time_s, state, memory
        if end < 0:
            return None
        return Solution(best, tuple(self._works(origin, end, kept, slots)))

    def _works(self, origin: np.ndarray, state: int, kept: int, slots: int) -> Iterator[Work]:
        count = len(self.towers)
        forward: list[list[Work]] = []
        backward: list[list[Work]] = []
        flags = state & ((1 << count) - 1)
        outputs = [t.value_bytes[-1] for at, t in enumerate(self.towers) if not flags >> at & 1]
        head = self.tables[-1].actions(slots - kept - self._slots_of(sum(outputs)))
        while state > 0:
            before = int(origin[state, kept])
            reached, ends = self._decode(before), self._decode(state)
            at = next(tower for tower in range(count) if reached[tower] != ends[tower])
            tower, table, start, stop = self.towers[at], self.tables[at], reached[at], ends[at]
            others = sum(t.held_bytes[reached[o]] for o, t in enumerate(self.towers) if o != at) + self._base_bytes
            below = kept - (0 if start == 0 or before >> at & 1 else self._slots_of(tower.value_bytes[start]))
            if state >> at & 1:
                below -= self._slots_of(tower.saved_bytes[start])
                forward.append([Work(at, Action("S", start))])
                backward.append([Work(at, Action("B", start))])
            else:
                actions = table.actions(slots - kept - self._slots_of(others), start, stop - 1)
                forward.append([Work(at, Action("F", stage)) for stage in range(start, stop)])
                backward.append([Work(at, action) for action in actions])
            state, kept = before, below
        for piece in reversed(forward):
            yield from piece
        yield from (Work(count, action) for action in head)
        for piece in backward:
            yield from piece

    def _decode(self, state: int) -> list[int]:
        return [int(state // s % (n + 1)) for s, n in zip(self._strides, self._lengths, strict=True)]

    def _slots_of(self, size: int) -> int:
        return -(-size // self.slot_bytes)


def _sizes(tower: Chain) -> tuple[tuple[int, ...], ...]:
    return (
        (0, *tower.value_bytes[1:]),
        tower.held_bytes,
        tower.saved_bytes,
        tower.transit_peak_bytes,
        tuple(map(max, tower.saving_peak_bytes, tower.saved_bytes)),
        tower.backward_peak_bytes,
    )


@njit(cache=True)
def _fill(
    cost: np.ndarray,
    origin: np.ndarray,
    piece_s: np.ndarray,
    lengths: np.ndarray,
    strides: np.ndarray,
    times: np.ndarray,
    sizes: np.ndarray,
    base: int,
    slot: int,
) -> None:
    count, most = len(lengths), cost.shape[1] - 1
    value, held, saved, transit, saving, backward = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    reached = np.zeros(count, dtype=np.int64)
    for state in range(cost.shape[0]):
        lowest = most + 1
        for memory in range(most + 1):
            if cost[state, memory] < np.inf:
                lowest = memory
                break
        if lowest > most:
            continue
        values, gradients = 0, base
        for tower in range(count):
            reached[tower] = state // strides[tower] % (lengths[tower] + 1)
            gradients += held[tower, reached[tower]]
            if not state >> tower & 1:
                values += value[tower, reached[tower]]
        for tower in range(count):
            start = reached[tower]
            if start == lengths[tower]:
                continue
            flagged = state >> tower & 1
            own = 0 if flagged else value[tower, start]
            others = values - own  # reached by the other towers in the forward
            beside = gradients - held[tower, start]
            kept = (own + slot - 1) // slot
            plain = state - (flagged << tower)

            # Save stage `start`.
            extra = (saved[tower, start] + slot - 1) // slot
            need = (others + saving[tower, start] + slot - 1) // slot
            need = max(need, extra + (beside + backward[tower, start] + slot - 1) // slot)
            after = plain + strides[tower] + (1 << tower)
            time_s = times[0, tower, start] + times[1, tower, start]
            for memory in range(lowest, most + 1 - kept - need):
                if cost[state, memory] + time_s < cost[after, memory + kept + extra]:
                    cost[after, memory + kept + extra] = cost[state, memory] + time_s
                    origin[after, memory + kept + extra] = state

            # Keep the value reached and pass stages start .. stop-1.
            rise, passed = 0, 0.0
            gap = (beside + slot - 1) // slot
            for stop in range(start + 1, lengths[tower] + 1):
                stage = stop - 1
                passed += times[0, tower, stage]
                rise = max(rise, transit[tower, stage] + (value[tower, stage] if stage > start else 0))
                need = max((others + rise + slot - 1) // slot, gap)
                after = plain + strides[tower] * (stop - start)
                row = piece_s[tower, start, stage]
                for memory in range(lowest, most + 1 - kept - need):
                    time_s = cost[state, memory] + passed + row[most - memory - kept - gap]
                    if time_s < cost[after, memory + kept]:
                        cost[after, memory + kept] = time_s
                        origin[after, memory + kept] = state
