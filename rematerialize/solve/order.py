"""Orders of a step's ops that depend on the graph alone, not on the order it was given in.

The forward is the post-order of a depth-first walk from its ends, deepest inputs first: what an op reads is
made right before it. Or it goes by depth, as most programs are written. The backward takes one of the ops that are
ready, by one of five rules: whose earliest forward value is the latest (an op that needs none goes with whoever reads
it, or at once: "eager"), whose latest is, what frees most, or that together with all that read the same gradient. None
is best on every graph, so the planner tries several. Ties go by what an op descends from, what descends from it, its
neighbours, and where its inputs stand, so that only ops that nothing tells apart keep the given order.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Literal

from rematerialize.solve.step import Step

ROUNDS = 4  # of telling ops apart by their neighbours
Rule = Literal["earliest", "eager", "latest", "frees", "together"]
RULES: tuple[Rule, ...] = ("earliest", "eager", "latest", "frees", "together")


def canonical_orders(step: Step, rules: tuple[Rule, ...] = RULES, *, by_depth: bool = False) -> list[tuple[int, ...]]:
    """Return the ops in executable orders, the forward first: one per rule, no repeats. O(edges log edges)."""
    colour = _colours(step)
    forward = (_by_depth if by_depth else _depth_first)(step, colour, range(step.forwards))
    return list(dict.fromkeys((*forward, *_backward(step, forward, colour, rule)) for rule in rules))


def _colours(step: Step) -> list[int]:
    """Return a hash per op of all it descends from and of all that descends from it, names and order apart."""
    size, producer, ops = step.size_bytes, step.producer, range(len(step.names))
    tangents, flags = frozenset(step.tangents), [0] * len(step.size_bytes)
    for bit, values in enumerate((step.held_outputs, step.held_gradients, tangents)):
        for value in values:
            flags[value] |= 1 << bit
    own = [hash((op < step.forwards, step.time_s[op], step.transient_bytes[op], step.recomputable[op])) for op in ops]
    above, below, wanted = [*own], [*own], [hash(pair) for pair in zip(size, flags, strict=True)]
    for op in ops:
        reads = sorted((above[producer[v]] if producer[v] >= 0 else 0, size[v], flags[v]) for v in step.inputs[op])
        above[op] = hash((own[op], *reads, *sorted(size[v] for v in step.outputs[op])))
    for op in reversed(ops):
        for value in step.outputs[op]:
            wanted[value] = hash((size[value], flags[value], *sorted(below[user] for user in step.users[value])))
        below[op] = hash((own[op], *sorted(wanted[value] for value in step.outputs[op])))
    colour = [hash(pair) for pair in zip(above, below, strict=True)]
    for _ in range(ROUNDS):
        colour = [
            hash(
                (
                    colour[op],
                    *sorted((colour[producer[v]] if producer[v] >= 0 else 0, size[v]) for v in step.inputs[op]),
                    *(hash((size[v], *sorted(colour[user] for user in step.users[v]))) for v in step.outputs[op]),
                )
            )
            for op in ops
        ]
    return colour


def _depths(step: Step, ops: range) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Return whom each op of one part of the step reads from, and how many ops stand in a row before it."""
    depth: dict[int, int] = {}
    makers: dict[int, list[int]] = {}
    for op in ops:
        makers[op] = [maker for maker in {step.producer[value] for value in step.inputs[op]} if maker in ops]
        depth[op] = 1 + max((depth[maker] for maker in makers[op]), default=0)
    return makers, depth


def _by_depth(step: Step, colour: list[int], ops: range) -> list[int]:
    _, depth = _depths(step, ops)
    return sorted(ops, key=lambda op: (depth[op], colour[op], op))


def _depth_first(step: Step, colour: list[int], ops: range) -> list[int]:
    """Return the post-order of a walk over one part of the step from its ends, deepest inputs first."""
    makers, depth = _depths(step, ops)
    for found in makers.values():
        found.sort(key=lambda op: (depth[op], colour[op], op))
    read = {maker for found in makers.values() for maker in found}
    order: list[int] = []
    begun: set[int] = set()
    stack = sorted((op for op in ops if op not in read), key=lambda op: (depth[op], colour[op], op), reverse=True)
    while stack:
        op = stack[-1]
        begun.add(op)
        while makers[op] and makers[op][-1] in begun:  # done already: the walk has no cycles
            makers[op].pop()
        if makers[op]:
            stack.append(makers[op].pop())
        else:
            order.append(stack.pop())
    return order


def _levels(step: Step, position: dict[int, int], rule: Rule) -> list[int]:
    """Return for every backward op the place in the forward that it goes by, the last first."""
    first, count = step.forwards, len(step.names)
    read = [
        [position[step.producer[v]] for v in values if 0 <= step.producer[v] < first and v not in step.held_outputs]
        for values in step.inputs
    ]
    level = [0] * count
    for op in range(count - 1, first - 1, -1):
        after = [level[user] for value in step.outputs[op] for user in step.users[value]]
        if rule == "together":
            gradients = (v for v in step.inputs[op] if step.producer[v] >= first)
            siblings = (user for value in gradients for user in step.users[value])
            level[op] = max(max(read[user], default=-1) for user in (op, *siblings))
        elif rule == "latest":
            level[op] = max(read[op]) if read[op] else min(after, default=first)
        elif rule == "eager":
            level[op] = min(read[op], default=first)
        else:
            level[op] = min(read[op]) if read[op] else max(after, default=first)
    return level


def _backward(step: Step, forward: list[int], colour: list[int], rule: Rule) -> list[int]:
    first, count = step.forwards, len(step.names)
    position = {op: at for at, op in enumerate(forward)}
    held = step.held_outputs | step.held_gradients
    level = _levels(step, position, rule)
    left = [sum(user >= first for user in users) for users in step.users]
    growth = [sum(step.size_bytes[v] for v in outputs) for outputs in step.outputs]
    waiting = [sum(step.producer[v] >= first for v in reads) for reads in step.inputs]
    done: set[int] = set()

    def last_of(value: int) -> int:
        """Return the one op that still reads a value, charged with what it frees."""
        op = next(user for user in step.users[value] if user >= first and user not in done)
        growth[op] -= step.size_bytes[value]
        return op

    def key(op: int) -> tuple[int, int, int, list[int], int]:
        ranks = (growth[op], -level[op]) if rule == "frees" else (-level[op], growth[op])
        stands = sorted((position.get(step.producer[v], -1) for v in step.inputs[op]), reverse=True)
        return *ranks, colour[op], stands, op

    for value, readers in enumerate(left):
        if readers == 1 and value not in held:
            last_of(value)
    ready = [key(op) for op in range(first, count) if not waiting[op]]
    heapify(ready)
    order: list[int] = []
    while ready:
        op = heappop(ready)[-1]
        if op in done:  # it stood here twice, having come to free more
            continue
        done.add(op)
        position[op] = first + len(order)
        order.append(op)
        for value in step.inputs[op]:
            left[value] -= 1
            if left[value] == 1 and value not in held and waiting[other := last_of(value)] == 0:
                heappush(ready, key(other))
        for value in step.outputs[op]:
            for user in step.users[value]:
                waiting[user] -= 1
                if waiting[user] == 0:
                    heappush(ready, key(user))
    return order
