"""Seconds that a planned call takes besides its kernels: its checks, and what autograd does for each parameter.

Some microseconds per tensor and module, whatever the plan: up to a fifth of a small network's step, nothing of a
large one's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from rematerialize.capture import CapturedStep, FlatInputs, flatten_inputs
from rematerialize.emit import EmittedStep
from rematerialize.prepare import PreparedStep, home_of
from rematerialize.runtime import TrainingStep, check_surroundings, needed_outputs
from rematerialize.signature import signature
from rematerialize.torch_private import tree_flatten

RUNS = 15


def call_seconds(prepared: PreparedStep, model: nn.Module, inputs: FlatInputs) -> float:
    """Return what every call takes besides, by trying it; 0 where the device works on meanwhile, or isn't here.

    Nothing that belongs to the user is changed: the step that is tried has kernels that do nothing, and stand-ins for
    the parameters, which share their memory.

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
    hollow = _Hollow(prepared.captured)
    args, kwargs = inputs.rebuild(inputs.tensors)

    def run() -> None:
        for parameter in model.parameters():  # as `zero_grad` does
            _ = parameter.grad
        flat = flatten_inputs(args, kwargs)
        check_surroundings((*model.parameters(), *model.buffers(), *flat.tensors))
        signature(model, flat)
        for slot in prepared.captured.slots:
            slot.read()
        hollow.run()

    with torch.enable_grad(), torch.autograd.set_detect_anomaly(False):
        hollow.load([*(slot.read() for slot in prepared.captured.slots), *inputs.tensors])
        return _median_s(run)


class _Hollow:
    """A step whose kernels do nothing: it hands out tensors of the right shapes that nobody has written."""

    def __init__(self, captured: CapturedStep) -> None:
        joint = captured.joint
        self._blanks = _Blanks()
        outputs = tuple(needed_outputs(joint))
        primals = tuple(range(len(joint.primals)))
        emitted = EmittedStep(
            forward=self._graph([joint.outputs[index] for index in outputs]),
            backward=self._graph(joint.gradients),
            forward_primals=primals,
            backward_primals=primals,
            backward_tangents=tuple(range(len(joint.tangents))),
            outputs=outputs,
            saved_outputs=(),
            recomputes=False,
        )
        self._step = _HollowStep(replace(captured, left=()), emitted)
        self._primals: list[Tensor] = []

    def load(self, primals: list[Tensor]) -> None:
        """Take stand-ins for the primals: gradients and hooks are theirs alone."""
        self._primals = [primal.detach().requires_grad_(primal.requires_grad) for primal in primals]

    def run(self) -> None:
        """A forward and a backward through all outputs."""
        for primal in self._primals:
            primal.grad = None
        outputs = [leaf for leaf in tree_flatten(self._step(self._primals))[0] if isinstance(leaf, Tensor)]
        outputs = [output for output in outputs if output.requires_grad]
        torch.autograd.backward(outputs, [self._blanks.like(output) for output in outputs])

    def _graph(self, nodes: Iterable[fx.Node | None]) -> fx.GraphModule:
        values = [None if node is None else node.meta["val"] for node in nodes]
        return cast(fx.GraphModule, _HollowGraph(self._blanks, values))


class _HollowStep(TrainingStep):
    """Its backward is the same, whichever tangents are there."""

    def backward(self, box: Any) -> fx.GraphModule:
        return self.emitted.backward


@dataclass(frozen=True, slots=True)
class _HollowGraph:
    blanks: _Blanks
    values: list[Tensor | None]

    def forward(self, boxed: list[Tensor]) -> list[Tensor | None]:
        boxed.clear()
        return [None if value is None else self.blanks.like(value) for value in self.values]


class _Blanks:
    """Tensors that share memory nobody writes to: the system gives none."""

    def __init__(self) -> None:
        self._storages: dict[torch.dtype, torch.UntypedStorage] = {}

    def like(self, value: Tensor) -> Tensor:
        """Of the shape, type and layout of another."""
        if value.layout != torch.strided:
            return torch.empty(value.shape, dtype=value.dtype, layout=value.layout)
        reach = 1 + sum(stride * (size - 1) for stride, size in zip(value.stride(), value.shape, strict=True))
        storage = self._storages.get(value.dtype)
        if storage is None or storage.nbytes() < reach * value.element_size():
            storage = torch.empty(max(reach, 1), dtype=value.dtype).untyped_storage()
            self._storages[value.dtype] = storage
        return torch.empty(0, dtype=value.dtype).set_(storage, 0, value.shape, value.stride())


def _median_s(run: Callable[[], None]) -> float:
    return statistics.median(_times(run))


def _times(run: Callable[[], None]) -> Iterator[float]:
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        yield time.perf_counter() - start
