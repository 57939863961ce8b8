"""Run an emitted step inside autograd, as if it were the model's own forward.

Two autograd functions carry it. ``_Compute`` runs the forward graph and, in the backward pass, the backward
graph. ``_Expose`` hands the outputs to the user; in the backward pass it takes the tangents first and leaves
them in a box, so that ``_Compute`` can free each one after its last use: autograd itself holds the arguments of
a running backward to its end.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from rematerialize import torch_private as private
from rematerialize.capture.aliasing import phase_of, tensors_of
from rematerialize.capture.step import CapturedStep
from rematerialize.capture.strides import channels_last, laid_alike
from rematerialize.emit import EmittedStep
from rematerialize.errors import RematerializeError
from rematerialize.tangents import for_tangents

_TWICE = (
    "Trying to backward through the graph a second time: the rematerialized step freed its saved tensors during "
    "the first backward. Specify retain_graph=True in the first backward if you need to go through it again."
)

_MOST_DERIVED = 16  # backwards for other tangents that a step keeps: one per set of absent ones and layouts
_DOUBLE = (
    "double backward: this differentiates gradients that a rematerialized step computed, and its backward can't be "
    "differentiated. Take the inner gradient inside the wrapped module's forward (torch.autograd.grad(..., "
    "create_graph=True) is then part of the plan), or call rematerialize.unwrap(model) first"
)
_AUTOCAST = (
    "backward() was called under autocast, where eager would compute {op} of this step in {dtype} rather than {given}: "
    "call backward() outside of the autocast context, as torch recommends"
)
_BATCHED = (
    "gradients of this step were asked for in a batch (is_grads_batched=True, or jacobian with vectorize=True), which "
    "would multiply the memory that was planned: ask for one at a time, with retain_graph=True"
)
_SETTINGS = (
    "{name} was {before} in the forward of this step and is {now} in its backward, which recomputes a part of the "
    "forward: call backward() under the settings of the forward, or wrap with a budget at which nothing is recomputed"
)


_HOOKED = (
    "output {index} of this step has a hook or retain_grad(), and the forward itself goes on with it: the hook would "
    "see only the part of its gradient that comes from outside of the step. Register it inside the forward, or unwrap"
)

_TELLS = (
    "an autograd.Function of this step calls set_materialize_grads(False), and got no gradient for some of its outputs "
    "only: its backward was recorded with gradients for all. Let it take zeros instead, let the loss read every output "
    "(0 * output.sum()), or unwrap the model"
)


def check_surroundings(tensors: Iterable[Tensor]) -> None:
    """Refuse to run a step inside of what it can't take part in; ``tensors`` are all that it reads.

    Raises
    ------
    RematerializeError
        Under ``torch.func`` transforms, forward-mode differentiation or hooks on saved tensors.
    """
    if private.transform_around() or private.carry_tangents(tensors):
        raise RematerializeError(
            "a torch.func transform (grad, vmap, jvp) or forward-mode differentiation goes through this model, and a "
            "planned step can't take part: use it inside the wrapped module's forward, where it is planned, or call "
            "rematerialize.unwrap(model) first"
        )
    if private.saving_hooks_around():
        raise RematerializeError(
            "saved_tensors_hooks are active around this model (torch.autograd.graph.save_on_cpu and "
            "torch.utils.checkpoint with use_reentrant=False are such hooks), and what a planned step saves doesn't go "
            "through them: call the wrapped model outside of them"
        )


@dataclass(slots=True)
class _Box:
    """What the two functions of one step hand to each other; a tangent is None where an output got no gradient.

    ``absent`` has the positions of such tangents among the step's, also of those that no op of the backward reads,
    ``strides`` those of the tangents that are laid out otherwise than in the trace.
    """

    primals: list[Tensor] | None = None
    outputs: list[Tensor] | None = None
    tangents: list[Tensor | None] | None = None
    absent: frozenset[int] = frozenset()
    strides: tuple[tuple[int, tuple[int, ...]], ...] = ()
    anchors: tuple[Tensor, ...] = ()
    features: tuple[tuple[int, weakref.ref[Tensor]], ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """A captured step with emitted graphs: call it with the flat primals, get the model's output.

    ``features`` are the outputs that the forward goes on with, by their positions.
    """

    captured: CapturedStep
    emitted: EmittedStep
    features: frozenset[int] = field(init=False)
    _derived: dict[Any, fx.GraphModule] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", frozenset(_features(self.captured.joint)))

    def backward(self, box: _Box) -> fx.GraphModule:
        """The backward graph for the tangents that are there, in their layouts."""
        key = (box.absent, box.strides)
        if not any(key):
            return self.emitted.backward
        if key not in self._derived:
            if len(self._derived) >= _MOST_DERIVED:
                self._derived.clear()
            self._derived[key] = for_tangents(self.emitted.backward, box.absent, dict(box.strides))
        return self._derived[key]

    def __call__(self, primals: Sequence[Tensor]) -> Any:
        joint = self.captured.joint
        for index in self.captured.asked:
            primals[len(self.captured.slots) + index].requires_grad_()
        box = _Box(primals=list(primals))
        differentiable = [
            primal for primal, gradient in zip(primals, joint.gradients, strict=True) if gradient is not None
        ]
        # Where no gradient is defined (every output is an input, or norm(0)), outputs still require grad as in eager.
        differentiable = differentiable or [primal for primal in primals if primal.requires_grad]
        token = _Compute.apply(self, box, *differentiable)  # type: ignore[no-untyped-call]
        exposed = _Expose.apply(token, self, box)  # type: ignore[no-untyped-call]
        values: dict[int, Tensor] = dict(zip(self.emitted.outputs, exposed, strict=True))
        box.features = tuple((i, weakref.ref(value)) for i, value in values.items() if i in self.features)
        results = self._with_aliases(primals, values)
        self.captured.leave()
        return self.captured.pack_outputs(results)

    def _with_aliases(self, primals: Sequence[Tensor], values: Mapping[int, Tensor]) -> list[Tensor]:
        """The user's outputs: values, and what shares memory with them or with inputs, viewed again from these."""
        return [self._output(index, primals, values) for index in range(len(self.captured.joint.aliases))]

    def _output(self, index: int, primals: Sequence[Tensor], values: Mapping[int, Tensor]) -> Tensor:
        if index in values:
            return values[index]
        alias = self.captured.joint.aliases[index]
        if alias.kind == "input":
            return primals[alias.index]
        # The base may be an output that is a view itself.
        base = primals[alias.index] if alias.kind == "input_view" else self._output(alias.index, primals, values)
        node = self.captured.joint.outputs[index]
        assert node is not None
        return private.view_again(base, node.meta["val"], alias)


def _features(joint: private.JointTrace) -> Iterator[int]:
    """Positions of the outputs from which the forward computes others."""
    for index, (alias, node) in enumerate(zip(joint.aliases, joint.outputs, strict=False)):
        if alias.kind == "value" and node is not None:
            readers = (reader for reader in node.users if reader.op == "call_function")
            if any(phase_of(reader) == "forward" for reader in readers):
                yield index


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
        ctx.step, ctx.box, ctx.settings = step, box, private.numeric_settings()
        # Through save_for_backward, autograd notices a parameter that is changed before the backward.
        ctx.save_for_backward(*[primals[i] for i in emitted.backward_primals])
        return differentiable[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        step: TrainingStep = ctx.step
        if ctx.saved_values is None:
            raise RuntimeError(_TWICE)
        _check_settings(step, ctx.settings)
        boxed = [*ctx.saved_values, *ctx.box.tangents, *ctx.saved_tensors]
        ctx.box.tangents = None
        if not private.backward_keeps_graph():
            ctx.saved_values = None
        differentiated_again = torch.is_grad_enabled()
        with torch.no_grad(), private.disable_autocast():
            gradients = step.backward(ctx.box).forward(boxed)
        wanted = [g for g, node in zip(gradients, step.captured.joint.gradients, strict=True) if node is not None]
        if not wanted:
            return (None,) * len(ctx.needs_input_grad)
        if differentiated_again:
            anchors, ctx.box.anchors = ctx.box.anchors, ()
            wanted = _Once.apply(len(anchors), *anchors, *wanted)  # type: ignore[no-untyped-call]
        return (None, None, *wanted)


class _Once(torch.autograd.Function):
    """Gradients under ``create_graph=True``: as in eager they require grad, whatever the loss; their own refuse.

    The anchors tie them to all that they depend on: a second derivative with respect to it must come here to be
    refused, and not be taken for zero (``allow_unused=True``).
    """

    @staticmethod
    def forward(ctx: Any, count: int, *anchors_and_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return anchors_and_gradients[count:]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(_DOUBLE)


def _check_settings(step: TrainingStep, before: dict[str, Any]) -> None:
    """Refuse a backward under settings for which eager's would not be the recorded one."""
    joint = step.captured.joint
    device = joint.primals[0].meta["val"].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        for node in joint.graph.nodes:
            if node.op == "call_function" and phase_of(node) == "backward":
                given = [t.dtype for source in node.all_input_nodes for _, t in tensors_of(source.meta["val"])]
                if private.autocast_changes(node.target, given, device, dtype):
                    raise RuntimeError(_AUTOCAST.format(op=node.target, dtype=dtype, given=given[0]))
    for name, now in private.numeric_settings().items():
        if now != before[name] and step.emitted.recomputes:
            raise RuntimeError(_SETTINGS.format(name=name, before=before[name], now=now))


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
    def backward(ctx: Any, *received: Tensor | None) -> tuple[Tensor, None, None]:
        step: TrainingStep = ctx.step
        _ = ctx.saved_tensors  # raises when the user changed an output in place that the backward reads
        for index, feature in ctx.box.features:
            value = feature()
            if value is not None and (value._backward_hooks or value.retains_grad):
                raise RuntimeError(_HOOKED.format(index=index))
        if any(tangent is not None and private.is_batched(tangent) for tangent in received):
            raise RuntimeError(_BATCHED)
        by_position = dict(zip(step.emitted.outputs, received, strict=True))
        paired = step.captured.joint.tangents
        ctx.box.absent = frozenset(i for i, (_, position) in enumerate(paired) if by_position[position] is None)
        for reached in step.captured.joint.tellers if ctx.box.absent else ():
            if len({each <= ctx.box.absent for each in reached}) > 1:
                raise RuntimeError(_TELLS)
        tangents, strides = [], []
        for index in step.emitted.backward_tangents:
            node, position = paired[index]
            tangent = by_position[position]
            if tangent is not None and tangent.shape != node.meta["val"].shape:
                tangent = tangent.expand(node.meta["val"].shape)  # fake kernels return [1] for some that return []
            if tangent is not None and tangent.is_conj() != node.meta["val"].is_conj():
                tangent = _marked(tangent)
            tangents.append(tangent)
            if tangent is not None and not _laid_as_traced(tangent, node.meta["val"]):
                strides.append((index, tangent.stride()))
        ctx.box.tangents, ctx.box.strides = tangents, tuple(strides)
        if torch.is_grad_enabled():
            ctx.box.anchors = (ctx.token, *(t for t in received if t is not None and t.requires_grad))
        return ctx.token.new_zeros(0), None, None


def _laid_as_traced(tangent: Tensor, traced: Tensor) -> bool:
    """Whether kernels take a tangent as they took the traced one: those that ask for a memory format look at the
    strides of dimensions that have one element, too.
    """
    return laid_alike(tangent.stride(), traced) and channels_last(tangent) == channels_last(traced)


def _marked(value: Tensor) -> Tensor:
    """The same complex values, with the mark of a conjugate where they have none and without where they have one."""
    return value.resolve_conj() if value.is_conj() else torch.conj_physical(value).conj()
