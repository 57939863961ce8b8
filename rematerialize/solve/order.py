"""One order of a step's ops whatever order it was given in: plans should depend on the graph alone.

The forward is the post-order of a depth-first walk from its ends, deepest inputs first: what an op reads is
made right before it. The backward takes, of the ops that are ready, the one whose earliest forward value is
the latest (an op that needs none goes with whoever reads it), then the one that frees most. Ties go by a hash
of what an op descends from and what descends from it, so only ops that nothing tells apart keep the given
order. A heuristic, as good an order as autograd's own on most steps and better on some.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from rematerialize.solve.step import Step


def canonical_order(step: Step) -> tuple[int, ...]:
    """Return the ops in an executable order, the forward first. O(edges log edges)."""
    colour = _colours(step)
    forward = _forward(step, colour)
    return (*forward, *_backward(step, forward, colour))


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
    return [hash(pair) for pair in zip(above, below, strict=True)]


def _forward(step: Step, colour: list[int]) -> list[int]:
    depth: list[int] = []
    makers: list[list[int]] = []
    for op in range(step.forwards):
        makers.append(list({step.producer[value] for value in step.inputs[op]}))
        depth.append(1 + max((depth[maker] for maker in makers[op]), default=0))
    for found in makers:
        found.sort(key=lambda op: (depth[op], colour[op], op))
    read = {maker for found in makers for maker in found}
    ends = [op for op in range(step.forwards) if op not in read]
    order: list[int] = []
    begun: set[int] = set()
    stack = sorted(ends, key=lambda op: (depth[op], colour[op], op), reverse=True)
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


def _backward(step: Step, forward: list[int], colour: list[int]) -> list[int]:
    first, count = step.forwards, len(step.names)
    position = {op: at for at, op in enumerate(forward)}
    held = step.held_outputs | step.held_gradients
    level = [0] * count
    for op in range(count - 1, first - 1, -1):
        reads = [v for v in step.inputs[op] if 0 <= step.producer[v] < first and v not in step.held_outputs]
        after = (level[user] for value in step.outputs[op] for user in step.users[value])
        level[op] = min(position[step.producer[v]] for v in reads) if reads else max(after, default=first)
    left = [sum(user >= first for user in users) for users in step.users]
    growth = [sum(step.size_bytes[v] for v in outputs) for outputs in step.outputs]
    waiting = [sum(step.producer[v] >= first for v in reads) for reads in step.inputs]
    done: set[int] = set()

    def last_of(value: int) -> int:
        """Return the one op that still reads a value, charged with what it frees."""
        op = next(user for user in step.users[value] if user >= first and user not in done)
        growth[op] -= step.size_bytes[value]
        return op

    def key(op: int) -> tuple[int, int, int, int]:
        return -level[op], growth[op], colour[op], op

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
