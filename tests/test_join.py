"""The join program is optimal among stacked schedules and says exactly what running its schedules costs."""

from __future__ import annotations

import random
from math import inf

import pytest
from hypothesis import given, settings

from benchmarks.solver import graphs
from benchmarks.solver.graphs import Tape
from rematerialize.ir import Op, TrainingGraph
from rematerialize.simulate import simulate
from rematerialize.solve.join import Solver, join
from rematerialize.solve.problem import Chain
from rematerialize.solve.rotor import solve
from rematerialize.solve.step import Step, compile_step
from rematerialize.solve.towers import find_towers
from tests.machines import close_towers, join_chains, replay_join, search_join
from tests.strategies import training_graphs

ENOUGH = 150
Net = tuple[tuple[Chain, ...], Chain]


def random_chain(count: int, draw: random.Random) -> Chain:
    values = [0, *(draw.randint(1, 6) for _ in range(count))]
    return Chain.of_paper(
        [float(draw.randint(1, 5)) for _ in range(count)],
        [float(draw.randint(1, 5)) for _ in range(count)],
        values,
        [value + draw.randint(0, 6) for value in values[1:]],
        [draw.randint(0, 3) for _ in range(count)],
        [draw.randint(0, 3) for _ in range(count)],
    )


def thresholds(solver: Solver) -> list[tuple[int, float]]:
    """Budgets at which the makespan falls, least first, and the makespans."""
    found: list[tuple[int, float]] = []
    for slot in range(solver.slots + 1):
        solution = solver.solve(slot)
        if solution is not None and (not found or solution.time_s < found[-1][1]):
            found.append((slot * solver.slot_bytes, solution.time_s))
    return found


@pytest.mark.parametrize("lengths", [(1, 1), (2, 1), (2, 2), (1, 3), (3, 2), (3, 3), (1, 1, 1), (2, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_search_over_all_stacked_schedules(lengths: tuple[int, ...], seed: int) -> None:
    draw = random.Random(seed)
    parts = [random_chain(length, draw) for length in lengths]
    towers, head = close_towers(parts, random_chain(1 + (seed > 0 and len(lengths) < 3), draw))
    solver = Solver(towers, head, ENOUGH, slots=ENOUGH)
    last = inf
    for budget, time_s in thresholds(solver)[:3]:
        assert search_join(towers, head, budget) == time_s
        assert search_join(towers, head, budget - 1) == last
        last = time_s


@settings(max_examples=25, deadline=None)
@given(join_chains(2, 2))
def test_equals_the_search_where_half_the_memory_is_enough(net: Net) -> None:
    towers, head = net
    budgets = thresholds(Solver(towers, head, ENOUGH, slots=ENOUGH))
    budget, time_s = budgets[len(budgets) // 2]
    assert search_join(towers, head, budget) == time_s


@settings(max_examples=30, deadline=None)
@given(join_chains(3, 4))
def test_peak_and_time_are_what_the_program_says(net: Net) -> None:
    towers, head = net
    solver = Solver(towers, head, ENOUGH, slots=ENOUGH)
    for budget, time_s in thresholds(solver):
        solution = solver.solve(budget // solver.slot_bytes)
        assert solution is not None
        result = replay_join(towers, head, solution.works)
        assert (result.peak_bytes, result.time_s) == (budget, time_s)


@settings(max_examples=30, deadline=None)
@given(join_chains(1, 5))
def test_one_tower_and_its_head_are_a_chain_that_keeps_the_value_between_them(net: Net) -> None:
    """Rotor's program on the two as one chain may drop that value; keeping it is what it costs more, if anything."""
    (tower,), head = net
    both = Chain(
        tower.forward_s + head.forward_s,
        tower.backward_s + head.backward_s,
        tower.value_bytes + head.value_bytes[1:],
        tower.saved_bytes + head.saved_bytes,
        tower.held_bytes + head.held_bytes[1:],
        tower.transit_peak_bytes + head.transit_peak_bytes,
        tower.saving_peak_bytes + head.saving_peak_bytes,
        tower.backward_peak_bytes + head.backward_peak_bytes,
    )
    table = solve(both, ENOUGH, slot_bytes=1)
    for budget, time_s in thresholds(Solver((tower,), head, ENOUGH, slots=ENOUGH)):
        assert table.time_s(budget) <= time_s
    rich = Solver((tower,), head, ENOUGH, slots=ENOUGH).solve(ENOUGH)
    assert rich is not None
    assert table.time_s(ENOUGH) == rich.time_s


def test_towers_are_found_and_their_ops_complete() -> None:
    step = compile_step(graphs.towers(3, 5))
    found = find_towers(step, 4)
    assert found is not None
    assert [len(ops) for ops in found.towers] == [10, 10, 10]
    assert [step.names[op] for op in found.head] == ["op30", "op31"]
    everything = [*found.head, *found.head_backward, *found.loose]
    for ops in (*found.towers, *found.backward):
        everything += ops
    assert sorted(everything) == list(range(len(step.names)))


def encoder_decoder() -> TrainingGraph:
    """Every decoder layer reads the encoder's output: one join region, two towers."""
    tape, unit = Tape(), 1 << 16
    x, y = tape.input("x", unit), tape.input("y", unit)
    for _ in range(6):
        x = tape.op([x], unit, 1e-3, "i", 64)
    for _ in range(4):
        y = tape.op([y], unit, 1e-3, "i", 64)
    for _ in range(5):
        y = tape.op([tape.op([y, x], unit, 1e-3, "i")], unit, 1e-3, "io", 64)
    return tape.graph(tape.op([y], 4, 1e-6, "i"))


def test_an_encoder_and_a_decoder_are_towers_up_to_the_first_cross_attention() -> None:
    step = compile_step(encoder_decoder())
    found = find_towers(step, 4)
    assert found is not None
    assert [len(ops) for ops in found.towers] == [6, 4]


@pytest.mark.parametrize(
    "graph", [graphs.chain(10), graphs.gpt(1), graphs.unet(2), graphs.densenet((3, 3)), graphs.lstm(4)]
)
def test_no_plans_where_there_are_no_towers(graph: TrainingGraph) -> None:
    assert list(join(compile_step(graph), ())) == []


def shared_weights() -> TrainingGraph:
    """Siamese towers: the gradients of the weights of both are added up."""
    names, ops = ("l", "r"), []
    sizes = {"x": 8, "out": 4, "dout": 4}
    for tower in names:
        for at in range(1, 7):
            sizes |= {f"{tower}{at}": 8, f"d{tower}{at - 1}": 8, f"w{tower}{at}": 2, f"w{at}": 2}
            before = f"{tower}{at - 1}" if at > 1 else "x"
            ops.append(Op(f"f{tower}{at}", "forward", 1.0, (before,), (f"{tower}{at}",)))
        sizes[f"d{tower}6"] = 8
    ops.append(Op("loss", "forward", 1.0, ("l6", "r6"), ("out",)))
    ops.append(Op("dloss", "backward", 1.0, ("dout", "l6", "r6"), ("dl6", "dr6")))
    for at in range(6, 0, -1):
        for tower in names:
            before = f"{tower}{at - 1}" if at > 1 else "x"
            writes = (f"d{tower}{at - 1}", f"w{tower}{at}")
            ops.append(Op(f"b{tower}{at}", "backward", 1.0, (f"d{tower}{at}", before, f"{tower}{at}"), writes))
        ops.append(Op(f"add{at}", "backward", 0.0, (f"wl{at}", f"wr{at}"), (f"w{at}",)))
    gradients = tuple(f"w{at}" for at in range(1, 7))
    return TrainingGraph(tuple(ops), sizes, frozenset({"x"}), ("dout",), ("out",), gradients).verify()


def check_plans(graph: TrainingGraph, step: Step) -> list[tuple[int, float]]:
    found = []
    for plan in join(step, ()):
        names = [step.names[op] for op in plan.order]
        result = simulate(graph, names[: plan.split], names[plan.split :])
        assert result.peak_bytes == step.peak_bytes(plan)
        found.append((result.peak_bytes, result.time_s))
    return found


def test_towers_that_share_weights_reach_lower_than_reversing_them_side_by_side() -> None:
    graph = shared_weights()
    step = compile_step(graph)
    found = find_towers(step, 4)
    assert found is not None
    assert len(found.loose) == 6
    full, least = step.peak_bytes(step.store_all()), min(check_plans(graph, step))
    assert least[0] < 0.7 * full


def test_plans_of_an_encoder_decoder_are_valid() -> None:
    graph = encoder_decoder()
    assert len(check_plans(graph, compile_step(graph))) > 5


@settings(max_examples=40, deadline=None)
@given(training_graphs(max_forward=10))
def test_plans_are_valid_on_random_steps(graph: TrainingGraph) -> None:
    check_plans(graph, compile_step(graph))


def test_three_unequal_towers_reach_below_a_third_of_store_all() -> None:
    graph = graphs.towers()
    step = compile_step(graph)
    full, time_s = step.peak_bytes(step.store_all()), step.duration_s(step.store_all().order)
    found = check_plans(graph, step)
    assert min(found)[0] < full / 3
    assert min(time for peak, time in found if peak <= full / 2) < 1.22 * time_s
