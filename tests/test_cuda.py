"""The promises on a GPU: masks, gradients, and the caching allocator's own peak. Skipped without one."""

from __future__ import annotations

import pytest
import torch

import rematerialize as remat
from rematerialize.harness import Stepper, buffer_state, compare_steps, measure_step_peak, run_step
from rematerialize.zoo import MODELS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PEAK_TOLERANCE = 0.01
PEAK_SLACK_BYTES = 64 * 1024


def on_gpu(name: str) -> Stepper:
    spec = MODELS[name]
    module, inputs = spec.build("test")
    moved = (
        {key: value.cuda() for key, value in inputs.items()}
        if isinstance(inputs, dict)
        else tuple(value.cuda() for value in inputs)
    )
    return Stepper(module.cuda(), moved, spec.loss_of)


@pytest.mark.parametrize("budget", ["100%", "50%", "minimum"])
@pytest.mark.parametrize("name", ["gpt", "bert", "resnet50", "unet", "autoencoder"])
def test_a_step_on_the_gpu_is_eagers_step_within_the_budget(name: str, budget: str) -> None:
    stepper = on_gpu(name)
    start = buffer_state(stepper.module)
    eager = run_step(stepper, seed=3, buffers=start)
    least = remat.plan(stepper.module, stepper.inputs, activation_budget="100%").minimum_bytes
    asked = least if budget == "minimum" else budget
    plan = remat.plan(stepper.module, stepper.inputs, activation_budget=asked)
    remat.wrap(stepper.module, plan=plan, example_inputs=stepper.inputs)
    assert compare_steps(eager, run_step(stepper, seed=3, buffers=start)).exact
    measured = measure_step_peak(stepper, seed=3, device="cuda").peak_bytes
    assert measured <= plan.budget_bytes
    assert abs(measured - plan.peak_bytes) <= PEAK_TOLERANCE * measured + PEAK_SLACK_BYTES


def test_a_step_survives_a_process_limited_to_its_budget() -> None:
    stepper = on_gpu("gpt")
    plan = remat.plan(stepper.module, stepper.inputs, activation_budget="50%")
    remat.wrap(stepper.module, plan=plan, example_inputs=stepper.inputs)
    stepper.step(0)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    fraction = (torch.cuda.memory_reserved() + 2 * plan.budget_bytes) / total
    torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0))
    try:
        stepper.step(1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
