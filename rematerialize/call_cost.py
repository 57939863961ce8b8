"""Seconds that a planned call takes besides its kernels: its checks, and what autograd does for each parameter.

Some microseconds per tensor and module, whatever the plan: up to a fifth of a small network's step, nothing of a
large one's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from rematerialize.capture import CapturedStep, FlatInputs, Kernel
from rematerialize.emit import EmittedStep
from rematerialize.harness import weightless_loss
from rematerialize.measure import kept_generator_state
from rematerialize.plans import Plan, as_captured
from rematerialize.prepare import PreparedStep, home_of
from rematerialize.runtime import TrainingStep, needed_outputs
from rematerialize.synthetic import bytes_of, inputs_of, prepare_kernel, refusing_data
from rematerialize.torch_private import disable_autocast
from rematerialize.wrapper import RematerializedForward

RUNS = 15
CACHES = 12 << 20  # bytes: what a step of some milliseconds reads and writes; its calls find caches so
ALL_S, SMALL_BYTES = 5e-3, 8 << 20  # of the kernels that run in between, at most


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
    between = _Between(_others(prepared))
    forward = RematerializedForward(model, _Nothing(), max_plans=1)
    forward.keep(inputs, as_captured(prepared), _HollowStep.of(prepared.captured, between))
    args, kwargs = inputs.rebuild(inputs.tensors)

    def run() -> None:
        for parameter in model.parameters():  # as `zero_grad` does
            _ = parameter.grad
        torch.autograd.backward(weightless_loss(forward.run_planned(args, kwargs)))

    with torch.enable_grad(), torch.autograd.set_detect_anomaly(False):
        run()
        return statistics.median(between.times(run))


class _Nothing:
    """Plans nothing: the one step that is needed is there."""

    def held_bytes(self, model: nn.Module, inputs: FlatInputs) -> int:
        """No budget has to leave room for gradients."""
        return 0

    def __call__(self, model: nn.Module, forward: Callable[..., Any], inputs: FlatInputs) -> tuple[Plan, TrainingStep]:
        raise AssertionError("the inputs are those of the capture")


class _HollowStep(TrainingStep):
    """A step whose kernels do nothing: it hands out tensors of the right shapes that nobody has written.

    It runs with stand-ins for the primals, which share their memory: gradients and hooks are theirs alone.
    """

    __slots__ = ("_primals",)
    _primals: list[Tensor]

    @classmethod
    def of(cls, captured: CapturedStep, between: Callable[[], None]) -> _HollowStep:
        """The step that was captured, with something else for its kernels, and without what they leave in Python."""
        joint = captured.joint
        outputs = tuple(needed_outputs(joint))
        primals = tuple(range(len(joint.primals)))
        emitted = EmittedStep(
            forward=_hollow_graph([joint.outputs[index] for index in outputs], between),
            backward=_hollow_graph(joint.gradients, between),
            forward_primals=primals,
            backward_primals=primals,
            backward_tangents=tuple(range(len(joint.tangents))),
            outputs=outputs,
            saved_outputs=(),
            recomputes=False,
        )
        step = cls(replace(captured, left=()), emitted)
        object.__setattr__(step, "_primals", [])
        return step

    def __call__(self, primals: Sequence[Tensor]) -> Any:
        if not self._primals:
            self._primals.extend(primal.detach().requires_grad_(primal.requires_grad) for primal in primals)
        for primal in self._primals:
            primal.grad = None
        return TrainingStep.__call__(self, self._primals)

    def backward(self, box: Any) -> fx.GraphModule:
        """The same, whichever tangents are there."""
        return self.emitted.backward


def _hollow_graph(nodes: Iterable[fx.Node | None], between: Callable[[], None]) -> fx.GraphModule:
    values = [None if node is None else node.meta["val"] for node in nodes]
    return cast(fx.GraphModule, _HollowGraph(_Blanks(), values, between))


@dataclass(frozen=True, slots=True)
class _HollowGraph:
    blanks: _Blanks
    values: list[Tensor | None]
    between: Callable[[], None]

    def forward(self, boxed: list[Tensor]) -> list[Tensor | None]:
        boxed.clear()
        self.between()
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


def _others(prepared: PreparedStep) -> list[Callable[[], Any]]:
    """A quick kernel of the step for each op that it calls, on synthetic data; none that draws, or reads much."""
    quickest: dict[Any, Kernel] = {}
    for kernel in prepared.kernels.kernels:
        if not kernel.calls or kernel.random or kernel.rng_device or bytes_of(inputs_of(kernel)) > SMALL_BYTES:
            continue
        known = quickest.setdefault(kernel.head.target, kernel)
        if prepared.costs[kernel.name].time_s < prepared.costs[known.name].time_s:
            quickest[kernel.head.target] = kernel
    others = []
    left_s = ALL_S
    with kept_generator_state(quickest.values()), torch.no_grad(), disable_autocast():
        for kernel in sorted(quickest.values(), key=lambda kernel: prepared.costs[kernel.name].time_s):
            left_s -= prepared.costs[kernel.name].time_s
            if left_s < 0:
                break
            with refusing_data():
                run = prepare_kernel(kernel)
                run()
                others.append(run)
    return others


class _Between:
    """What runs in place of kernels, and leaves the caches as they do: full of something else, of data and of code.

    It runs before the call and where the kernels of the forward and of the backward would; its own time isn't counted.
    """

    def __init__(self, kernels: Sequence[Callable[[], Any]]) -> None:
        self._kernels = kernels
        self._data = torch.empty(CACHES, dtype=torch.uint8)
        self._took_s = 0.0

    def __call__(self) -> None:
        start = time.perf_counter()
        self._data.add_(1)
        with torch.no_grad(), disable_autocast():
            for kernel in self._kernels:
                kernel()
        self._took_s += time.perf_counter() - start

    def times(self, run: Callable[[], None]) -> Iterator[float]:
        """Times of runs, without this one's."""
        for _ in range(RUNS):
            self()
            self._took_s = 0.0
            start = time.perf_counter()
            run()
            yield time.perf_counter() - start - self._took_s
