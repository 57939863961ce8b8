"""The schedule that searches edit: its memory is the judge's, and a deletion is priced as if it were done."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest

from benchmarks.solver import graphs
from rematerialize.ir import Op, TrainingGraph
from rematerialize.solve.native import FlatStep, Workbench, available
from rematerialize.solve.step import Plan, Step, compile_step

pytestmark = pytest.mark.skipif(not available, reason="no compiled kernel")

SPACING = 8  # slots per execution of a bench that isn't varied (kernel.h)


def where_a_workspace_goes() -> TrainingGraph:
    """Deleting f2's second run deletes f1's, whose workspace was the peak, in the middle of what is held instead."""
    ops = (
        Op("f1", "forward", 1.0, ("x",), ("a1",), 100),
        Op("f2", "forward", 1.0, ("a1",), ("a2",)),
        Op("f3", "forward", 1.0, ("a2",), ("a3",)),
        Op("b3", "backward", 1.0, ("a3", "t"), ("g",)),
        Op("b2", "backward", 1.0, ("a2", "g"), ("dx",)),
    )
    sizes = dict.fromkeys(("x", "t", "a1", "a3", "g", "dx"), 5) | {"a2": 50}
    return TrainingGraph(ops, sizes, frozenset({"x"}), ("t",), (), ("dx",)).verify()


MADE: dict[str, Callable[[], TrainingGraph]] = {
    "resnet": lambda: graphs.resnet((1, 1)),
    "unet": lambda: graphs.unet(3),
    "lstm": lambda: graphs.lstm(12),
    "towers": lambda: graphs.towers(3, 6),
    "random": lambda: graphs.random_dag(60, seed=3),
    "many blocks": lambda: graphs.chain(900, uneven=True),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("varied", [False, True])
def test_memory_stays_exact_through_searches(name: str, varied: bool) -> None:
    step = compile_step(MADE[name]())
    bench = Workbench(FlatStep(step), 5 * len(step.names), varied=varied)
    for share in (80, 55, 35):
        assert bench.load(step.store_all())
        full = bench.peak_bytes()
        bench.descend(full * share // 100, noise=0.3)
        assert bench.peak_bytes() == step.peak_bytes(bench.plan())
        bench.lower(full * share // 110, 2_000, seed=share)
        assert bench.peak_bytes() == step.peak_bytes(bench.plan())
        bench.improve(bench.peak_bytes(), 2_000, threshold=0.03, seed=share)
        plan = bench.plan()
        assert bench.peak_bytes() == step.peak_bytes(plan)
        assert bench.time_s == pytest.approx(step.duration_s(plan.order))


def recomputing(step: Step) -> Iterator[Plan]:
    """Plans that recompute more and more."""
    bench = Workbench(FlatStep(step), 5 * len(step.names))
    for share in (80, 60, 40):
        assert bench.load(step.store_all())
        bench.descend(bench.peak_bytes() * share // 100)
        yield bench.plan()


def test_a_deletion_takes_along_what_was_computed_only_for_it() -> None:
    step = compile_step(where_a_workspace_goes())
    again = Plan((0, 1, 2, 3, 0, 1, 4), 3)
    bench = Workbench(FlatStep(step), 20)
    assert bench.load(again)
    peak = bench.peak_bytes()
    assert consider(bench, 5, peak) == (1, 2.0)
    assert bench.spend(peak)
    assert bench.plan() == step.store_all()


def consider(bench: Workbench, at: int, budget: int) -> tuple[int, float]:
    """What deleting an execution of the plan that was loaded would come to: whether it fits, and seconds."""
    saved_s = ctypes.c_double()
    function = bench._library.consider
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    verdict = function(bench._bench, slot_of(at), budget, ctypes.byref(saved_s))
    return int(verdict), saved_s.value


def slot_of(at: int) -> int:
    return at * SPACING + SPACING - 1


@pytest.mark.parametrize("name", MADE)
def test_a_deletion_that_is_only_considered_is_priced_as_one_that_is_done(name: str) -> None:
    step = compile_step(MADE[name]())
    bench = Workbench(FlatStep(step), 5 * len(step.names))
    library, address = bench._library, bench._bench
    library.has_previous.argtypes = library.retain.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.retain.restype = None
    told = {-1: 0, 0: 0, 1: 0}
    for plan in recomputing(step):
        again = [at for at, op in enumerate(plan.order) if op < step.forwards and op in plan.order[:at]]
        for at in again[:: max(len(again) // 40, 1)]:
            assert bench.load(plan)
            if not library.has_previous(address, slot_of(at)):
                continue
            peak, before_s = bench.peak_bytes(), bench.time_s
            library.retain(address, slot_of(at))
            without, saved_s = step.peak_bytes(bench.plan()), before_s - bench.time_s
            # Both sides of where it begins to fit, and the peak, which it may leave as it is.
            for budget in {peak, max(without, peak), max(without - 1, peak), peak + (without - peak) // 2}:
                if budget < peak:
                    continue
                assert bench.load(plan)
                verdict, considered_s = consider(bench, at, budget)
                told[verdict] += 1
                assert bench.plan() == plan
                assert bench.peak_bytes() == peak
                if verdict >= 0:
                    assert verdict == (without <= budget)
                if verdict == 1:
                    assert considered_s == saved_s
    assert told[0] > 0
    assert told[1] > 0
    assert told[-1] < told[0] + told[1]
