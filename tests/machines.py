"""Training graphs that are strictly chains, and machines that find the best schedule by search alone."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from hypothesis import strategies as st

from rematerialize.ir import Op, TrainingGraph
from rematerialize.simulate import SimulationResult, simulate
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
