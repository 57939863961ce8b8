"""Seconds that a planned call takes besides its kernels: its checks, and what autograd does for each parameter.

A few microseconds per tensor and module, whatever the plan: a tenth and more of a small network's step, nothing of a
large one's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rematerialize.capture import FlatInputs
from rematerialize.prepare import PreparedStep, home_of
from rematerialize.signature import signature

RUNS = 7


def call_seconds(prepared: PreparedStep, model: nn.Module, inputs: FlatInputs) -> float:
    """Return what every call takes besides, by trying it; 0 where the device works on meanwhile, or isn't here.

    Parameters
    ----------
    prepared : PreparedStep
    model : nn.Module
        What it was captured from.
    inputs : FlatInputs
        Of the call.
    """
    if prepared.analytic or home_of(model).type != "cpu":
        return 0.0

    def checks() -> None:
        signature(model, inputs)
        for slot in prepared.captured.slots:
            slot.read()

    wanted = sum(gradient is not None for gradient in prepared.captured.joint.gradients)
    return _median_s(checks) + _median_s(_bookkeeping(wanted))


def _bookkeeping(count: int) -> Callable[[], None]:
    """A step of autograd that does nothing for a number of parameters of one element."""
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(max(count, 1))]
    gradients = [torch.zeros(1) for _ in parameters]
    ready = torch.zeros(0)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(_Nothing.apply(gradients, *parameters), ready)  # type: ignore[no-untyped-call]

    return step


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*parameters)
        return parameters[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors
        return (None, *[gradient.detach() for gradient in ctx.gradients])


def _median_s(run: Callable[[], None]) -> float:
    times = []
    with torch.enable_grad():
        for _ in range(RUNS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times)
