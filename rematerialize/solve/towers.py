"""Towers of a step: independent branches of real depth that meet in one region, the head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rematerialize.solve.native import FlatStep
from rematerialize.solve.problem import Action
from rematerialize.solve.stages import Stages
from rematerialize.solve.step import Plan, Step

DEPTH = 3  # ops in a row that make a tower
HEAD_STAGES = 40


@dataclass(frozen=True, slots=True)
class Towers:
    """Ops of each tower and of the head, forward and backward, each in the graph's order.

    ``loose`` are backward ops that read several towers' gradients (sums for weights that towers share);
    they run as soon as they can.
    """

    towers: tuple[tuple[int, ...], ...]
    head: tuple[int, ...]
    backward: tuple[tuple[int, ...], ...]
    head_backward: tuple[int, ...]
    loose: tuple[int, ...]


def find_towers(step: Step, most: int) -> Towers | None:
    """Return the towers of a step, the ``most`` costliest of them, None when there are fewer than two. O(edges).

    A join is the first op that reads two branches of at least `DEPTH` ops in a row which share nothing but
    resident storages; all that depends on it, and every branch too short or left over, is the head.
    """
    owner = _branches(step)
    cost: dict[int, float] = {}
    for op, branch in enumerate(owner):
        if branch >= 0:
            cost[branch] = cost.get(branch, 0.0) + step.time_s[op]
    chosen = sorted(sorted(cost, key=lambda branch: (-cost[branch], branch))[:most])
    number = {branch: at for at, branch in enumerate(chosen)}
    if len(chosen) < 2:
        return None
    home = [number.get(branch, len(chosen)) for branch in owner]
    places = _backward_homes(step, home, len(chosen))
    if places is None:
        return None
    loose = len(chosen) + 1
    backward: list[list[int]] = [[] for _ in range(loose + 1)]
    for at, place in enumerate(places):
        backward[place].append(step.forwards + at)
    return Towers(
        tuple(tuple(op for op, at in enumerate(home) if at == tower) for tower in range(len(chosen))),
        tuple(op for op, at in enumerate(home) if at == len(chosen)),
        tuple(tuple(ops) for ops in backward[: len(chosen)]),
        tuple(backward[len(chosen)]),
        tuple(backward[loose]),
    )


def _branches(step: Step) -> list[int]:
    """Return for each forward op the branch that it belongs to, -1 for the head."""
    parent = list(range(step.forwards))
    depth = [1] * step.forwards
    deepest = [1] * step.forwards  # of a branch, at its root
    head = [False] * step.forwards

    def root(op: int) -> int:
        while parent[op] != op:
            parent[op] = parent[parent[op]]
            op = parent[op]
        return op

    met: set[int] = set()
    for op in range(step.forwards):
        before = [step.producer[value] for value in step.inputs[op]]
        if any(head[other] for other in before):
            head[op] = True
        else:
            roots = sorted({root(other) for other in before})
            head[op] = sum(deepest[at] >= DEPTH for at in roots) > 1
        if head[op]:
            met.update(root(other) for other in before if not head[other])
            continue
        depth[op] = 1 + max((depth[other] for other in before), default=0)
        for at in roots:
            parent[at] = op
        deepest[op] = max([depth[op], *(deepest[at] for at in roots)])
    met = {root(op) for op in met}
    return [
        root(op) if not head[op] and root(op) in met and deepest[root(op)] >= DEPTH else -1
        for op in range(step.forwards)
    ]


def _backward_homes(step: Step, home: Sequence[int], head: int) -> list[int] | None:
    """Return the chain of each backward op, ``head + 1`` for loose ones; None when the towers are entangled."""
    outputs = {
        value
        for op in range(step.forwards)
        for value in step.outputs[op]
        if any(user < step.forwards and home[user] != home[op] for user in step.users[value])
    }
    places: list[int] = []
    for op in range(step.forwards, len(step.names)):
        inside: set[int] = set()  # towers whose own values it reads
        below: set[int] = set()
        for value in step.inputs[op]:
            producer = step.producer[value]
            if producer >= step.forwards:
                below.add(places[producer - step.forwards])
            elif producer >= 0 and home[producer] != head and value not in outputs:
                inside.add(home[producer])
        found = (inside | below) - {head}
        if len(found) > 1 or head + 1 in found:
            if inside:
                return None
            places.append(head + 1)
        else:
            places.append(found.pop() if found else head)
    return places


class TowerStages:
    """The towers and the head of a step as chains of stages."""

    def __init__(self, step: Step, found: Towers, limit: int) -> None:
        self.step = step
        self.flat = flat = FlatStep(step)
        self.loose = found.loose
        pairs = zip(found.towers, found.backward, strict=True)
        self.towers = [Stages(step, limit, ops, after, flat=flat) for ops, after in pairs]
        self.head = Stages(step, HEAD_STAGES, found.head, found.head_backward, flat=flat)

    def plan(self, works: Iterable[tuple[int, Action]]) -> Plan:
        """Return the plan of a schedule: pairs of a chain, the head last, and its action. O(length)."""
        step = self.step
        parts = [*self.towers, self.head]
        reached = [0] * len(parts)
        runs: list[NDArray[np.int64]] = []
        length, split = 0, -1
        waiting = {op: sum(step.producer[value] >= step.forwards for value in step.inputs[op]) for op in self.loose}
        readers: dict[int, list[int]] = {}
        for op in self.loose:
            for value in step.inputs[op]:
                readers.setdefault(step.producer[value], []).append(op)
        for chain, action in works:
            if action.kind == "B" and split < 0:
                split = length
            run = parts[chain].ops(action, action.stage < reached[chain])
            runs.append(run)
            length += len(run)
            if action.kind != "B":
                reached[chain] = max(reached[chain], action.stage + 1)
                continue
            done = run.tolist() if readers else []
            free: list[int] = []
            while done:
                for op in readers.get(done.pop(), ()):
                    waiting[op] -= 1
                    if waiting[op] == 0:
                        free.append(op)
                        done.append(op)
            if free:
                runs.append(np.array(free, dtype=np.int64))
        return self.flat.prune(np.concatenate(runs), split)
