"""Training graphs that are strictly chains, and machines that find the best schedule by search alone."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from rematerialize.ir import Op, TrainingGraph
from rematerialize.simulate import SimulationResult, simulate
from rematerialize.solve.join import Work
from rematerialize.solve.problem import Action, Chain


@st.composite
def paper_chains(draw: st.DrawFn, max_length: int = 5) -> Chain:
    """Chains of the paper's parameters, every size and time on its own."""
    count = draw(st.integers(1, max_length))

    def some(number: int, low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(number)]

    values = [0, *some(count, 1, 6)]
    return Chain.of_paper(
        [float(t) for t in some(count, 1, 5)],
        [float(t) for t in some(count, 1, 5)],
        values,
        [value + extra for value, extra in zip(values[1:], some(count, 0, 6), strict=True)],
        some(count, 0, 3),
        some(count, 0, 3),
    )


def chain_graph(chain: Chain) -> TrainingGraph:
    """Return the training graph of a chain of the paper's parameters.

    ``e`` makes what a stage saves beside its output, in no time; F runs ``f``, S runs ``e f``, B runs ``b``.
    """
    values, count = chain.value_bytes, len(chain)
    sizes = {f"a{at}": size for at, size in enumerate(values)} | {f"d{at}": size for at, size in enumerate(values)}
    forward, backward = [], []
    for at in range(count):
        sizes[f"x{at}"] = chain.saved_bytes[at] - values[at + 1]
        transient = chain.transit_peak_bytes[at] - values[at + 1]
        forward.append(Op(f"e{at}", "forward", 0.0, (f"a{at}",), (f"x{at}",)))
        forward.append(Op(f"f{at}", "forward", chain.forward_s[at], (f"a{at}",), (f"a{at + 1}",), transient))
        reads = (f"a{at}", f"a{at + 1}", f"x{at}", f"d{at + 1}")
        transient = chain.backward_peak_bytes[at] - values[at] - values[at + 1]
        backward.append(Op(f"b{at}", "backward", chain.backward_s[at], reads, (f"d{at}",), transient))
    ops = (*forward, *reversed(backward))
    return TrainingGraph(ops, sizes, frozenset({"a0"}), (f"d{count}",), (), ("d0",)).verify()


def replay(chain: Chain, actions: Iterable[Action]) -> SimulationResult:
    """Return what the judge says of a schedule of a chain."""
    names: list[str] = []
    split = -1
    for action in actions:
        if action.kind == "B" and split < 0:
            split = len(names)
        parts = {"F": "f", "S": "ef", "B": "b"}[action.kind]
        names += [f"{part}{action.stage}" for part in parts]
    return simulate(chain_graph(chain), names[:split], names[split:])


State = tuple[int, int, int, int]  # running value (-1: none), values kept, stages saved, stages left to reverse


def search(chain: Chain, budget: int) -> float:
    """Return the least makespan of a persistent schedule by Dijkstra's algorithm over machine states.

    Values and saved stages that are kept stay until the backward of the stage that reads them.
    """
    start: State = (0, 0, 0, len(chain))
    best = {start: 0.0}
    queue = [(0.0, start)]
    while queue:
        time_s, state = heapq.heappop(queue)
        if time_s > best[state]:
            continue
        if state[3] == 0:
            return time_s
        for cost, memory, after in _moves(chain, state):
            if memory <= budget and time_s + cost < best.get(after, float("inf")):
                best[after] = time_s + cost
                heapq.heappush(queue, (time_s + cost, after))
    return float("inf")


def _moves(chain: Chain, state: State) -> Iterator[tuple[float, int, State]]:
    at, kept, saved, left = state
    count, values = len(chain), chain.value_bytes
    there = {0} | {v for v in range(count + 1) if kept >> v & 1} | {s + 1 for s in range(count) if saved >> s & 1}
    extras = sum(chain.saved_bytes[s] - values[s + 1] for s in range(count) if saved >> s & 1)
    memory = sum(values[v] for v in there | ({at} - {-1}) if v) + extras
    held = 0 if left == count else values[left]
    for value in there - {at}:
        yield 0.0, 0, (value, kept, saved, left)
    if 0 <= at < left:
        run = memory + held + chain.transit_peak_bytes[at]
        save = memory + held + chain.saving_peak_bytes[at]
        time_s = chain.forward_s[at]
        yield time_s, run, (at + 1, kept, saved, left)
        yield time_s, run, (at + 1, kept | 1 << at, saved, left)
        yield time_s, save, (at + 1, kept | 1 << at, saved | 1 << at, left)
    if saved >> (left - 1) & 1:
        last = left - 1
        after = (-1, kept & ~(1 << last), saved & ~(1 << last), last)
        yield chain.backward_s[last], memory + chain.backward_peak_bytes[last], after


@st.composite
def join_chains(draw: st.DrawFn, towers: int = 2, max_length: int = 3) -> tuple[tuple[Chain, ...], Chain]:
    """Towers and a head of one or two stages, sizes and times small and random."""
    parts = [draw(paper_chains(max_length)) for _ in range(towers)]
    return close_towers(parts, draw(paper_chains(2)))


def close_towers(parts: Iterable[Chain], head: Chain) -> tuple[tuple[Chain, ...], Chain]:
    """Let the gradients of the towers' outputs be made by the first stage of the head."""
    towers = tuple(replace(part, held_bytes=(*part.held_bytes[:-1], part.value_bytes[-1])) for part in parts)
    total = sum(tower.value_bytes[-1] for tower in towers)
    first = head.backward_peak_bytes[0] - head.value_bytes[0] + total
    return towers, replace(
        head,
        value_bytes=(total, *head.value_bytes[1:]),
        held_bytes=(total, *head.held_bytes[1:]),
        backward_peak_bytes=(first, *head.backward_peak_bytes[1:]),
    )


def join_graph(towers: Sequence[Chain], head: Chain) -> TrainingGraph:
    """Return the training graph of a join network: names as in `chain_graph`, the chain's number in front."""
    sizes: dict[str, int] = {}
    forward: list[Op] = []
    backward: list[Op] = []
    for at, chain in enumerate([*towers, head]):
        names = {name: f"{at}{name}" for name in chain_graph(chain).storages}
        for name, size in chain_graph(chain).storages.items():
            sizes[names[name]] = size
        for op in chain_graph(chain).ops:
            reads = tuple(names[name] for name in op.inputs)
            writes = tuple(names[name] for name in op.outputs)
            (forward if op.phase == "forward" else backward).append(
                replace(op, name=f"{at}{op.name}", inputs=reads, outputs=writes)
            )
    last = len(towers)
    values = tuple(f"{at}a{len(tower)}" for at, tower in enumerate(towers))
    gradients = tuple(f"{at}d{len(tower)}" for at, tower in enumerate(towers))

    def joined(op: Op) -> Op:
        reads = tuple(other for name in op.inputs for other in (values if name == f"{last}a0" else (name,)))
        return replace(op, inputs=reads, outputs=gradients if op.name == f"{last}b0" else op.outputs)

    forward = [joined(op) for op in forward]
    backward = [joined(op) for op in backward]
    backward.sort(key=lambda op: op.name[0] != str(last))
    resident = frozenset(f"{at}a0" for at in range(last))
    used = {name for op in (*forward, *backward) for name in (*op.inputs, *op.outputs)}
    return TrainingGraph(
        (*forward, *backward),
        {name: size for name, size in sizes.items() if name in used},
        resident,
        (f"{last}d{len(head)}",),
        (),
        tuple(f"{at}d0" for at in range(last)),
    ).verify()


def replay_join(towers: Sequence[Chain], head: Chain, works: Iterable[Work]) -> SimulationResult:
    """Return what the judge says of a schedule of a join network."""
    names: list[str] = []
    split = -1
    for work in works:
        if work.action.kind == "B" and split < 0:
            split = len(names)
        parts = {"F": "f", "S": "ef", "B": "b"}[work.action.kind]
        names += [f"{work.chain}{part}{work.action.stage}" for part in parts]
    return simulate(join_graph(towers, head), names[:split], names[split:])


@dataclass(frozen=True, slots=True)
class Machine:
    """A join network half done. Chains are numbered, the head last; it may start when the towers are through.

    ``stack`` holds what is kept, oldest first: (chain, l, False) for a_l, (chain, l, True) for abar_l.
    ``reached`` are the positions in the first forward, ``running`` the chain and position of a value that
    is being carried but not kept, ``left`` the stages of each chain not yet reversed.
    """

    stack: tuple[tuple[int, int, bool], ...]
    reached: tuple[int, ...]
    running: tuple[int, int] | None
    left: tuple[int, ...]


def search_join(towers: Sequence[Chain], head: Chain, budget: int, *, stacked: bool = True) -> float:
    """Return the least makespan by Dijkstra's algorithm; ``stacked=False`` frees recomputation from rule 2.

    Then any kept value may start a recomputation and any tower may take its next backward step.
    """
    chains = (*towers, head)
    start = Machine((), (0,) * len(chains), None, tuple(len(chain) for chain in chains))
    best = {start: 0.0}
    queue = [(0.0, 0, start)]
    number = 0
    while queue:
        time_s, _, state = heapq.heappop(queue)
        if time_s > best[state]:
            continue
        if not any(state.left):
            return time_s
        for cost, memory, after in _join_moves(chains, state, stacked):
            if memory <= budget and time_s + cost < best.get(after, float("inf")):
                best[after] = time_s + cost
                number += 1
                heapq.heappush(queue, (time_s + cost, number, after))
    return float("inf")


def _join_moves(chains: Sequence[Chain], state: Machine, stacked: bool) -> Iterator[tuple[float, int, Machine]]:
    head = len(chains) - 1
    forward = state.left[head] == len(chains[head])  # nothing reversed yet
    held = 0 if forward else sum(c.held_bytes[at] for c, at in zip(chains[:-1], state.left[:-1], strict=True))
    if state.left[head]:
        held = 0 if forward else chains[head].held_bytes[state.left[head]]
    stack = state.stack
    there = {(c, at) for c, at, whole in stack if not whole} | {(c, at + 1) for c, at, whole in stack if whole}
    extras = sum(chains[c].saved_bytes[at] - chains[c].value_bytes[at + 1] for c, at, whole in stack if whole)
    carried = {state.running} if state.running else set()
    carried |= {(c, len(chains[c])) for c in range(head) if state.left[head]}  # outputs, as soon as they are there
    if forward:
        done = {(c, at) for c, at in enumerate(state.reached[:head]) if at}
        carried = {(c, at) for c, at in carried if at <= state.reached[c]} | done
        carried |= {(head, state.reached[head])} if state.reached[head] < len(chains[head]) else set()
    memory = held + extras + sum(chains[c].value_bytes[at] for c, at in there | carried if at)

    def steps(c: int, at: int, kept: bool, free: bool) -> Iterator[tuple[float, int, Machine]]:
        """F and S of a stage; ``kept``: its input is on the stack; ``free``: it may be dropped."""
        chain = chains[c]
        new = stack if kept else (*stack, (c, at, False))
        reached = tuple(max(r, at + 1) if o == c else r for o, r in enumerate(state.reached))
        to = (c, at + 1)
        run = memory + chain.transit_peak_bytes[at]
        if kept or free:
            yield chain.forward_s[at], run, Machine(stack, reached, to, state.left)
        if not kept:
            yield chain.forward_s[at], run, Machine(new, reached, to, state.left)
        if (c, at, True) in stack:
            return
        saved = Machine((*new, (c, at, True)), reached, to if forward else None, state.left)
        yield chain.forward_s[at], memory + chain.saving_peak_bytes[at], saved

    def back(c: int) -> Iterator[tuple[float, int, Machine]]:
        last = state.left[c] - 1
        rest = tuple(item for item in stack if item not in ((c, last, True), (c, last, False)))
        left = tuple(at - (o == c) for o, at in enumerate(state.left))
        own = memory - (0 if forward else chains[c].held_bytes[last + 1])
        after = Machine(rest, tuple(0 for _ in chains), None, left)
        yield chains[c].backward_s[last], own + chains[c].backward_peak_bytes[last], after

    if forward:
        for c, at in enumerate(state.reached):
            ready = c != head or all(r == len(chains[o]) for o, r in enumerate(state.reached[:head]))
            if ready and at < len(chains[c]):
                yield from steps(c, at, False, at > 0 and state.running == (c, at))
        if (head, state.left[head] - 1, True) in stack and all(
            r == len(chain) for r, chain in zip(state.reached, chains, strict=True)
        ):
            yield from back(head)
        if state.reached[head] != len(chains[head]):
            return
        if state.running == (head, len(chains[head])):
            yield 0.0, 0, Machine(stack, state.reached, None, state.left)
            return
    if state.running is not None:
        c, at = state.running
        if at < state.left[c]:
            yield from steps(c, at, (c, at, False) in stack, True)
        if not stacked:
            yield 0.0, 0, Machine(stack, state.reached, None, state.left)
        return
    for c, at, whole in stack[-1:] if stacked else stack:
        if whole and at == state.left[c] - 1:
            if c == head or not state.left[head]:
                yield from back(c)
        elif at + whole < state.left[c] and (c == head or not state.left[head]):
            yield from steps(c, at + whole, (c, at + whole, False) in stack, False)
