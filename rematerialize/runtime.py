"""Run an emitted step inside autograd, as if it were the model's own forward.

Two autograd functions carry it. ``_Compute`` runs the forward graph and, in the backward pass, the backward
graph. ``_Expose`` hands the outputs to the user; in the backward pass it takes the tangents first and leaves
them in a box, so that ``_Compute`` can free each one after its last use: autograd itself holds the arguments of
a running backward to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rematerialize import torch_private as private
from rematerialize.capture.step import CapturedStep
from rematerialize.emit import EmittedStep

_TWICE = (
    "Trying to backward through the graph a second time: the rematerialized step freed its saved tensors during "
    "the first backward. Specify retain_graph=True in the first backward if you need to go through it again."
)


@dataclass(slots=True)
class _Box:
    """What the two functions of one step hand to each other."""

    primals: list[Tensor] | None = None
    outputs: list[Tensor] | None = None
    tangents: list[Tensor] | None = None


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """A captured step with emitted graphs: call it with the flat primals, get the model's output."""

    captured: CapturedStep
    emitted: EmittedStep

    def __call__(self, primals: Sequence[Tensor]) -> Any:
        joint = self.captured.joint
        box = _Box(primals=list(primals))
        differentiable = [
            primal for primal, gradient in zip(primals, joint.gradients, strict=True) if gradient is not None
        ]
        token = _Compute.apply(self, box, *differentiable)  # type: ignore[no-untyped-call]
        exposed = _Expose.apply(token, self, box)  # type: ignore[no-untyped-call]
        values: dict[int, Tensor] = dict(zip(self.emitted.outputs, exposed, strict=True))
        results = []
        for index, alias in enumerate(joint.aliases):
            if alias.kind == "value":
                results.append(values[index])
            elif alias.kind == "input":
                results.append(primals[alias.index])
            else:
                base = primals[alias.index] if alias.kind == "input_view" else values[alias.index]
                node = joint.outputs[index]
                assert node is not None
                results.append(private.view_again(base, node.meta["val"], alias))
        return self.captured.pack_outputs(results)


def needed_outputs(joint: private.JointTrace) -> list[int]:
    """Positions among the joint outputs that the forward must return as values."""
    user = [i for i, alias in enumerate(joint.aliases) if alias.kind == "value"]
    return [*user, *range(len(joint.aliases), len(joint.outputs))]


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: TrainingStep, box: _Box, *differentiable: Tensor) -> Tensor:
        emitted = step.emitted
        primals = box.primals
        assert primals is not None
        box.primals = None
        with private.disable_autocast():
            results = emitted.forward.forward([primals[i] for i in emitted.forward_primals])
        count = len(emitted.outputs)
        box.outputs = list(results[:count])
        # An output that is saved too will know this step as its maker: saved as itself, it would never be freed.
        returned = {id(output) for output in box.outputs}
        ctx.saved_values = [v.detach() if id(v) in returned else v for v in results[count:]]
        ctx.step, ctx.box = step, box
        # Through save_for_backward, autograd notices a parameter that is changed before the backward.
        ctx.save_for_backward(*[primals[i] for i in emitted.backward_primals])
        return differentiable[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        step: TrainingStep = ctx.step
        if ctx.saved_values is None:
            raise RuntimeError(_TWICE)
        boxed = [*ctx.saved_values, *ctx.box.tangents, *ctx.saved_tensors]
        ctx.box.tangents = None
        if not private.backward_keeps_graph():
            ctx.saved_values = None
        with private.disable_autocast():
            gradients = step.emitted.backward.forward(boxed)
        wanted = [g for g, node in zip(gradients, step.captured.joint.gradients, strict=True) if node is not None]
        return (None, None, *wanted)


class _Expose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, step: TrainingStep, box: _Box) -> tuple[Tensor, ...]:
        outputs = box.outputs
        assert outputs is not None
        box.outputs = None
        emitted, joint = step.emitted, step.captured.joint
        with_tangent = {position for _, position in joint.tangents}
        plain = [out for out, i in zip(outputs, emitted.outputs, strict=True) if i not in with_tangent]
        ctx.mark_non_differentiable(*plain)
        ctx.set_materialize_grads(False)
        ctx.step, ctx.box, ctx.token = step, box, token
        late = set(emitted.saved_outputs)
        ctx.save_for_backward(*[out for out, i in zip(outputs, emitted.outputs, strict=True) if i in late])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *received: Tensor | None) -> tuple[Tensor, None, None]:
        step: TrainingStep = ctx.step
        _ = ctx.saved_tensors  # raises when the user changed an output in place that the backward reads
        by_position = dict(zip(step.emitted.outputs, received, strict=True))
        tangents = []
        for index in step.emitted.backward_tangents:
            node, position = step.captured.joint.tangents[index]
            tangents.append(_tangent(by_position[position], node.meta["val"], ctx.token.device))
        ctx.box.tangents = tangents
        return ctx.token.new_zeros(0), None, None


def _tangent(received: Tensor | None, like: Tensor, device: torch.device) -> Tensor:
    """A tangent in the layout that the backward graph was traced with; zeros for an unused output."""
    if received is not None and received.stride() == like.stride():
        return received
    fresh = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return fresh.zero_() if received is None else fresh.copy_(received)
