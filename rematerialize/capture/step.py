"""Capture one training step of a module as a joint forward-backward graph of ATen ops.

The step is a flat function: parameters, buffers and input tensors in, output tensors out. Everything else about
the call (the structure of its inputs and outputs, constants among them) is kept here as data, so that the
runtime can put it back around the rewritten graph.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from rematerialize import torch_private as private
from rematerialize.capture.explain import explain
from rematerialize.capture.flat import FlatInputs, Hole, TensorSlot, primal_names, tensor_slots
from rematerialize.capture.generators import (
    resolve_generators,
)
from rematerialize.capture.kernel_layouts import kernel_dtype, kernel_result, kernel_strides
from rematerialize.capture.known_values import Look
from rematerialize.capture.purity import (
    Holder,
    Left,
    Values,
    kept_whole,
)
from rematerialize.capture.python_random import kept_python
from rematerialize.capture.python_types import eagers_types
from rematerialize.capture.recorder import GradientAskedError, Recorder
from rematerialize.capture.refusals import (
    refuse_iterators,
    refuse_linearize,
    refuse_odd_primals,
    refuse_unplannable,
)
from rematerialize.capture.summed import is_laid_otherwise, sums_in_place
from rematerialize.capture.watched_calls import watched_calls
from rematerialize.errors import CaptureError

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A captured step: the joint trace, and how flat values map to the module and to the call.

    ``slots[i]`` is the home of primal ``i``; the primals after them are the input tensors. ``output_leaves``
    holds a ``Hole`` (an index into the flat tensor outputs) or a constant per output leaf. ``splittable``:
    a capture with ``split_recurrences`` would be finer. ``asked``: input tensors on which the forward itself calls
    ``requires_grad_()``. ``left``: plain values that the forward sets; ``settles`` if the same step is right for a
    call that finds them there. ``looks``: what the forward's Python asked of the inputs.
    """

    joint: private.JointTrace
    slots: tuple[TensorSlot, ...]
    output_leaves: tuple[Any, ...]
    output_spec: private.TreeSpec
    splittable: bool = False
    asked: tuple[int, ...] = ()
    left: tuple[tuple[Holder, Any, Any], ...] = ()
    settles: bool = False
    looks: tuple[Look, ...] = ()

    def fits(self, inputs: FlatInputs) -> bool:
        """Whether the forward goes the same way for inputs of the same signature."""
        return all(look.holds(inputs.tensors) for look in self.looks)

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
        return primal_names(self.slots, len(self.joint.primals) - len(self.slots))

    def pack_outputs(self, tensors: Sequence[Tensor]) -> Any:
        leaves = [tensors[leaf.index] if isinstance(leaf, Hole) else leaf for leaf in self.output_leaves]
        return private.tree_unflatten(leaves, self.output_spec)


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
    except GradientAskedError as error:
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
    # Always the way that eager goes. Libraries that know of compilers have another one, without looks at values, and
    # it isn't the same: a language model's loss differed in the fourth digit.
    trace = functools.partial(_traced, model, forward, inputs, slots, primals, split_recurrences)
    recorder, joint = trace()
    in_place = sums_in_place(joint)
    if any(node.meta.get("summed") in in_place and is_laid_otherwise(node) for node in joint.graph.nodes):
        trace = functools.partial(trace, sums=in_place)
        recorder, joint = trace()
    for node in joint.graph.nodes:
        node.meta["summed_in_place"] = node.meta.get("summed") in in_place
    written = _left_of_data(recorder.left, joint, slots)
    lasting = _lasting(recorder, written)
    settles = False
    if written or lasting:
        tripwires = {place: recorder.left.tripwires[place] for place in written}
        _, again = trace(poisoned=tripwires, start=lasting)
        settles = _alike(joint, again)
    resolve_generators(joint, recorder.generators)
    refuse_unplannable(joint, names)
    if recorder.structure is None:
        raise CaptureError("the forward was never called during the trace; report this as a bug")
    if not split_recurrences:
        _tell_of_hooks(model)
    leaves, spec = recorder.structure
    splittable = recorder.calls.recurrences and not split_recurrences
    left = tuple((recorder.holders[index], key, value) for (index, key), value in lasting.items())
    looks = tuple(recorder.known.looks)
    return CapturedStep(joint, slots, leaves, spec, splittable, left=left, settles=settles, looks=looks)


def _traced(
    model: nn.Module,
    forward: Callable[..., Any],
    inputs: FlatInputs,
    slots: tuple[TensorSlot, ...],
    primals: Sequence[Tensor],
    split_recurrences: bool,
    *,
    poisoned: Values | None = None,
    start: Values | None = None,
    sums: frozenset[int] = frozenset(),
) -> tuple[Recorder, private.JointTrace]:
    recorder = Recorder(model, forward, inputs, slots, watched_calls(split_recurrences), poisoned, start)
    try:
        with (
            kept_whole(recorder.holders),
            kept_python(model, forward),
            eagers_types(recorder.asking),
            private.linearized(refuse_linearize),
        ):
            rules = private.FakeRules(kernel_strides, kernel_dtype, kernel_result, recorder.known, sums)
            joint = private.trace_joint(recorder, primals, rules)
            recorder.refuse_late_writes()
            return recorder, joint
    except CaptureError:
        raise
    except private.UnsupportedTraceError as error:
        raise CaptureError(f"can't capture this forward: {error}") from error
    except Exception as error:
        raise explain(error, in_backward=recorder.in_backward) from error


def _lasting(recorder: Recorder, written: frozenset[tuple[int, Any]]) -> Values:
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

    def of_data(origins: Set[int] | None) -> bool:
        return origins is None or not all(map(constant, origins))

    for name, origins in left.cached.items():
        if of_data(origins):
            raise CaptureError(
                f"the forward keeps tensors that follow from data or are drawn in the cache of {name}() "
                "(functools.lru_cache), which a planned step doesn't fill: call it outside, and pass in what it returns"
            )
    return frozenset(place for place, origins in left.tensors.items() if of_data(origins))


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
