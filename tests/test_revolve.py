"""Revolve takes exactly the binomial number of steps, in exactly the slots that it was given."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings

from benchmarks.solver import graphs
from rematerialize.ir import TrainingGraph
from rematerialize.simulate import simulate
from rematerialize.solve.problem import Action, Chain, spell
from rematerialize.solve.revolve import advances, repetitions, revolve, schedule, split
from rematerialize.solve.rotor import solve
from rematerialize.solve.step import compile_step
from tests.machines import replay
from tests.strategies import training_graphs

LENGTHS = range(1, 61)
SLOTS = range(1, 9)


@cache
def least(length: int, slots: int) -> int:
    """Forward steps of the best schedule, by trying every place of the next value."""
    if length == 1:
        return 0
    if slots == 1:
        return length * (length - 1) // 2
    return min(k + least(length - k, slots - 1) + least(k, slots) for k in range(1, length))


def uniform(length: int, extra: int = 0) -> Chain:
    """Unit times, unit values, ``extra`` bytes saved beside each output."""
    values = [0] + [1] * length
    return Chain.of_paper([1.0] * length, [1.0] * length, values, [1 + extra] * length, [0] * length, [0] * length)


@pytest.mark.parametrize("slots", SLOTS)
def test_steps_equal_the_binomial_closed_form(slots: int) -> None:
    for length in LENGTHS:
        actions = schedule(length, slots)
        assert sum(action.kind == "F" for action in actions) == advances(length, slots)
        assert advances(length, slots) == least(length, slots)
        assert [action.stage for action in actions if action.kind == "B"] == list(range(length - 1, -1, -1))


@pytest.mark.parametrize("slots", SLOTS)
def test_no_step_runs_more_often_than_the_repetition_number(slots: int) -> None:
    for length in LENGTHS:
        actions = schedule(length, slots)
        runs = [actions.count(Action("F", stage)) for stage in range(length)]
        assert max(runs) <= repetitions(length, slots)


@pytest.mark.parametrize("slots", SLOTS)
def test_slots_are_what_the_judge_counts(slots: int) -> None:
    """Values other than the input, the value reached, and beside them one output and two gradients."""
    for length in range(2, 25):
        peak = replay(uniform(length), schedule(length, slots)).peak_bytes
        assert peak <= slots + 3
        if length > slots:
            assert peak == slots + 3


@pytest.mark.parametrize("slots", range(1, 6))
def test_persistent_dp_finds_no_better_schedule_where_saving_more_than_one_stage_is_too_much(slots: int) -> None:
    extra = 100
    for length in range(2, 20):
        table = solve(uniform(length, extra), extra + 60, slots=200)
        assert table.time_s(extra + slots + 3) == advances(length, slots) + 2 * length


def test_literal_schedule_of_ten_steps_and_three_slots() -> None:
    """The example of the paper: values at 0, 4 and 7, 15 forward steps, none more often than twice."""
    assert advances(10, 3) == 15
    assert split(10, 3) == 4
    assert spell(schedule(10, 3)) == (
        "F0 F1 F2 F3 F4 F5 F6 F7 F8 S9 B9 F7 S8 B8 S7 B7 F4 F5 S6 B6 S5 B5 S4 B4 F0 F1 F2 S3 B3 S2 B2 S1 B1 S0 B0"
    )


def test_plans_of_a_chain_are_a_frontier() -> None:
    graph = graphs.chain(40)
    step = compile_step(graph)
    found = []
    for plan in revolve(step, ()):
        names = [step.names[op] for op in plan.order]
        result = simulate(graph, names[: plan.split], names[plan.split :])
        assert result.peak_bytes == step.peak_bytes(plan)
        found.append((result.peak_bytes, result.time_s))
    assert len(found) >= 10
    assert found == sorted(found)
    assert [time_s for _, time_s in found] == sorted((time_s for _, time_s in found), reverse=True)
    assert found[0][0] < step.peak_bytes(step.store_all()) // 10


@settings(max_examples=40, deadline=None)
@given(training_graphs())
def test_plans_are_valid_on_random_steps(graph: TrainingGraph) -> None:
    step = compile_step(graph)
    for plan in revolve(step, ()):
        names = [step.names[op] for op in plan.order]
        assert simulate(graph, names[: plan.split], names[plan.split :]).peak_bytes == step.peak_bytes(plan)
