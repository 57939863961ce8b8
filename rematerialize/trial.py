"""Predictions beside reality: run planned steps and eager's in turns, and measure peaks and times."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rematerialize.api import unwrap, wrap
from rematerialize.harness import (
    Stepper,
    buffer_state,
    measure_step_peak,
    restore_buffers,
    time_interleaved,
    weightless_loss,
)
from rematerialize.plans import Plan
from rematerialize.prepare import home_of
from rematerialize.targets.factory import blame

ROUNDS, MOST_ROUNDS = 5, 40  # as many in between as fit into
ENOUGH_S = 1.0


@dataclass(frozen=True, slots=True)
class Trial:
    """One real step, of the model as it is or under a plan.

    Attributes
    ----------
    peak_bytes : int
        Above what was resident when it began.
    step_s : float
        Median of some steps.
    ratio : float
        Median of its times over eager's, each pair in the same round.
    """

    peak_bytes: int
    step_s: float
    ratio: float


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put buffers, gradients and the default generators back to where they are now."""
    buffers = buffer_state(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            restore_buffers(model, buffers)
            for parameter, gradient in gradients:
                parameter.grad = gradient


def settle(model: nn.Module, example_inputs: Any) -> None:
    """Run one eager step and forget it: what a model sets at its first call is set before a plan is made for it.

    Swin's layers shrink their windows so. A plan made before holds for the model as it was, and the first planned step
    after one of eager's would plan again. What the step raises, the capture tells better.
    """
    with undisturbed(model), suppress(Exception):
        Stepper(model, example_inputs, weightless_loss).step(0)


def planned_forward(model: nn.Module, plan: Plan, example_inputs: Any) -> Callable[..., Any]:
    """The forward that a model would have under a plan; the model keeps its own."""
    forward: Callable[..., Any] = wrap(model, plan=plan, example_inputs=example_inputs).forward
    unwrap(model)
    return forward


def try_plans(
    model: nn.Module, example_inputs: Any, plans: Sequence[Plan], *, seed: int = 0
) -> tuple[Trial, tuple[Trial, ...]]:
    """Run the model as it is and under each plan, in turns, after a step of each that isn't measured.

    Every output gets a gradient, of a loss that takes no memory: what plans count on, and nothing else. Plans of a
    model that has not run before are best made after `settle`.

    Returns
    -------
    (Trial, tuple of Trial)
        Eager's, and one per plan.

    Raises
    ------
    TargetError
        If the model's own step raises.
    """
    device = home_of(model)
    eager = Stepper(model, example_inputs, weightless_loss)
    steppers = [eager, *(replace(eager, call=planned_forward(model, plan, example_inputs)) for plan in plans)]
    with undisturbed(model):
        with blame("a step of the model"):
            eager.step(seed)
        for stepper in steppers[1:]:
            stepper.step(seed)  # unmeasured: whatever a first step does besides is done by then
        start = time.perf_counter()
        for stepper in steppers:
            stepper.step(seed)
        rounds = min(max(int(ENOUGH_S / (time.perf_counter() - start)), ROUNDS), MOST_ROUNDS)
        peaks = [measure_step_peak(stepper, seed=seed, device=str(device)).peak_bytes for stepper in steppers]
        runs = {str(at): functools.partial(stepper.step, seed) for at, stepper in enumerate(steppers)}
        wait = torch.cuda.synchronize if device.type == "cuda" else None
        times = time_interleaved(runs, reference="0", rounds=rounds, synchronize=wait)
    trials = [Trial(peak, times[str(at)].median_s, times[str(at)].ratio) for at, peak in enumerate(peaks)]
    return trials[0], tuple(trials[1:])


def planned_peak(model: nn.Module, example_inputs: Any, plan: Plan, *, seed: int = 0) -> int:
    """Measured peak in bytes of one step under a plan, above what was resident; eager's step isn't run."""
    device = home_of(model)
    stepper = Stepper(model, example_inputs, weightless_loss, planned_forward(model, plan, example_inputs))
    with undisturbed(model):
        return measure_step_peak(stepper, seed=seed, device=str(device)).peak_bytes


def eager_peak(model: nn.Module, example_inputs: Any, *, seed: int = 0) -> int:
    """Measured peak in bytes of one step of the model as it is, above what was resident.

    Raises
    ------
    TargetError
        If the step raises.
    """
    stepper = Stepper(model, example_inputs, weightless_loss)
    with undisturbed(model), blame("a step of the model"):
        return measure_step_peak(stepper, seed=seed, device=str(home_of(model))).peak_bytes
