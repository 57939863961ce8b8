r"""Binomial checkpointing of uniform chains: Revolve.

Griewank, Walther, "Algorithm 799: Revolve: an implementation of checkpointing for the reverse or adjoint
mode of computational differentiation" (ACM TOMS 26(1), 2000). With c slots for values, the chain's input
in one of them, and beta(c, r) = (c + r)! / (c! r!), a chain of l steps is reversed with the least number
of forward steps (those right before a step's own reversal not counted)

    t(l, c) = r l - beta(c + 1, r - 1)     where r is the least with l <= beta(c, r)

by storing the value after the first k steps, reversing the l - k steps above it with c - 1 slots and then
the k steps below with c again. Every k in the intersection of [beta(c, r-2), beta(c, r-1)] and
[l - beta(c-1, r), l - beta(c-1, r-1)] is optimal; `split` takes the one that the paper's code takes.

Scope: optimal for chains whose steps all take as long and whose values are all as large, where a reversal
fits beside c values. `revolve` applies it to any step cut into stages, as the users of the algorithm do:
what is then optimal in number of stages is not in time or bytes, and the judge decides. Departure: a slot
is asked for as rarely as possible, so a chain of one step needs none beside its input's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb

from rematerialize.solve.problem import Action, vocabulary
from rematerialize.solve.stages import Stages, thin
from rematerialize.solve.step import Plan, Step

STAGES = 128
SLOTS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 26, 33, 42, 54, 70, 90, 116)
MANY = 1_000_000  # ops of all plans together beyond which fewer are


def revolve(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield one plan per number of slots. O(edges), and O(length) per plan."""
    if step.forwards in (0, len(step.names)):
        return
    stages = Stages(step, STAGES)
    count = len(stages.chain)
    some = [slots for slots in SLOTS if slots <= count]
    for at in thin(len(some), max(MANY // len(step.names), 6)):
        actions = schedule(count, some[at])
        if stages.worthwhile(actions):
            yield stages.plan(actions)


def advances(length: int, slots: int) -> int:
    """Return t(l, c), the least number of forward steps, by its closed form. O(r).

    Examples
    --------
    >>> [advances(10, slots) for slots in (1, 2, 3, 10)]
    [45, 20, 15, 9]
    """
    repeats = repetitions(length, slots)
    return repeats * length - comb(slots + repeats, repeats - 1) if repeats else 0


def repetitions(length: int, slots: int) -> int:
    """Return r: how often at most a step is run forward."""
    repeats = 0
    while comb(slots + repeats, repeats) < length:
        repeats += 1
    return repeats


def split(length: int, slots: int) -> int:
    """Return after how many of ``length`` > 1 steps the next value goes to one of ``slots`` > 1 slots. O(r)."""
    repeats = repetitions(length, slots)

    def beta(less: int, times: int) -> int:
        c = slots - less
        return comb(c + times, times) if c >= 0 <= times else 0

    if length <= beta(0, repeats - 1) + beta(2, repeats - 1):
        return max(beta(0, repeats - 2), 1)
    if length >= beta(0, repeats) - beta(3, repeats):
        return beta(0, repeats - 1)
    return length - beta(1, repeats - 1) - beta(2, repeats - 1)


def schedule(length: int, slots: int) -> list[Action]:
    """Return Revolve's schedule of ``length`` stages with ``slots`` slots. O(its length).

    Storing and restoring need no actions of their own: a value is kept when what follows reads it.

    Examples
    --------
    >>> from rematerialize.solve.problem import spell
    >>> spell(schedule(4, 2))
    'F0 F1 F2 S3 B3 F1 S2 B2 S1 B1 S0 B0'
    """
    words = vocabulary(length)
    forward, saving, backward = words[::3], words[1::3], words[2::3]
    found: list[Action] = []
    stack = [(0, length, slots)]  # first stage, how many, free slots with the one of the first stage's input
    while stack:
        first, count, free = stack.pop()
        if count == 1:
            found += (saving[first], backward[first])
            continue
        if free == 1:
            for last in range(first + count - 1, first - 1, -1):
                found += forward[first:last]
                found += (saving[last], backward[last])
            continue
        middle = split(count, free)
        found += forward[first : first + middle]
        stack += ((first, middle, free), (first + middle, count - middle, free - 1))
    return found
