"""Capture one training step of a module as a joint forward-backward graph of ATen ops.

The step is a flat function: parameters, buffers and input tensors in, output tensors out. Everything else about
the call (the structure of its inputs and outputs, constants among them) is kept here as data, so that the
runtime can put it back around the rewritten graph.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rematerialize import torch_private as private
from rematerialize.capture.autocast import WeightCasts
from rematerialize.capture.decompose import splitting_recurrences
from rematerialize.capture.explain import explain
from rematerialize.capture.generators import (
    own_generators,
    refuse_seeding,
    resolve_generators,
    unseeded_generators,
)
from rematerialize.capture.kernel_layouts import kernel_dtype, kernel_result, kernel_strides
from rematerialize.capture.known_values import KnownValues
from rematerialize.capture.purity import (
    FunctionCaches,
    Holder,
    Left,
    Values,
    contents,
    holders_of,
    kept_whole,
    logs_of,
    put_back,
    unchanged_python,
)
from rematerialize.capture.python_random import kept_python
from rematerialize.capture.refusals import (
    refuse_iterators,
    refuse_linearize,
    refuse_odd_primals,
    refuse_unplannable,
    unchanged_arguments,
)
from rematerialize.errors import CaptureError
from rematerialize.python_code import Readable, scope_key
from rematerialize.python_state import PythonState, changed, look_around, python_state

_ABSENT = object()
_PLAIN_TYPES = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where a parameter, buffer or plain tensor attribute lives: ``kind`` is "parameter", "buffer" or
    "attribute", ``owner`` the module that holds it under ``attribute``, ``name`` its qualified name.
    """

    kind: str
    name: str
    owner: nn.Module
    attribute: str

    def read(self) -> Tensor:
        value: Tensor = getattr(self.owner, self.attribute)
        return value


@dataclass(frozen=True, slots=True)
class FlatInputs:
    """A call's arguments, flattened: ``tensors`` in order, and what is needed to build the call again.

    ``leaves`` holds an index into ``tensors`` (as ``Hole``) or the constant itself.
    """

    tensors: tuple[Tensor, ...]
    leaves: tuple[Any, ...]
    spec: private.TreeSpec

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = [tensors[leaf.index] if isinstance(leaf, Hole) else leaf for leaf in self.leaves]
        args, kwargs = private.tree_unflatten(leaves, self.spec)
        return args, kwargs


@dataclass(frozen=True, slots=True)
class Hole:
    """Stands for the tensor of that index among the leaves of a call's arguments, or of its result."""

    index: int


class _GradientAskedError(CaptureError):
    """The forward calls ``requires_grad_()`` on some of its inputs, which the trace was told need no gradient."""

    def __init__(self, inputs: tuple[int, ...]) -> None:
        names = ", ".join(f"input {i}" for i in inputs)
        super().__init__(
            f"the forward calls requires_grad_() on {names} at some calls only: call it before the forward"
        )
        self.inputs = inputs


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A captured step: the joint trace, and how flat values map to the module and to the call.

    ``slots[i]`` is the home of primal ``i``; the primals after them are the input tensors. ``output_leaves``
    holds a ``Hole`` (an index into the flat tensor outputs) or a constant per output leaf. ``splittable``:
    a capture with ``split_recurrences`` would be finer. ``asked``: input tensors on which the forward itself calls
    ``requires_grad_()``. ``left``: plain values that the forward sets; ``settles`` if the same step is right for a
    call that finds them there.
    """

    joint: private.JointTrace
    slots: tuple[TensorSlot, ...]
    output_leaves: tuple[Any, ...]
    output_spec: private.TreeSpec
    splittable: bool = False
    asked: tuple[int, ...] = ()
    left: tuple[tuple[Holder, Any, Any], ...] = ()
    settles: bool = False

    def leave(self) -> None:
        """Set what the forward sets of Python's values."""
        for holder, key, value in self.left:
            holder.table[key] = value

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """The model as a call of the forward leaves it, for a while."""
        before = [
            (holder.table, key, holder.table.get(key, _ABSENT))
            if isinstance(holder.table, dict)
            else (holder.table, key, holder.table[key])
            for holder, key, _ in self.left
        ]
        self.leave()
        try:
            yield
        finally:
            for table, key, value in before:
                if value is _ABSENT:
                    table.pop(key, None)
                else:
                    table[key] = value

    def primal_names(self) -> list[str]:
        """What people call the primals: qualified names, then "input 0" and so on."""
        return _primal_names(self.slots, len(self.joint.primals) - len(self.slots))

    def pack_outputs(self, tensors: Sequence[Tensor]) -> Any:
        leaves = [tensors[leaf.index] if isinstance(leaf, Hole) else leaf for leaf in self.output_leaves]
        return private.tree_unflatten(leaves, self.output_spec)


def _primal_names(slots: Sequence[TensorSlot], inputs: int) -> list[str]:
    return [slot.name for slot in slots] + [f"input {i}" for i in range(inputs)]


def flatten_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> FlatInputs:
    """Flatten a call's arguments; a tensor that is passed twice is one tensor."""
    flat, spec = private.tree_flatten((tuple(args), dict(kwargs)))
    tensors: list[Tensor] = []
    seen: dict[int, int] = {}
    leaves: list[Any] = []
    for leaf in flat:
        if not isinstance(leaf, Tensor):
            leaves.append(leaf)
            continue
        if id(leaf) not in seen:
            seen[id(leaf)] = len(tensors)
            tensors.append(leaf)
        leaves.append(Hole(seen[id(leaf)]))
    return FlatInputs(tuple(tensors), tuple(leaves), spec)


def tensor_slots(model: nn.Module) -> tuple[TensorSlot, ...]:
    """Every parameter, buffer and plain tensor attribute of a module tree, tied ones once, in a fixed order."""
    slots: list[TensorSlot] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        groups = (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("attribute", {k: v for k, v in vars(module).items() if isinstance(v, Tensor) and v.grad_fn is None}),
        )
        for kind, members in groups:
            for attribute, value in members.items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    slots.append(TensorSlot(kind, name, module, attribute))
    order = {"parameter": 0, "buffer": 1, "attribute": 2}
    return tuple(sorted(slots, key=lambda slot: order[slot.kind]))


def capture(
    model: nn.Module, forward: Callable[..., Any], inputs: FlatInputs, *, split_recurrences: bool = False
) -> CapturedStep:
    """Trace one training step of ``forward``, which belongs to ``model``.

    Nothing runs on real data and nothing of the model changes: parameters, buffers, generator state, gradients.

    Parameters
    ----------
    model : nn.Module
        Holds the tensors that ``forward`` reads.
    forward : callable
        The model's own forward (bound), the thing to trace.
    inputs : FlatInputs
        The call to trace.
    split_recurrences : bool
        Run fused LSTMs over chunks of time: finer to plan, gradients equal up to rounding.

    Raises
    ------
    CaptureError
        If the forward can't be traced (its own exception, data-dependent control flow or shapes, constructs
        that the package doesn't handle), or needs no gradient. It names the user's line.
    """
    try:
        return _capture(model, forward, inputs, split_recurrences)
    except _GradientAskedError as error:
        asked = [inputs.tensors[index] for index in error.inputs]
        for tensor in asked:
            tensor.requires_grad_()
        try:
            return replace(_capture(model, forward, inputs, split_recurrences), asked=error.inputs)
        finally:
            for tensor in asked:
                tensor.requires_grad_(False)


def _capture(
    model: nn.Module, forward: Callable[..., Any], inputs: FlatInputs, split_recurrences: bool
) -> CapturedStep:
    refuse_iterators(inputs.leaves)
    slots = tensor_slots(model)
    primals = [slot.read() for slot in slots]
    known = {id(tensor) for tensor in primals}
    if any(id(tensor) in known for tensor in inputs.tensors):
        raise CaptureError("an input is one of the model's own parameters or buffers: pass a copy instead")
    primals.extend(inputs.tensors)
    names = [repr(slot.name) for slot in slots] + [f"input {i}" for i in range(len(inputs.tensors))]
    refuse_odd_primals(names, primals)
    if not any(tensor.requires_grad for tensor in primals):
        raise CaptureError(
            "no parameter and no input requires grad, so there is no backward to plan: "
            "call requires_grad_() on what should train"
        )
    # First the way that eager goes. Libraries that know of compilers have another one, without looks at values: it
    # costs memory and rounding (a whole mask in place of "causal"), but it can be traced where eager's can't.
    trace = functools.partial(_traced, model, forward, inputs, slots, primals, split_recurrences)
    compiling = False
    try:
        recorder, joint = trace(compiling=False)
    except _NotTracedError:
        compiling = True
        try:
            recorder, joint = trace(compiling=True)
        except _NotTracedError as error:
            raise error.told from error.__cause__
    written = _left_of_data(recorder.left, joint, slots)
    lasting = _lasting(recorder, written)
    settles = False
    if written or lasting:
        try:
            _, again = trace(compiling=compiling, poisoned=written, start=lasting)
        except _NotTracedError as error:
            raise error.told from error.__cause__
        settles = _alike(joint, again)
    resolve_generators(joint, recorder.generators)
    refuse_unplannable(joint, names)
    if recorder.structure is None:
        raise CaptureError("the forward was never called during the trace; report this as a bug")
    if not split_recurrences:
        _tell_of_hooks(model)
    leaves, spec = recorder.structure
    splittable = recorder.recurrences.found and not split_recurrences
    left = tuple((recorder.holders[index], key, value) for (index, key), value in lasting.items())
    return CapturedStep(joint, slots, leaves, spec, splittable, left=left, settles=settles)


class _NotTracedError(Exception):
    """Torch or the forward raised during a trace; ``told`` says so to the user."""

    def __init__(self, told: CaptureError) -> None:
        super().__init__(str(told))
        self.told = told


def _traced(
    model: nn.Module,
    forward: Callable[..., Any],
    inputs: FlatInputs,
    slots: tuple[TensorSlot, ...],
    primals: Sequence[Tensor],
    split_recurrences: bool,
    *,
    compiling: bool,
    poisoned: frozenset[tuple[int, Any]] = frozenset(),
    start: Values | None = None,
) -> tuple[_Recorder, private.JointTrace]:
    recorder = _Recorder(model, forward, inputs, slots, splitting_recurrences(split_recurrences), poisoned, start)
    try:
        with (
            kept_whole(recorder.holders),
            kept_python(model, forward),
            private.linearized(refuse_linearize),
        ):
            rules = private.FakeRules(kernel_strides, kernel_dtype, kernel_result, KnownValues())
            joint = private.trace_joint(recorder, primals, rules, compiling=compiling)
            recorder.refuse_late_writes()
            return recorder, joint
    except CaptureError:
        raise
    except private.UnsupportedTraceError as error:
        raise CaptureError(f"can't capture this forward: {error}") from error
    except Exception as error:
        raise _NotTracedError(explain(error, in_backward=recorder.in_backward)) from error


class _Recorder:
    """The flat function that is traced: puts tensors into the model, calls it, notes the output structure."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        inputs: FlatInputs,
        slots: tuple[TensorSlot, ...],
        recurrences: splitting_recurrences,
        poisoned: frozenset[tuple[int, Any]],
        start: Values | None,
    ) -> None:
        self.recurrences = recurrences
        self.poisoned = poisoned
        self.start = start
        known = look_around(list(model.modules()), forward)[2]
        self.read = known.attributes
        self.generators = own_generators(model, inputs.leaves)
        self.caches = FunctionCaches()
        self.holders = [*holders_of(model), *logs_of(_logs(known))]
        self.left = Left()
        self.model = model
        self.forward = forward
        self.inputs = inputs
        self.slots = slots
        self.homes = _homes(model, slots)
        self.trained = [slot.read().requires_grad for slot in slots]
        self.structure: tuple[tuple[Any, ...], private.TreeSpec] | None = None
        self.in_backward = False
        self.casts = WeightCasts([*(slot.read() for slot in slots), *inputs.tensors])
        self.state: PythonState | None = None
        self.versions: list[tuple[Tensor, int]] = []  # of what the last call was given, when it was done
        self.done: list[Any] = []  # what the holders held then

    def __call__(self, *flat: Tensor) -> Sequence[Tensor]:
        self.in_backward = False
        self._dress(flat)
        args, kwargs = self.inputs.rebuild(flat[len(self.slots) :])
        with _swapped(self.homes, flat), self.recurrences, private.own_saving_hooks(_refuse_hooks):
            # Inside the swap: attributes are compared with the values that the swap put there.
            seeding = unseeded_generators(self.generators)
            self.recurrences.drew = seeding.drew
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
            if self.recurrences.looked is not None:  # and the forward caught what it raised
                raise self.recurrences.looked
            self._refuse_moving()
            self._refuse_reassigned(flat)
            self._refuse_unfrozen(flat)
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
        for tensor, original in zip(flat, originals, strict=True):
            if isinstance(original, nn.Parameter):
                tensor._is_param = True  # what isinstance asks for
            for name, value in vars(original).items():
                if name not in vars(tensor):
                    setattr(tensor, name, value)

    def refuse_late_writes(self) -> None:
        """Refuse what a backward wrote: a recorded backward returns gradients, and nothing else."""
        tensors = zip(_primal_names(self.slots, len(self.inputs.tensors)), self.versions, strict=True)
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

    def _tell_of_asked(self, flat: Sequence[Tensor]) -> None:
        tensors = zip(flat[len(self.slots) :], self.inputs.tensors, strict=True)
        asked = tuple(i for i, (now, given) in enumerate(tensors) if now.requires_grad and not given.requires_grad)
        if asked:
            raise _GradientAskedError(asked)

    def _refuse_reassigned(self, flat: Sequence[Tensor]) -> None:
        for owner, attribute, index in self.homes:
            if _member(owner, attribute) is not flat[index]:
                raise CaptureError(
                    f"the forward replaces {self.slots[index].name!r} by a new tensor: change it in place "
                    "(for example self.buffer.copy_(value)) so that the update is part of the step"
                )


def _logs(known: Readable) -> Iterator[tuple[str, Any, str]]:
    """Containers outside of the model that its code fills, with their names where other code reads them."""
    read = {scope_key(scope, name) for _, scope, name, _ in known.data}
    for path, scope, name, _ in known.logs:
        yield path, scope[name], name if scope_key(scope, name) in read else ""


def _lasting(recorder: _Recorder, written: frozenset[tuple[int, Any]]) -> Values:
    """The plain values that a planned step can set as the forward does.

    Not those that go with what it can't leave: objects that the first call makes (hooks that a flag tells of), and
    caches (a length that goes with a table). There each step begins as the first one did.
    """
    left = recorder.left
    if left.objects:
        return {}
    caches = {recorder.holders[place[0]].owner for place in left.tensors.keys() - written}
    return {place: value for place, value in left.values.items() if recorder.holders[place[0]].owner not in caches}


def _alike(one: private.JointTrace, other: private.JointTrace) -> bool:
    """Whether two traces are of the same operations; those with constants of their own may differ in these."""
    constants = any(node.op == "get_attr" for node in one.graph.nodes)
    return not constants and str(one.graph) == str(other.graph)


def _left_of_data(left: Left, joint: private.JointTrace, slots: Sequence[TensorSlot]) -> frozenset[tuple[int, Any]]:
    """Where the forward leaves tensors that another call would compute anew, and differently: what follows from data,
    from what is trained, written or drawn. What follows from shapes and constant buffers is a cache.
    """
    written = {primal for primal, _ in joint.mutations}

    def constant(primal: int) -> bool:
        return 0 <= primal < len(slots) and primal not in written and not slots[primal].read().requires_grad

    return frozenset(
        place for place, origins in left.tensors.items() if origins is None or not all(map(constant, origins))
    )


def _refuse_hooks() -> None:
    raise CaptureError(
        "the forward enters torch.autograd.graph.saved_tensors_hooks, which a planned step doesn't call: what it saves "
        "is the plan's; leave them out, or wrap a part of the model without them"
    )


def _homes(model: nn.Module, slots: Sequence[TensorSlot]) -> list[tuple[nn.Module, str, int]]:
    """Every place that holds one of the slots' tensors; tied tensors have several."""
    index_of = {id(slot.read()): i for i, slot in enumerate(slots)}
    homes = []
    for module in model.modules():
        members = {**vars(module), **module._parameters, **module._buffers}
        for attribute, value in members.items():
            if isinstance(value, Tensor) and id(value) in index_of:
                homes.append((module, attribute, index_of[id(value)]))
    return homes


def _member(owner: nn.Module, attribute: str) -> Any:
    for table in (owner._parameters, owner._buffers, vars(owner)):
        if attribute in table:
            return table[attribute]
    return None


class _swapped:
    """Put flat values where the model keeps its tensors, and take them out again whatever happens."""

    def __init__(self, homes: Sequence[tuple[nn.Module, str, int]], flat: Sequence[Tensor]) -> None:
        self.homes = homes
        self.flat = flat
        self.saved: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        for owner, attribute, index in self.homes:
            for table in (owner._parameters, owner._buffers, vars(owner)):
                if attribute in table:
                    self.saved.append((table, attribute, table[attribute]))
                    table[attribute] = self.flat[index]  # type: ignore[assignment]
                    break

    def __exit__(self, *exc: object) -> None:
        for table, attribute, value in reversed(self.saved):
            table[attribute] = value


def _tell_of_hooks(model: nn.Module) -> None:
    """Hooks of inner modules are called by the trace only; those of torch (weight_norm) and transformers (outputs of
    layers) do nothing else.
    """
    for name, module in model.named_modules():
        own = vars(module)
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        hooks = [hook for kind in kinds for hook in own[kind].values()] if name else []
        if any(not (getattr(hook, "__module__", "") or "").startswith(("torch.", "transformers.")) for hook in hooks):
            warnings.warn(
                f"the hooks of the inner module {name!r} run while a step is captured, not at every step: what they "
                "change of values and gradients is part of the step, what they leave elsewhere is lost. Return such "
                "values from the forward, or put the hook on the wrapped module itself",
                stacklevel=2,
            )
            return
