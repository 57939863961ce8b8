"""Spliced plans: what plans are joined to, that the judge agrees, and that nothing is lost by it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given

from benchmarks.solver import graphs
from rematerialize.ir import Op, TrainingGraph
from rematerialize.simulate import simulate
from rematerialize.solve.descent import squeeze
from rematerialize.solve.native import FlatStep, Workbench, available
from rematerialize.solve.splice import Splicer
from rematerialize.solve.step import Plan, Step, compile_step
from tests import hostile
from tests.strategies import training_graphs

PLENTY = 1_000
SHORTEST = "f1 f2 f3 | b4 b3 b2 b1"
EARLY = "f1 f2 f3 | f3 b4 b3 b2 b1"  # makes a3 again before b4
LATE = "f1 f2 f3 | b4 b3 b2 f2 b1"  # makes a2 again after b2


def step_of(*ops: Op, outputs: tuple[str, ...] = (), **sizes: int) -> TrainingGraph:
    """A step whose values have a size of 1 where none is given, and whose last op makes its one gradient."""
    made = [name for op in ops for name in op.outputs]
    storages = {"x": 1, "t": 1} | dict.fromkeys(made, 1) | sizes
    return TrainingGraph(ops, storages, frozenset({"x"}), ("t",), outputs, (made[-1],)).verify()


def three_layers(*, b4_bytes: int = 0, b2_bytes: int = 0) -> TrainingGraph:
    """A chain; ``b1`` reads ``a2`` once more, so it can be kept over ``b2`` or made again after it."""
    return step_of(
        Op("f1", "forward", 1.0, ("x",), ("a1",)),
        Op("f2", "forward", 1.0, ("a1",), ("a2",)),
        Op("f3", "forward", 1.0, ("a2",), ("a3",)),
        Op("b4", "backward", 1.0, ("a3", "t"), ("g3",), b4_bytes),
        Op("b3", "backward", 1.0, ("a2", "g3"), ("g2",)),
        Op("b2", "backward", 1.0, ("a1", "g2"), ("g1",), b2_bytes),
        Op("b1", "backward", 1.0, ("a1", "a2", "g1"), ("g0",)),
    )


def parsed(step: Step, text: str) -> Plan:
    """A plan from names, with a bar where the backward starts."""
    forward, backward = (part.split() for part in text.split("|"))
    return Plan(tuple(step.names.index(name) for name in (*forward, *backward)), len(forward))


def spliced(graph: TrainingGraph, *texts: str, level: int = PLENTY) -> str:
    """What some plans are joined to, as names again."""
    step = compile_step(graph)
    plan = Splicer(step).splice([parsed(step, text) for text in texts], level)
    if plan is None:
        return "none"
    names = [step.names[op] for op in plan.order]
    return f"{' '.join(names[: plan.split])} | {' '.join(names[plan.split :])}".strip()


def peak(graph: TrainingGraph, text: str) -> int:
    forward, backward = (part.split() for part in text.split("|"))
    return simulate(graph, forward, backward).peak_bytes


# By hand.


def test_each_part_comes_from_the_plan_that_is_faster_there() -> None:
    assert spliced(three_layers(), EARLY, LATE) == SHORTEST
    assert spliced(three_layers(), LATE, EARLY) == SHORTEST


def test_a_part_that_needs_more_than_the_level_is_not_taken() -> None:
    graph = three_layers(b2_bytes=9)
    assert (peak(graph, EARLY), peak(graph, LATE)) == (13, 12)  # a1, g2, g1 and nine more while b2 runs; a2 too
    assert spliced(graph, EARLY, LATE, level=13) == SHORTEST
    assert spliced(graph, EARLY, LATE, level=12) == LATE
    assert spliced(graph, EARLY, LATE, level=11) == "none"


def test_plans_may_fit_together_where_none_of_them_does_alone() -> None:
    graph = three_layers(b4_bytes=9, b2_bytes=9)
    wide_late = "f1 f2 f3 | b4 f1 f2 b3 b2 b1"  # holds a2 while b2 runs
    wide_early = "f1 f2 f3 | f1 b4 f2 b3 b2 f2 b1"  # holds a1 while b4 runs
    joined = "f1 f2 f3 | b4 f1 f2 b3 b2 f2 b1"
    assert (peak(graph, wide_late), peak(graph, wide_early), peak(graph, joined)) == (13, 13, 12)
    assert spliced(graph, wide_late, wide_early, level=12) == joined


def test_no_plan_goes_on_with_what_reads_a_value_that_it_has_dropped() -> None:
    graph = three_layers()
    low = "f1 f2 f3 | b4 f1 f2 b3 f1 b2 f1 f2 b1"
    assert (peak(graph, low), peak(graph, SHORTEST)) == (4, 5)
    assert spliced(graph, SHORTEST, low, level=4) == low  # the other's end would fit, but reads a1 and a2


def test_executions_in_vain_are_left_out() -> None:
    """One plan makes a value early for its own end; what goes on with the other's end doesn't read it."""
    graph = step_of(
        Op("f1", "forward", 1.0, ("x",), ("a1",)),
        Op("f2", "forward", 2.0, ("a1",), ("a2",)),
        Op("f3", "forward", 1.0, ("a1",), ("e",)),
        Op("b3", "backward", 1.0, ("a2", "t"), ("g2",)),
        Op("b2", "backward", 1.0, ("a1", "g2"), ("g1",), 9),
        Op("b1", "backward", 1.0, ("a1", "e", "g1"), ("g0",)),
    )
    early, late = "f1 f2 f3 | b3 b2 b1", "f1 f2 | f2 b3 b2 f3 b1"
    assert (peak(graph, early), peak(graph, late)) == (13, 12)
    assert spliced(graph, early, late, level=12) == "f1 f2 | b3 b2 f3 b1"


def test_plans_that_order_their_backwards_differently_are_joined_where_both_have_run_the_same() -> None:
    graph = step_of(
        Op("f1", "forward", 1.0, ("x",), ("a",)),
        Op("f2", "forward", 1.0, ("x",), ("b",)),
        Op("f3", "forward", 1.0, ("a", "b"), ("y",)),
        Op("b1", "backward", 1.0, ("a", "t"), ("ga",)),
        Op("b2", "backward", 1.0, ("b", "t"), ("gb",)),
        Op("b3", "backward", 1.0, ("a", "ga", "gb"), ("g",)),
        Op("b4", "backward", 1.0, ("a", "g"), ("g0",)),
        outputs=("y",),
    )
    early, late = "f1 f2 f3 | f2 b1 b2 b3 b4", "f1 f2 f3 | b2 b1 b3 f1 b4"
    assert spliced(graph, early, late) == "f1 f2 f3 | b2 b1 b3 b4"
    later = "f1 f2 f3 | b2 f1 b1 b3 b4"  # where it has run b2, the first one never has run b2 alone
    assert spliced(graph, early, later) in (early, later)


def test_an_output_made_twice_by_the_way_counts_twice() -> None:
    """``f1`` makes an output of the step along with ``a``; who goes on from the second run reads its new instance."""
    graph = step_of(
        Op("f1", "forward", 1.0, ("x",), ("a", "h")),
        Op("f2", "forward", 1.0, ("h",), ("z",), 30),
        Op("f3", "forward", 5.0, ("x",), ("q",), 31),
        Op("b1", "backward", 1.0, ("a", "q", "t"), ("g1",)),
        Op("b2", "backward", 1.0, ("g1",), ("g2",), 30),
        Op("b3", "backward", 1.0, ("z", "g2"), ("g3",)),
        outputs=("h",),
        h=10,
        a=5,
    )
    again, kept = "f1 f2 f3 | f1 b1 f3 b2 b3", "f1 f3 | b1 b2 f2 b3"  # f3 runs a second time for nothing
    joined = "f1 f3 | f1 b1 b2 f2 b3"
    assert (peak(graph, again), peak(graph, kept), peak(graph, joined)) == (44, 47, 52)
    assert spliced(graph, again, kept, level=52) == kept
    assert spliced(graph, again, kept, level=44) == again


# Whatever the plans.


def pool(graph: TrainingGraph, seeds: int = 3) -> tuple[Step, list[Plan]]:
    """Plans of a step: those that some searches from store-all down come through, and end with."""
    step = compile_step(graph)
    flat, found = FlatStep(step), [step.store_all()]
    for seed in range(seeds):
        bench = Workbench(flat, 4 * len(step.names) + 8)
        downs = list(squeeze(bench, step.store_all(), work=2_000, finest=0.01, stride=0.1 + 0.05 * seed, seed=seed))
        for plan in downs[:: max(len(downs) // 5, 1)]:
            bench.load(plan)
            bench.improve(bench.peak_bytes(), 1_000, seed=seed)
            found += [plan, bench.plan()]
    return step, found


def judged(graph: TrainingGraph, step: Step, plan: Plan) -> tuple[int, float]:
    names = [step.names[op] for op in plan.order]
    result = simulate(graph, names[: plan.split], names[plan.split :])
    return result.peak_bytes, result.time_s


def check(graph: TrainingGraph) -> int:
    """Assert what a splice promises at every peak of a pool; return how often it beat all plans of the pool."""
    step, plans = pool(graph)
    known = [judged(graph, step, plan) for plan in plans]
    splicer, gains = Splicer(step), 0
    for level in sorted({peak_bytes for peak_bytes, _ in known} | {min(known)[0] - 1}):
        found = splicer.splice(plans, level)
        best = min((time_s for peak_bytes, time_s in known if peak_bytes <= level), default=float("inf"))
        if found is None:
            assert best == float("inf")
            continue
        peak_bytes, time_s = judged(graph, step, found)
        assert peak_bytes <= level
        assert time_s <= best * (1 + 1e-12)
        gains += time_s < best * (1 - 1e-9)
        shuffled = random.Random(level).sample(plans, len(plans))
        other = Splicer(step).splice(shuffled, level)
        assert other is not None
        assert judged(graph, step, other)[1] == pytest.approx(time_s, rel=1e-12)
    return gains


needs_kernel = pytest.mark.skipif(not available, reason="without the compiled kernel nothing is searched")


@needs_kernel
@given(training_graphs())
def test_never_slower_and_never_above_the_level_on_random_steps(graph: TrainingGraph) -> None:
    check(graph)


@needs_kernel
@pytest.mark.parametrize("graph", [graphs.unet(2), graphs.towers(2, 4), graphs.chain(12, uneven=True)])
def test_never_slower_and_never_above_the_level_on_nets(graph: TrainingGraph) -> None:
    check(graph)


@needs_kernel
def test_beats_every_plan_of_its_pool_on_some_step() -> None:
    assert sum(check(graphs.random_dag(60, seed=seed)) for seed in range(4))


@pytest.mark.parametrize("name", hostile.SMALL)
def test_one_plan_stays_as_it_is_on_a_hostile_step(name: str) -> None:
    step = compile_step(hostile.SMALL[name]())
    plan = step.store_all()
    least = step.peak_bytes(plan)
    splicer = Splicer(step)
    assert splicer.splice([plan], least) == splicer.splice([plan, plan], least) == plan
    assert splicer.splice([plan], least - 1) is None


def without_one_phase() -> Iterator[tuple[str, TrainingGraph, str]]:
    forward = Op("f1", "forward", 1.0, ("x",), ("a",))
    yield "no backward", TrainingGraph((forward,), {"x": 1, "a": 1}, frozenset({"x"}), (), ("a",), ()), "f1 |"
    backward = Op("b1", "backward", 1.0, ("x",), ("g",))
    yield "no forward", TrainingGraph((backward,), {"x": 1, "g": 1}, frozenset({"x"}), (), (), ("g",)), "| b1"
    late = TrainingGraph((forward, backward), {"x": 1, "a": 1, "g": 1}, frozenset({"x"}), (), (), ("a", "g"))
    yield "a gradient made by a forward op", late, "| b1 f1"


@pytest.mark.parametrize(
    ("graph", "text"), [pytest.param(graph, text, id=name) for name, graph, text in without_one_phase()]
)
def test_a_step_of_one_phase(graph: TrainingGraph, text: str) -> None:
    assert spliced(graph.verify(), text, text) == text


def test_a_gradient_of_the_forward_is_made_after_the_last_backward_op() -> None:
    forward = Op("f1", "forward", 1.0, ("x",), ("a",))
    graph = TrainingGraph((forward,), {"x": 1, "a": 1}, frozenset({"x"}), (), (), ("a",)).verify()
    assert spliced(graph, "| f1", "| f1") == "| f1"
