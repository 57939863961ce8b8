"""The persistent DP is optimal in its class and says exactly what running its schedules costs."""

from __future__ import annotations

import random
import time
from math import inf

import pytest
from hypothesis import given, settings

from benchmarks.solver import graphs
from rematerialize.ir import TrainingGraph
from rematerialize.solve.problem import Chain, spell
from rematerialize.solve.rotor import STAGES, Table, rotor, solve
from rematerialize.solve.stages import Stages
from rematerialize.solve.step import compile_step
from tests.machines import chain_graph, paper_chains, replay, search
from tests.strategies import training_graphs

ENOUGH = 200  # more than any small chain needs


def random_chain(count: int, seed: int) -> Chain:
    draw = random.Random(seed)
    values = [0, *(draw.randint(1, 9) for _ in range(count))]
    return Chain.of_paper(
        [float(draw.randint(1, 9)) for _ in range(count)],
        [float(draw.randint(1, 9)) for _ in range(count)],
        values,
        [value + draw.randint(0, 9) for value in values[1:]],
        [draw.randint(0, 4) for _ in range(count)],
        [draw.randint(0, 4) for _ in range(count)],
    )


def telling_budgets(table: Table) -> list[int]:
    """Both sides of every budget at which the table says that the makespan changes."""
    steps = [slot * table.slot_bytes for slot in table.thresholds()]
    return sorted({budget - less for budget in steps for less in (0, 1)})


@settings(max_examples=40, deadline=None)
@given(paper_chains(max_length=5))
def test_equals_a_search_over_all_persistent_schedules(chain: Chain) -> None:
    table = solve(chain, ENOUGH)
    assert table.exact
    for budget in telling_budgets(table):
        assert table.time_s(budget) == search(chain, budget)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_search_on_longer_chains(seed: int) -> None:
    chain = random_chain(6 + seed % 2, seed)
    table = solve(chain, ENOUGH)
    for slot in table.thresholds()[:4]:
        budget = slot * table.slot_bytes
        assert table.time_s(budget) == search(chain, budget)
        assert table.time_s(budget - 1) == search(chain, budget - 1)


@settings(max_examples=60, deadline=None)
@given(paper_chains(max_length=8))
def test_peak_and_time_are_what_the_table_says(chain: Chain) -> None:
    table = solve(chain, ENOUGH)
    for slot in table.thresholds():
        result = replay(chain, table.actions(slot))
        assert result.peak_bytes == slot * table.slot_bytes
        assert result.time_s == table.time_s(slot * table.slot_bytes)


@settings(max_examples=60, deadline=None)
@given(paper_chains(max_length=8))
def test_rounded_sizes_still_fit(chain: Chain) -> None:
    values = (0, *(size * 1001 + at for at, size in enumerate(chain.value_bytes[1:])))
    big = Chain.of_paper(
        chain.forward_s,
        chain.backward_s,
        values,
        [value + 997 * at for at, value in enumerate(values[1:])],
        [3] * len(chain),
        [5] * len(chain),
    )
    exact, rounded = solve(big, 10**5, slots=10**5), solve(big, 10**5, slots=60)
    assert exact.exact
    assert not rounded.exact
    for slot in rounded.thresholds():
        budget = slot * rounded.slot_bytes
        result = replay(big, rounded.actions(slot))
        assert result.peak_bytes <= budget
        assert result.time_s == rounded.time_s(budget) >= exact.time_s(budget)


def test_store_all_at_its_peak_and_nothing_one_byte_below_the_minimum() -> None:
    chain = random_chain(7, 11)
    table = solve(chain, ENOUGH)
    least, most = table.thresholds()[0], table.thresholds()[-1]
    assert spell(table.actions(most)) == "S0 S1 S2 S3 S4 S5 S6 B6 B5 B4 B3 B2 B1 B0"
    assert table.time_s(least * table.slot_bytes - 1) == inf
    assert table.cheapest(least * table.slot_bytes - 1) == -1
    assert search(chain, least * table.slot_bytes - 1) == inf


def test_literal_schedules_of_a_uniform_chain() -> None:
    uniform = Chain.of_paper([1.0] * 4, [1.0] * 4, [0, 1, 1, 1, 1], [1] * 4, [0] * 4, [0] * 4)
    table = solve(uniform, 20)
    assert [spell(table.actions(slot)) for slot in table.thresholds()] == [
        "F0 F1 F2 S3 B3 F0 F1 S2 B2 S0 S1 B1 B0",
        "S0 F1 F2 S3 B3 S1 S2 B2 B1 B0",
        "S0 S1 S2 S3 B3 B2 B1 B0",
    ]


def test_a_step_that_is_a_chain_is_cut_into_exactly_its_stages() -> None:
    chain = random_chain(9, 5)
    cut = Stages(compile_step(chain_graph(chain)), 100).chain
    for name in ("forward_s", "saving_peak_bytes", "saved_bytes"):
        assert sum(getattr(cut, name)[:-1]) > 0
    step = compile_step(chain_graph(chain))
    stages = Stages(step, 100)
    table = solve(stages.chain, ENOUGH)
    for slot in table.thresholds():
        plan = stages.plan(table.actions(slot))
        assert step.peak_bytes(plan) <= slot * table.slot_bytes
        assert step.duration_s(plan.order) <= table.time_s(slot * table.slot_bytes)


@settings(max_examples=40, deadline=None)
@given(training_graphs())
def test_plans_are_valid_on_random_steps(graph: TrainingGraph) -> None:
    step = compile_step(graph)
    backward = sum(op.phase == "backward" for op in graph.ops)
    for plan in rotor(step, (step.peak_bytes(step.store_all()),)):
        step.timeline(plan)
        assert sum(op >= step.forwards for op in plan.order) == backward


def test_plans_of_a_uniform_chain_reach_far_below_store_all() -> None:
    step = compile_step(graphs.chain(50))
    full = step.peak_bytes(step.store_all())
    peaks = [step.peak_bytes(plan) for plan in rotor(step, (full // 2,))]
    assert min(peaks) < full // 8
    assert any(full // 3 < peak <= full // 2 for peak in peaks)


def test_what_all_stages_read_is_no_part_of_what_goes_from_one_to_the_next() -> None:
    """A transformer's mask and rotary embeddings: rotor's users hand them to every module of their sequence."""

    def least(shared: int) -> float:
        tape = graphs.Tape()
        x = tape.input("x", 1 << 20)
        masks = [tape.op([x], 1 << 10, 1e-3, "i") for _ in range(shared)]
        for _ in range(50):
            x = tape.op([x, *masks], 1 << 20, 1e-3, "i", 64)
        step = compile_step(tape.graph(tape.op([x], 4, 1e-6, "i")))
        assert all(len(values) <= 1 for values in Stages(step, STAGES).crossing[2:])
        full = step.peak_bytes(step.store_all())
        return min(step.peak_bytes(plan) for plan in rotor(step, (full // 2,))) / full

    assert least(4) == pytest.approx(least(0), rel=0.05)


def test_a_very_long_chain_is_cut_to_a_bounded_number_of_stages() -> None:
    step = compile_step(graphs.chain(20_000))
    start = time.monotonic()
    stages = Stages(step, STAGES)
    assert len(stages.chain) <= STAGES
    assert time.monotonic() - start < 10
