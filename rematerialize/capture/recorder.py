"""The flat function that a trace calls: the user's forward, watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rematerialize import torch_private as private
from rematerialize.capture.autocast import WeightCasts
from rematerialize.capture.flat import FlatInputs, Hole, TensorSlot, homes_of, member, primal_names, swapped
from rematerialize.capture.generators import own_generators, refuse_seeding, unseeded_generators
from rematerialize.capture.known_values import KnownValues
from rematerialize.capture.purity import (
    FunctionCaches,
    Left,
    Values,
    contents,
    holders_of,
    logs_of,
    put_back,
    unchanged_python,
)
from rematerialize.capture.refusals import unchanged_arguments
from rematerialize.capture.watched_calls import watched_calls
from rematerialize.errors import CaptureError
from rematerialize.python_code import Readable, scope_key
from rematerialize.python_state import PythonState, changed, look_around, python_state

_PLAIN_TYPES = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class GradientAskedError(CaptureError):
    """The forward calls ``requires_grad_()`` on some of its inputs, which the trace was told need no gradient."""

    def __init__(self, inputs: tuple[int, ...]) -> None:
        names = ", ".join(f"input {i}" for i in inputs)
        super().__init__(
            f"the forward calls requires_grad_() on {names} at some calls only: call it before the forward"
        )
        self.inputs = inputs


class Recorder:
    """The flat function that is traced: puts tensors into the model, calls it, notes the output structure."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        inputs: FlatInputs,
        slots: tuple[TensorSlot, ...],
        calls: watched_calls,
        poisoned: Values | None,
        start: Values | None,
    ) -> None:
        self.calls = calls
        self.known = KnownValues(inputs.tensors)
        self.poisoned = poisoned
        self.start = start
        known = look_around(list(model.modules()), forward)[2]
        self.read = known.attributes
        self.asking = known.asking
        self.generators = own_generators(model, inputs.leaves)
        self.caches = FunctionCaches()
        self.holders = [*holders_of(model), *logs_of(_logs(known))]
        self.left = Left()
        self.model = model
        self.forward = forward
        self.inputs = inputs
        self.slots = slots
        self.homes = homes_of(model, slots)
        self.trained = [slot.read().requires_grad for slot in slots]
        self.structure: tuple[tuple[Any, ...], private.TreeSpec] | None = None
        self.in_backward = False
        self.casts = WeightCasts([*(slot.read() for slot in slots), *inputs.tensors])
        self.state: PythonState | None = None
        self.marks: list[dict[str, Any]] = []  # the attributes of what the last call was given, before it
        self.versions: list[tuple[Tensor, int]] = []  # of what the last call was given, when it was done
        self.done: list[Any] = []  # what the holders held then

    def __call__(self, *flat: Tensor) -> Sequence[Tensor]:
        self.in_backward = False
        self._dress(flat)
        self.known.start(flat[len(self.slots) :])
        args, kwargs = self.inputs.rebuild(flat[len(self.slots) :])
        with (
            swapped(self.homes, flat),
            self.calls,
            self.calls.checks.watched(),
            private.own_saving_hooks(_refuse_hooks),
        ):
            # Inside the swap: attributes are compared with the values that the swap put there.
            seeding = unseeded_generators(self.generators)
            self.calls.drew = seeding.drew
            with (
                unchanged_python(
                    self.holders,
                    self.caches,
                    self.left,
                    private.origins,
                    read=self.read,
                    given=frozenset(map(id, flat)),
                    start=self.start,
                    poisoned=self.poisoned,
                ),
                unchanged_arguments(args, kwargs),
                seeding,
                private.spied_default_generator(refuse_seeding),
                self.casts.of_call(flat),
            ):
                output = self.forward(*args, **kwargs)
            if self.calls.looked is not None:  # and the forward caught what it raised
                raise self.calls.looked
            self._refuse_moving()
            self._refuse_reassigned(flat)
            self._refuse_unfrozen(flat)
            self._refuse_marked(flat)
            self._tell_of_asked(flat)
        leaves, spec = private.tree_flatten(output)
        tensors: list[Tensor] = []
        noted: list[Any] = []
        positions: dict[int, int] = {}
        for leaf in leaves:
            if isinstance(leaf, Tensor):  # one that is returned twice is one output, with one gradient
                if id(leaf) not in positions:
                    positions[id(leaf)] = len(tensors)
                    tensors.append(leaf)
                noted.append(Hole(positions[id(leaf)]))
            elif isinstance(leaf, _PLAIN_TYPES):
                noted.append(leaf)
            else:
                raise CaptureError(
                    f"the forward returns a {type(leaf).__name__}, which may hide tensors: return tensors, "
                    "lists, tuples, dicts and dataclasses registered with torch.utils._pytree instead "
                    "(for transformers models, use_cache=False)"
                )
        if not any(tensor.requires_grad for tensor in tensors):
            raise CaptureError(
                "no output of the forward requires grad, so there is no backward to plan: "
                "is there a detach(), an argmax or a no_grad() on the way to the loss?"
            )
        self.structure = (tuple(noted), spec)
        self.in_backward = True
        self.versions = [(tensor, tensor._version) for tensor in flat]
        self.done = contents(self.holders)
        return tensors

    def _dress(self, flat: Sequence[Tensor]) -> None:
        """Give what stands for parameters, buffers and inputs the Python attributes of these, and parameters' kind."""
        originals = [*(slot.read() for slot in self.slots), *self.inputs.tensors]
        self.marks = []
        for tensor, original in zip(flat, originals, strict=True):
            if isinstance(original, nn.Parameter):
                tensor._is_param = True  # what isinstance asks for
            for name, value in vars(original).items():
                if name not in vars(tensor):
                    setattr(tensor, name, value)
            self.marks.append(dict(vars(tensor)))

    def refuse_late_writes(self) -> None:
        """Refuse what a backward wrote: a recorded backward returns gradients, and nothing else."""
        tensors = zip(primal_names(self.slots, len(self.inputs.tensors)), self.versions, strict=True)
        written = [name for name, (tensor, version) in tensors if tensor._version != version]
        held = zip(self.holders, self.done, strict=True)
        filled = [holder.name for holder, before in held if not put_back(holder, before)]
        if filled:
            raise CaptureError(
                f"the backward changes {', '.join(filled[:3])} (an autograd.Function's, or a hook's), which a recorded "
                "backward can't repeat: register the hook on an output of the wrapped module, or look at gradients "
                "between steps"
            )
        if written:
            raise CaptureError(
                f"the backward changes {', '.join(written[:3])} (an autograd.Function's, or a hook's), which a "
                "recorded backward can't repeat: change it in the forward, or between steps"
            )

    def _refuse_moving(self) -> None:
        """The first call may fill in a default outside of the module (a config's); what moves on is a counter."""
        before, self.state = self.state, python_state(list(self.model.modules()), self.forward)
        if before is not None and before != self.state:
            raise CaptureError(
                f"the forward changes {', '.join(changed(before, self.state)[:3])} at every call, which a planned step "
                "can't repeat: make a counter a buffer (register_buffer), or change it outside of the forward"
            )

    def _refuse_unfrozen(self, flat: Sequence[Tensor]) -> None:
        for slot, now, needed in zip(self.slots, flat, self.trained, strict=False):
            if now.requires_grad and not needed:
                raise CaptureError(
                    f"the forward calls requires_grad_() on {slot.name!r}, which a planned step doesn't: call it "
                    "before the forward (the step is planned again)"
                )

    def _refuse_marked(self, flat: Sequence[Tensor]) -> None:
        for slot, tensor, before in zip(self.slots, flat, self.marks, strict=False):
            for name in vars(tensor).keys() & self.read:
                if not name.startswith("_") and vars(tensor)[name] is not before.get(name):
                    raise CaptureError(
                        f"the forward leaves {name!r} on {slot.name!r}, which a planned step can't repeat: keep it in "
                        "a buffer that the forward changes in place (register_buffer)"
                    )

    def _tell_of_asked(self, flat: Sequence[Tensor]) -> None:
        tensors = zip(flat[len(self.slots) :], self.inputs.tensors, strict=True)
        asked = tuple(i for i, (now, given) in enumerate(tensors) if now.requires_grad and not given.requires_grad)
        if asked:
            raise GradientAskedError(asked)

    def _refuse_reassigned(self, flat: Sequence[Tensor]) -> None:
        for owner, attribute, index in self.homes:
            if member(owner, attribute) is not flat[index]:
                raise CaptureError(
                    f"the forward replaces {self.slots[index].name!r} by a new tensor: change it in place "
                    "(for example self.buffer.copy_(value)) so that the update is part of the step"
                )


def _logs(known: Readable) -> Iterator[tuple[str, Any, str]]:
    """Containers outside of the model that its code fills, with their names where other code reads them."""
    read = {scope_key(scope, name) for _, scope, name, _ in known.data}
    for path, scope, name, _ in known.logs:
        yield path, scope[name], name if scope_key(scope, name) in read else ""


def _refuse_hooks() -> None:
    raise CaptureError(
        "the forward enters torch.autograd.graph.saved_tensors_hooks, which a planned step doesn't call: what it saves "
        "is the plan's; leave them out, or wrap a part of the model without them"
    )
