"""Blocks are Chen's: boundaries are kept, everything else but the last block runs exactly twice."""

from __future__ import annotations

from collections import Counter
from math import isqrt

import pytest
from hypothesis import given, settings

from benchmarks.solver.graphs import Tape, gpt, resnet, unet
from rematerialize.ir import TrainingGraph
from rematerialize.simulate import simulate
from rematerialize.solve.blocks import blocks, per_block
from rematerialize.solve.reaches import Reaches
from rematerialize.solve.segments import Segmentation
from rematerialize.solve.step import Step, compile_step
from tests.strategies import training_graphs


def saved_both_ways(length: int) -> TrainingGraph:
    """A chain of ops whose backward reads input and output, so that every value is wanted again."""
    tape = Tape()
    x = tape.input("x", 1 << 10)
    for _ in range(length):
        x = tape.op([x], 1 << 10, 1e-3, "io", 64)
    return tape.graph(tape.op([x], 4, 1e-6, "i"))


def runs(step: Step, count: int) -> list[int]:
    counted = Counter(per_block(Reaches(step), count).order)
    return [counted[op] for op in range(step.forwards)]


@pytest.mark.parametrize("length", [7, 16, 50])
@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_boundaries_and_the_last_block_run_once_and_everything_else_twice(length: int, count: int) -> None:
    step = compile_step(saved_both_ways(length))
    parts = Segmentation(Reaches(step), count, options=False).segments
    boundaries = {part.stop - 1 for part in parts}
    expected = [1 if op in boundaries or op >= parts[-1].start else 2 for op in range(step.forwards)]
    assert runs(step, count) == expected


def test_sqrt_of_n_blocks_keep_the_sqrt_of_n_values() -> None:
    """Peak in values: sqrt(n) boundaries, one block, and what its backward holds."""
    length = 100
    graph = saved_both_ways(length)
    step = compile_step(graph)
    plan = per_block(Reaches(step), isqrt(length))
    unit = 1 << 10
    gradients = 64 * length
    assert step.peak_bytes(plan) <= (2 * isqrt(length) + 4) * unit + gradients
    assert step.peak_bytes(step.store_all()) >= length * unit


@pytest.mark.parametrize("graph", [gpt(2), resnet((2, 2)), unet(3)])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_nothing_runs_more_than_twice(graph: TrainingGraph, count: int) -> None:
    assert max(runs(compile_step(graph), count)) <= 2


@settings(max_examples=60, deadline=None)
@given(training_graphs())
def test_every_plan_is_valid_on_random_steps(graph: TrainingGraph) -> None:
    step = compile_step(graph)
    for plan in blocks(step, ()):
        names = [step.names[op] for op in plan.order]
        assert simulate(graph, names[: plan.split], names[plan.split :]).peak_bytes == step.peak_bytes(plan)
        assert max(Counter(plan.order).values()) <= 2
