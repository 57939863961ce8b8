"""Emitted graphs do what the schedule says: so many calls, the same values, the promised memory."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rematerialize.capture.inplace import call_in_place
from rematerialize.harness import measure_peak
from rematerialize.prepare import PreparedStep, bind_inputs, prepare
from rematerialize.schedule import Schedule
from rematerialize.simulate import simulate
from rematerialize.torch_private import BoxedCodeGen
from tests.twins import SEED, assert_same_step, gradients_of, run_by, same, step_of
from tests.zoo_small import SMALL, Loss, Small, rows

pytestmark = pytest.mark.usefixtures("quick_plans")

PEAK_SLACK_BYTES = 64 * 1024


def prepared_twin(small: Small) -> tuple[nn.Module, nn.Module, PreparedStep]:
    torch.manual_seed(1)
    eager = small.make()
    ours = copy.deepcopy(eager)
    return eager, ours, prepare(ours, ours.forward, bind_inputs(ours.forward, small.inputs))


def changed(prepared: PreparedStep, forward: list[str], backward: list[str]) -> Schedule:
    """A schedule by hand."""
    result = simulate(prepared.graph, forward, backward)
    return replace(
        prepared.planner.store_all(),
        forward=tuple(forward),
        backward=tuple(backward),
        peak_bytes=result.peak_bytes,
        time_s=result.time_s,
    )


def recomputing(prepared: PreparedStep, names: list[str]) -> Schedule:
    """Store-all, but what is named is computed again when the backward starts."""
    stored = prepared.planner.store_all()
    return changed(prepared, list(stored.forward), [*names, *stored.backward])


def calls(module: fx.GraphModule) -> Counter[str]:
    """Calls by target; views and items of tuples are no work."""
    found = Counter(
        node.target.__name__ if hasattr(node.target, "__name__") else str(node.target)
        for node in module.graph.nodes
        if node.op == "call_function"
    )
    views = ("t.default", "view.default", "expand.default", "detach.default", "getitem")
    return Counter({target: count for target, count in found.items() if target not in views})


CHAIN = Small(lambda: Loss(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.Dropout(0.5)), (rows(),))


# Structure.


def test_a_store_all_plan_emits_each_call_once() -> None:
    _, _, prepared = prepared_twin(CHAIN)
    emitted = prepared.build(prepared.planner.store_all()).emitted
    assert calls(emitted.forward) == {
        "addmm.default": 2,
        "gelu.default": 1,
        "empty_strided.default": 1,
        "bernoulli_.float": 1,
        "div_.Scalar": 1,
        "mul.Tensor": 1,
        "pow.Tensor_Scalar": 1,
        "mean.default": 1,
    }
    backward = calls(emitted.backward)
    assert backward["mm.default"] == 3  # two weights, one input; the first layer's input needs none
    assert backward["gelu_backward.grad_input"] == 1  # over the gradient that it gets
    assert backward["addmm.default"] == backward["empty_strided.default"] == 0


@pytest.mark.parametrize("name", SMALL)
def test_store_all_runs_every_call_of_every_kernel_once(name: str) -> None:
    _, _, prepared = prepared_twin(SMALL[name])
    emitted = prepared.build(prepared.planner.store_all()).emitted
    planned = Counter(
        str(call_in_place(form, node.args, node.kwargs)[0] if form else node.target)
        for kernel in prepared.kernels.kernels
        for node, form in kernel.calls
    )
    found = Counter(
        str(node.target)
        for module in (emitted.forward, emitted.backward)
        for node in module.graph.nodes
        if node.op == "call_function"
    )
    assert {target: found[target] for target in planned} == planned
    beside = {target for target in found if target not in planned}
    joint = prepared.kernels.normal.joint.graph
    assert beside <= {str(n.target) for n in joint.nodes if n not in made_by(prepared)}


@pytest.mark.parametrize("name", ["convnet", "attention"])
def test_no_python_stands_between_a_step_and_its_kernels(name: str) -> None:
    _, ours, prepared = prepared_twin(SMALL[name])
    step = prepared.build(prepared.planner.solve(prepared.planner.minimum()))
    loss = run_by(ours, step)(*SMALL[name].inputs)
    entered: list[str] = []
    inside = [module.forward.__func__.__code__ for module in (step.emitted.forward, step.emitted.backward)]

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_back is not None and frame.f_back.f_code in inside:
            entered.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        ours(*SMALL[name].inputs)
        loss.backward()
    finally:
        sys.setprofile(None)
    assert torch._ops.__file__ not in entered  # our own functions are few


def test_calls_of_ops_take_no_name_that_a_value_has() -> None:
    graph = fx.Graph()
    graph.set_codegen(BoxedCodeGen())
    x = graph.create_node("placeholder", "x", name="do_aten_mul_Tensor")
    graph.output(
        (graph.call_function(torch.ops.aten.mul.Tensor, (x, 3.0)), graph.call_function(len, ("= torch.ops.",)))
    )
    made, length = fx.GraphModule(nn.Module(), graph).forward([torch.ones(2)])
    assert made.tolist() == [3.0, 3.0]
    assert length == 12


def made_by(prepared: PreparedStep) -> set[fx.Node]:
    """What kernels compute; all other nodes are views."""
    return {node for kernel in prepared.kernels.kernels for node, _ in kernel.calls}


def test_an_op_that_is_recomputed_once_is_emitted_exactly_twice() -> None:
    eager, ours, prepared = prepared_twin(CHAIN)
    (gelu,) = [op.name for op in prepared.graph.ops if op.target == "aten.gelu.default"]
    step = prepared.build(recomputing(prepared, [gelu]))
    assert calls(step.emitted.forward)["gelu.default"] == 1
    assert calls(step.emitted.backward)["gelu.default"] == 1
    stored = prepared.build(prepared.planner.store_all())
    extra = sum(calls(step.emitted.backward).values()) - sum(calls(stored.emitted.backward).values())
    assert extra == 1
    assert_same_step(step_of(eager, *CHAIN.inputs), step_of(run_by(ours, step), *CHAIN.inputs))


def test_a_random_op_that_is_recomputed_replays_its_mask_and_leaves_the_generator() -> None:
    eager, ours, prepared = prepared_twin(CHAIN)
    (mask,) = [op.name for op in prepared.graph.ops if "bernoulli" in op.target]
    step = prepared.build(recomputing(prepared, [mask, mask]))
    assert calls(step.emitted.forward)["get_generator_state"] == 1
    backward = calls(step.emitted.backward)
    assert backward["bernoulli_.float"] == backward["empty_strided.default"] == 2
    assert backward["swap_generator_state"] == backward["set_generator_state"] == 2
    run_by(ours, step)
    for turn in range(2):
        assert_same_step(step_of(eager, *CHAIN.inputs, seed=turn), step_of(ours, *CHAIN.inputs, seed=turn))


def test_a_batch_norm_that_is_recomputed_takes_its_stateless_form() -> None:
    small = Small(lambda: Loss(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32)), (rows(),))
    eager, ours, prepared = prepared_twin(small)
    (norm,) = [op.name for op in prepared.graph.ops if "batch_norm_legit" in op.target]
    step = prepared.build(recomputing(prepared, [norm]))
    assert calls(step.emitted.forward)["_native_batch_norm_legit.default"] == 1
    assert calls(step.emitted.backward)["_native_batch_norm_legit.no_stats"] == 1
    assert calls(step.emitted.backward)["_native_batch_norm_legit.default"] == 0
    assert calls(step.emitted.backward)["copy_.default"] == 0
    run_by(ours, step)
    for turn in range(2):
        assert_same_step(step_of(eager, *small.inputs, seed=turn), step_of(ours, *small.inputs, seed=turn))
    assert ours[1].num_batches_tracked.item() == 2


# Values: whatever is recomputed, wherever.


@pytest.mark.parametrize("name", SMALL)
def test_a_step_that_recomputes_everything_it_may_is_eagers(name: str) -> None:
    small = SMALL[name]
    eager, ours, prepared = prepared_twin(small)
    again = [op.name for op in prepared.graph.ops if op.recomputable]
    assert again
    run_by(ours, prepared.build(recomputing(prepared, again)))
    for turn in range(2):
        assert_same_step(step_of(eager, *small.inputs, seed=turn), step_of(ours, *small.inputs, seed=turn))


@pytest.mark.parametrize("name", SMALL)
def test_a_step_whose_forward_computes_everything_twice_is_eagers(name: str) -> None:
    small = SMALL[name]
    eager, ours, prepared = prepared_twin(small)
    stored = prepared.planner.store_all()
    again = {op.name for op in prepared.graph.ops if op.recomputable}
    twice = [run for op in stored.forward for run in ([op, op] if op in again else [op])]
    run_by(ours, prepared.build(changed(prepared, twice, list(stored.backward))))
    assert_same_step(step_of(eager, *small.inputs), step_of(ours, *small.inputs))


# Memory.


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("share", ["all", "minimum"])
def test_the_measured_peak_is_at_most_the_planned_one_and_next_to_it(name: str, share: str) -> None:
    small = SMALL[name]
    eager, ours, prepared = prepared_twin(small)
    budget = prepared.planner.store_all().peak_bytes if share == "all" else prepared.planner.minimum()
    schedule = prepared.planner.solve(budget)
    run_by(ours, prepared.build(schedule))
    assert_same_step(step_of(eager, *small.inputs), step_of(ours, *small.inputs))

    def step() -> None:
        ours(*small.inputs).backward()

    ours.zero_grad()
    measured = measure_peak(step).peak_bytes
    assert measured <= schedule.peak_bytes <= budget
    assert schedule.peak_bytes - measured <= PEAK_SLACK_BYTES


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_the_emitted_tensors_in_their_parameters_layout(name: str) -> None:
    small = SMALL[name]
    _, ours, prepared = prepared_twin(small)
    step = prepared.build(prepared.planner.solve(prepared.planner.minimum()))
    emitted: list[int] = []
    backward = step.emitted.backward.forward

    def noting(boxed: list[Any]) -> Any:
        gradients = backward(boxed)
        assert boxed == []
        emitted.extend(g.data_ptr() for g in gradients if isinstance(g, Tensor))
        return gradients

    step.emitted.backward.forward = noting
    run_by(ours, step)(*small.inputs).backward()
    parameters = list(ours.parameters())
    assert sorted(emitted) == sorted(p.grad.data_ptr() for p in parameters if p.grad is not None)
    assert len(set(emitted)) == len(emitted) == len(parameters)
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        assert gradient.stride() == parameter.stride()
        assert gradient.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def test_a_second_step_on_the_same_gradients_adds_to_them_in_place() -> None:
    small = SMALL["convnet"]
    eager, ours, prepared = prepared_twin(small)
    run_by(ours, prepared.build(prepared.planner.solve(prepared.planner.minimum())))
    homes: list[list[int]] = []
    for turn in range(2):
        step_of(eager, *small.inputs, seed=turn)
        step_of(ours, *small.inputs, seed=turn)
        homes.append([p.grad.data_ptr() for p in ours.parameters() if p.grad is not None])
    assert homes[0] == homes[1]
    assert all(same(a, gradients_of(ours)[name]) for name, a in gradients_of(eager).items())


def test_nothing_of_a_step_stays_in_memory_but_gradients() -> None:
    small = SMALL["attention"]
    _, ours, prepared = prepared_twin(small)
    run_by(ours, prepared.build(prepared.planner.solve(prepared.planner.minimum())))
    torch.manual_seed(SEED)

    def step() -> None:
        ours(*small.inputs).backward()

    result = measure_peak(step)
    assert result.end_bytes == sum(p.numel() * p.element_size() for p in ours.parameters())
    assert measure_peak(step).end_bytes == 0
