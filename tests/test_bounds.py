"""Lower bounds against the true optimum: a search over machine states, of every schedule the format allows."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import combinations, count
from math import inf

import pytest
from hypothesis import given, settings

from benchmarks.solver import graphs
from rematerialize.ir import Op, TrainingGraph
from rematerialize.simulate import simulate
from rematerialize.solve import Planner
from rematerialize.solve.bounds import makespan_bound, minimum_bytes_bound
from rematerialize.solve.step import Step, compile_step
from tests.strategies import budgets, chains, training_graphs

State = tuple[bool, frozenset[int], frozenset[int], frozenset[int]]  # in backward, live, done once, outputs remade


def subsets(live: frozenset[int]) -> Iterator[frozenset[int]]:
    for size in range(len(live), -1, -1):
        yield from map(frozenset, combinations(sorted(live), size))


class Search:
    """Cheapest schedules of a very small step, by Dijkstra. ``live`` holds newest instances."""

    def __init__(self, step: Step) -> None:
        self.step, self.ops = step, range(len(step.names))
        self.done = frozenset(op for op in self.ops if op >= step.forwards)

    def runs(self, state: State, budget: int) -> Iterator[tuple[int, State]]:
        """Yield each op that may run next and each largest choice of what to keep while it runs."""
        step = self.step
        late, live, done, remade = state
        for op in self.ops:
            if (
                op in done
                or (op >= step.forwards) > late
                or (late and op < step.forwards and not step.recomputable[op])
            ):
                continue
            pinned = step.held_outputs - remade if late else frozenset[int]()
            reads = frozenset(step.inputs[op]) - pinned
            if not reads <= live:
                continue
            held = sum(step.size_bytes[v] for v in step.held_outputs) if late else 0
            base = held + step.transient_bytes[op] + sum(step.size_bytes[v] for v in step.outputs[op])
            fitting: list[frozenset[int]] = []
            for kept in subsets(live - frozenset(step.outputs[op]) - reads):
                if base + sum(step.size_bytes[v] for v in kept | reads) > budget or any(kept < f for f in fitting):
                    continue
                fitting.append(kept)
                new = frozenset(step.outputs[op])
                once = done | ({op} if not step.recomputable[op] else set())
                yield op, (late, kept | reads | new, once, remade | (new & step.held_outputs if late else set()))

    def fastest(self, budget: int) -> float:
        """Return the least makespan within a budget; inf if none fits."""
        step, tie = self.step, count()
        start: State = (False, frozenset(), frozenset(), frozenset())
        heap: list[tuple[float, int, State]] = [(0.0, next(tie), start)]
        best = {start: 0.0}
        while heap:
            time_s, _, state = heapq.heappop(heap)
            if time_s > best[state]:
                continue
            late, live, done, remade = state
            steps = [(step.time_s[op], after) for op, after in self.runs(state, budget)]
            if late and self.done <= done:
                held = step.held_outputs - remade
                if step.held_gradients <= live | held:
                    return time_s
            if not late and step.held_outputs <= live:
                steps.append((0.0, (True, (live - step.held_outputs) | frozenset(step.tangents), done, remade)))
            for cost, after in steps:
                if time_s + cost < best.get(after, inf):
                    best[after] = time_s + cost
                    heapq.heappush(heap, (time_s + cost, next(tie), after))
        return inf

    def minimum(self) -> int:
        low, high = 0, self.step.peak_bytes(self.step.store_all())
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fastest(middle) < inf else (middle + 1, high)
        return low


def check(graph: TrainingGraph) -> tuple[float, float]:
    """Compare at the minimum and above; return the two ratios of bound to optimum, summed over budgets."""
    step = compile_step(graph)
    search = Search(step)
    least = search.minimum()
    assert minimum_bytes_bound(step) <= least
    high = step.peak_bytes(step.store_all())
    bounds = optima = 0.0
    for budget in budgets(least, max(high, least), 4):
        optimum = search.fastest(budget)
        bound = makespan_bound(step, budget)
        assert bound <= optimum
        bounds, optima = bounds + bound, optima + optimum
    return minimum_bytes_bound(step) / max(1, least), bounds / max(1.0, optima)


@settings(max_examples=150, deadline=None)
@given(training_graphs(max_forward=4, max_backward=4))
def test_bounds_never_exceed_the_optimum_on_random_steps(graph: TrainingGraph) -> None:
    check(graph)


@settings(max_examples=40, deadline=None)
@given(chains(max_length=4))
def test_bounds_never_exceed_the_optimum_on_chains_and_are_near(graph: TrainingGraph) -> None:
    memory, time = check(graph)
    assert memory >= 0.6
    assert time >= 0.8


def test_the_search_agrees_with_the_simulator() -> None:
    """Store-all's time is the optimum at its own peak, and not a byte below where nothing fits."""
    graph = graphs.chain(3)
    step = compile_step(graph)
    peak = simulate(graph, step.names[: step.forwards], step.names[step.forwards :]).peak_bytes
    search = Search(step)
    assert search.fastest(peak) == pytest.approx(sum(step.time_s))
    assert sum(step.time_s) < search.fastest(peak - 1)
    assert search.fastest(search.minimum() - 1) == inf


@settings(max_examples=40, deadline=None)
@given(training_graphs())
def test_bounds_stay_below_the_portfolio(graph: TrainingGraph) -> None:
    step, planner = compile_step(graph), Planner(graph)
    least = planner.minimum()
    assert minimum_bytes_bound(step) <= least
    for budget in budgets(least, max(least, planner.store_all().peak_bytes), 3):
        assert makespan_bound(step, budget) <= planner.solve(budget).time_s


NAMED = {
    "gpt": (lambda: graphs.gpt(1), 0.96, 0.7),
    "chain": (lambda: graphs.chain(12), 0.999, 0.75),
    "unet": (lambda: graphs.unet(2), 0.99, 0.5),
    "resnet": (lambda: graphs.resnet((1, 1)), 0.9, 0.3),
}


@pytest.mark.parametrize("name", NAMED)
def test_bounds_are_near_the_portfolio_on_nets(name: str) -> None:
    """Of the minimum, and of the overhead at 60% of store-all's peak, at least these parts are proven needed."""
    make, memory, overhead = NAMED[name]
    step, planner = compile_step(make()), Planner(make())
    least, high = planner.minimum(), planner.store_all().peak_bytes
    assert memory * least <= minimum_bytes_bound(step) <= least
    once, found = sum(step.time_s), planner.solve(high * 3 // 5).time_s
    assert overhead * (found - once) <= makespan_bound(step, high * 3 // 5) - once <= found - once


def step_of(*ops: Op, sizes: dict[str, int], gradients: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> Step:
    tangents = ("t",) if "t" in sizes else ()
    return compile_step(TrainingGraph(ops, sizes, frozenset(), tangents, outputs, gradients).verify())


@pytest.mark.parametrize(
    ("step", "least"),
    [
        (step_of(sizes={}), 0),
        (step_of(Op("b", "backward", 1.0, ("t",), ("g",), 5), sizes={"t": 3, "g": 2}, gradients=("g",)), 10),
        (step_of(Op("f", "forward", 2.0, (), ("a",), 5), sizes={"a": 3, "t": 9}, gradients=("a", "t")), 8),
        (step_of(Op("f", "forward", 0.0, (), ("a", "b")), sizes={"a": 0, "b": 0}, outputs=("a",)), 0),
        (step_of(Op("b", "backward", 0.0, (), ()), sizes={}), 0),
    ],
    ids=["empty", "no forward", "no backward", "zeros", "nothing read or made"],
)
def test_degenerate_steps(step: Step, least: int) -> None:
    assert minimum_bytes_bound(step) == least == step.peak_bytes(step.store_all())
    once = sum(step.time_s)
    assert makespan_bound(step, least) == pytest.approx(once, rel=1e-8)
    assert makespan_bound(step, least) <= once
    assert makespan_bound(step, least - 1) == (0.0 if not step.names else inf)


def test_sizes_above_64_bits() -> None:
    graph = graphs.chain(8, size=2**70)
    step = compile_step(graph)
    least = Planner(graphs.chain(8, size=2**20)).minimum()
    assert 0.99 * least * 2**50 <= minimum_bytes_bound(step) <= 1.01 * least * 2**50
    high = step.peak_bytes(step.store_all())
    assert sum(step.time_s) * 1.1 < makespan_bound(step, high * 3 // 5) < inf


def test_a_gradient_that_can_wait_is_charged_to_what_it_waits_for() -> None:
    """Either the weight's gradient is there, or what it is made of: 5 of the 7 bytes at the second op."""
    ops = (
        Op("d2", "backward", 1.0, ("t",), ("d",)),
        Op("w2", "backward", 1.0, ("d",), ("w",)),
        Op("d1", "backward", 1.0, ("d",), ("e",)),
        Op("d0", "backward", 1.0, ("e",), ("g",), 20),
    )
    step = step_of(*ops, sizes={"t": 1, "d": 7, "w": 5, "e": 2, "g": 3}, gradients=("w", "g"))
    assert minimum_bytes_bound(step) == 2 + 3 + 20 + 5
