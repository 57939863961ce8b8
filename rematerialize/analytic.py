"""From a model to a training graph without a device: fake tensors and costs by formula.

A model that is built under `on_fake_tensors` has parameters without storage, so the training step of one that no
machine at hand could hold is captured in the memory that its trace takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from rematerialize import torch_private as private
from rematerialize.capture import capture, lower
from rematerialize.cost import AnalyticCostModel
from rematerialize.device_table import DeviceSpec
from rematerialize.ir import TrainingGraph
from rematerialize.prepare import bind_inputs, check_model, group_captured

T = TypeVar("T")


def on_fake_tensors(factory: Callable[[], T]) -> T:
    """Return what ``factory`` returns when every tensor that it makes is fake: shape and type, but no storage.

    Torch can't cast or move a module of fake tensors ("Couldn't swap"): for another type than float32, let the
    factory build it under `torch.set_default_dtype`.

    Examples
    --------
    >>> layer = on_fake_tensors(lambda: nn.Linear(1_000_000, 1_000_000))  # 4 TB of weights
    >>> tuple(layer.weight.shape)
    (1000000, 1000000)
    """
    with private.fake_mode():
        return factory()


def analytic_graph(
    model: nn.Module, example_inputs: Any, device: DeviceSpec, *, split_recurrences: bool = False
) -> TrainingGraph:
    """Capture one training step and cost it by the roofline of a device; nothing is executed.

    Parameters
    ----------
    model : nn.Module
        In train mode; its parameters may be fake.
    example_inputs : tuple or dict
        Positional or keyword arguments of one call; fake ones must come from the same `on_fake_tensors` as the model.
    device : DeviceSpec
        Decides the costs. The kernels are those that torch picks for the device that the tensors say they are on.
    split_recurrences : bool
        Run fused LSTMs over chunks of time.

    Raises
    ------
    CaptureError
        If the step can't be captured.
    RematerializeError
        If the model is not a module in train mode, or the inputs are neither a tuple nor a dict.
    """
    check_model(model)
    inputs = bind_inputs(model.forward, example_inputs)
    captured = capture(model, model.forward, inputs, split_recurrences=split_recurrences)
    kernels = group_captured(captured)
    return lower(
        kernels,
        AnalyticCostModel(device)(kernels.kernels),
        module_names={module: name for name, module in model.named_modules()},
        primal_names=captured.primal_names(),
    )
