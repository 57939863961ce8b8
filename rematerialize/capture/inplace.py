"""Which ATen call writes its result over an input, with the same bits as the allocating one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rematerialize.capture.eager_paths import divided_over, summed_over
from rematerialize.capture.random import bernoulli_as
from rematerialize.capture.scatter import write_through, write_through_

aten = torch.ops.aten

# Not elementwise, but their in-place forms compute the same values.
_ACCUMULATING = {
    aten.index_put.default: aten.index_put_.default,
    aten._unsafe_index_put.default: aten._index_put_impl_.default,
    aten.index_add.default: aten.index_add_.default,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter.value: aten.scatter_.value,
    aten.index_copy.default: aten.index_copy_.default,
    write_through: write_through_,
    divided_over: aten.div_.Tensor,
    summed_over: aten.add_.Tensor,
    bernoulli_as: aten.bernoulli_.float,
    aten.uniform.default: aten.uniform_.default,
    aten.normal_functional.default: aten.normal_.default,
    aten.masked_fill.Scalar: aten.masked_fill_.Scalar,
    aten.masked_fill.Tensor: aten.masked_fill_.Tensor,
}

# Elementwise backward formulas without an in-place form write over the incoming gradient by ``out=``.
_OUT_FORMS = {
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input"),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input"),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input"),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input"),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input"),
    aten.leaky_relu_backward.default: (aten.leaky_relu_backward.grad_input, "grad_input"),
    aten.elu_backward.default: (aten.elu_backward.grad_input, "grad_input"),
    aten.hardtanh_backward.default: (aten.hardtanh_backward.grad_input, "grad_input"),
    aten.softplus_backward.default: (aten.softplus_backward.grad_input, "grad_input"),
}
_LOW_PRECISION = (torch.bfloat16, torch.float16)
# Complex numbers are rounded otherwise in place, where fewer of them than fill a vector are left.
_COMPLEX_IN_NEW_TENSORS = frozenset({aten.div.Tensor, aten.addcmul.default, aten.addcdiv.default})
_COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor})


@dataclass(frozen=True, slots=True)
class InPlaceForm:
    """How to call an op over its argument ``position``: ``target`` with that argument first (``swap``),
    or with the keyword ``out`` naming it.
    """

    target: Any
    position: int
    swap: bool = False
    out: str = ""


def in_place_forms(node: fx.Node) -> tuple[InPlaceForm, ...]:
    """The forms that ``node`` could take, whether or not its inputs are free to be written over."""
    target = node.target
    if target in _ACCUMULATING:
        return (InPlaceForm(_ACCUMULATING[target], 0),)
    if target in _OUT_FORMS:
        op, out = _OUT_FORMS[target]
        return (InPlaceForm(op, 0, out=out),)
    if torch.Tag.pointwise not in getattr(target, "tags", ()):
        return ()
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return ()  # of several results
    is_complex = value.is_complex()
    if target in _COMPLEX_IN_NEW_TENSORS and is_complex:
        return ()
    if target is aten.mul.Scalar and value.dtype in _LOW_PRECISION:
        return (InPlaceForm(aten.mul_.Tensor, 0),)  # mul_.Scalar rounds the number first, mul.Scalar and this don't
    packet_name = target._schema.name.split("::")[1] + "_"  # type: ignore[union-attr]
    packet = getattr(aten, packet_name, None)
    overload = target._schema.overload_name or "default"  # type: ignore[union-attr]
    if packet is None or overload not in packet.overloads():
        return ()
    in_place = getattr(packet, overload)
    forms = [InPlaceForm(in_place, 0)]
    # Complex products round by the order of their factors.
    ordered = target is aten.mul.Tensor and is_complex
    if target in _COMMUTATIVE and not ordered and not node.kwargs and len(node.args) == 2:
        forms.append(InPlaceForm(in_place, 1, swap=True))
    return tuple(forms)


def fits_over(node: fx.Node, form: InPlaceForm, storage_bytes: int) -> bool:
    """Would the result have exactly the layout of the argument, and that argument its whole storage?"""
    argument = node.args[form.position] if form.position < len(node.args) else None
    if not isinstance(argument, fx.Node):
        return False
    source, result = argument.meta.get("val"), node.meta.get("val")
    if not isinstance(source, Tensor) or not isinstance(result, Tensor):
        return False
    return (
        source.dtype == result.dtype
        and source.device == result.device
        and source.shape == result.shape
        and source.stride() == result.stride()
        and source.storage_offset() == 0
        and source.numel() * source.element_size() == storage_bytes
        and storage_bytes > 0
        and not source.is_conj()
        and not source.is_neg()
    )


def call_in_place(form: InPlaceForm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The (target, args, kwargs) of the in-place call, for emission and for measurement alike."""
    if form.out:
        return form.target, args, {**kwargs, form.out: args[form.position]}
    if form.swap:
        return form.target, (args[1], args[0]), kwargs
    return form.target, args, kwargs


def call_allocating(form: InPlaceForm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The (args, kwargs) of the allocating call that computes what the form does with the given ones."""
    if form.out:
        return args, {name: value for name, value in kwargs.items() if name != form.out}
    return ((args[1], args[0]) if form.swap else args), kwargs
