"""Layouts of what ATen's CPU kernels return, for the ops whose fake kernels report another one.

A trace believes its fake kernels. Where they report a layout that the kernel doesn't return, a ``contiguous()`` or a
``reshape`` behind it copies in a real step and is left out of the trace, or the reverse: a kernel that relies on the
layout then reads its input in the wrong order. The rules below are those of ATen's kernels;
``python -m benchmarks.conformance layouts`` compares every op of torch's own test samples with its fake kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rematerialize import torch_private as private

aten = torch.ops.aten

Strides = Sequence[int]
# From the arguments and one of the results, as the fake kernel has it: the strides that the kernel returns.
Rule = Callable[[Sequence[Any], Tensor], Strides]


def kernel_strides(op: Any, args: Sequence[Any], index: int, result: Tensor) -> Strides | None:
    """Return the strides of the op's result at an index, where they differ from those of the fake ``result``.

    Strides of dimensions that have one element or none don't count, nor do results of less than two dimensions: a
    loss that was reduced has no layout.
    """
    rule = _RULES.get(op, {}).get(index)
    if rule is None or result.device.type != "cpu" or result.dim() < 2:
        return None
    found = rule(args, result)
    return None if laid_alike(found, result) else found


def kernel_dtype(op: Any, args: Sequence[Any], index: int, result: Tensor) -> torch.dtype | None:
    """Return the type of the op's result at an index, where it differs from that of the fake ``result``.

    Norms of a low precision with weights of a higher one, as under autocast, keep their statistics in the higher one:
    their second derivatives are computed from these.
    """
    first = _WEIGHTS.get(op)
    if first is None or index == 0 or result.device.type != "cpu":
        return None
    if index > 2:  # running statistics, as they are given
        return args[index].dtype if args[index].dtype != result.dtype else None
    given = [other.dtype for other in args[first : first + 4] if isinstance(other, Tensor)]
    return given[0] if given and given[0] != result.dtype else None


# Draws in place that torch can't trace with a generator, and those that can be run instead: their fake kernels take
# none either, but that of the result is known.
DRAWS: Mapping[Any, Any] = {
    Tensor.exponential_: aten.exponential.default,
    Tensor.log_normal_: aten.log_normal.default,
    Tensor.cauchy_: aten.cauchy.default,
    Tensor.geometric_: aten.geometric.default,
}
_DRAWS = frozenset(DRAWS.values())
# Where the weights of a norm begin among its arguments; its statistics are results 1 and 2.
_WEIGHTS = {
    aten.native_group_norm.default: 1,
    aten.native_layer_norm.default: 2,
    aten.native_batch_norm.default: 1,
    aten._native_batch_norm_legit.default: 1,
    aten._native_batch_norm_legit.no_stats: 1,
    aten._native_batch_norm_legit_functional.default: 1,
    aten._native_batch_norm_legit_no_training.default: 1,
}


def kernel_result(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> private.Result | None:
    """Return what an op's kernel makes of its arguments, where the fake kernel refuses what the real one takes."""
    if op in _DRAWS and kwargs.get("generator") is not None and args[0].is_contiguous():
        return private.Result(tuple(args[0].shape), args[0].dtype)
    if op is not aten._grouped_mm.default or args[0].device.type != "cpu":
        return None
    left, right = args[0], args[1]  # of three dimensions: a group each; two flat ones are contracted within groups
    offsets: Any = args[2] if len(args) > 2 else kwargs.get("offs")
    dtype = args[4] if len(args) > 4 else kwargs.get("out_dtype")
    groups = [] if left.dim() + right.dim() == 5 else [offsets.numel() if left.dim() == 2 else left.shape[0]]
    shape = (*groups, left.shape[-2], right.shape[-1])
    return private.Result(shape, dtype or left.dtype)


@contextlib.contextmanager
def faking(mode: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Run kernels in a fake mode, with the layouts that the real ones return."""
    with private.real_layouts(kernel_strides, kernel_dtype, kernel_result), mode:
        yield


def _contiguous(args: Sequence[Any], result: Tensor) -> Strides:
    return _in_order(range(result.dim()), result.shape)


def _in_order(outer_to_inner: Sequence[int], shape: Sequence[int]) -> Strides:
    strides = [1] * len(shape)
    step = 1
    for dim in reversed(outer_to_inner):
        strides[dim] = step
        step *= max(1, shape[dim])
    return strides


def _suggested(position: int) -> Rule:
    """Channels last where an argument is, contiguous otherwise (ATen's ``suggest_memory_format``)."""

    def rule(args: Sequence[Any], result: Tensor) -> Strides:
        dims = range(result.dim())
        channels_last = args[position].dim() == result.dim() and _channels_last(args[position])
        return _in_order([0, *dims[2:], 1] if channels_last else dims, result.shape)

    return rule


def _channels_last(value: Tensor) -> bool:
    """Whether strides grow from channels to batch, gaps allowed; what could be either way counts as contiguous."""
    if value.dim() not in (4, 5) or not value.stride(1) or not value.numel():
        return False
    least = 0
    for dim in (1, *reversed(range(2, value.dim())), 0):
        if value.stride(dim) < least or (dim == 0 and least == value.stride(1)):
            return False
        least = value.stride(dim) * value.shape[dim]
    return True


def _like(position: int) -> Rule:
    """Dense in the order of one argument's dimensions, where the result has its shape (a loss without reduction)."""

    def rule(args: Sequence[Any], result: Tensor) -> Strides:
        like: Tensor = args[position]
        return torch.empty_like(like).stride() if like.shape == result.shape else result.stride()

    return rule


def _elementwise(*positions: int) -> Rule:
    """Dense in the order in which an elementwise kernel walks through its operands, given as it takes them."""

    def rule(args: Sequence[Any], result: Tensor) -> Strides:
        tensors = [args[at] for at in positions if at < len(args) and isinstance(args[at], Tensor)]
        operands = [operand.expand(result.shape).stride() for operand in tensors]
        return _walked(operands, result.shape)

    return rule


def _arithmetic(args: Sequence[Any], result: Tensor) -> Strides:
    """As elementwise kernels do; an operand of another type is converted first, as it is, and has gaps no more."""
    common = torch.result_type(args[0], args[1]) if result.dtype == torch.bool else result.dtype
    operands = []
    for operand in args[:2]:
        if isinstance(operand, Tensor):
            converted = operand if operand.dtype == common else torch.empty_like(operand, dtype=common)
            operands.append(converted.expand(result.shape).stride())
    return _walked(operands, result.shape)


def _walked(operands: Sequence[Strides], shape: Sequence[int]) -> Strides:
    """Strides of what ATen's TensorIterator allocates for operands of some strides, all of the result's shape.

    Dimensions go from inner to outer by the strides of the first operand that tells two of them apart; one that is
    broadcast along a dimension doesn't.
    """
    if len(set(map(tuple, operands))) == 1 and is_dense(operands[0], shape):
        return operands[0]
    inner_to_outer = list(reversed(range(len(shape))))
    for at in range(1, len(shape)):
        moved = at
        for before in reversed(range(at)):
            order = _compare(inner_to_outer[before], inner_to_outer[moved], shape, operands)
            if order > 0:
                inner_to_outer[before], inner_to_outer[moved] = inner_to_outer[moved], inner_to_outer[before]
                moved = before
            elif order < 0:
                break
    return _in_order(inner_to_outer[::-1], shape)


def _compare(left: int, right: int, shape: Sequence[int], operands: Sequence[Strides]) -> int:
    """Negative where the left dimension is further in, positive where the right one is, zero where nothing tells."""
    for strides in operands:
        if not strides[left] or not strides[right]:
            continue
        if strides[left] != strides[right]:
            return -1 if strides[left] < strides[right] else 1
        if shape[left] > shape[right]:
            return 1
    return 0


def laid_alike(strides: Strides, like: Tensor) -> bool:
    """Return whether strides lay elements out as a tensor's do: of dimensions of one element they don't count."""
    compared = zip(strides, like.stride(), like.shape, strict=True)
    return like.numel() == 0 or all(ours == other or size == 1 for ours, other, size in compared)


def is_dense(strides: Strides, shape: Sequence[int]) -> bool:
    """Return whether every byte between the first and the last element belongs to one element."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


_RULES: dict[Any, dict[int, Rule]] = {
    aten._log_softmax_backward_data.default: {0: _contiguous},
    aten.huber_loss_backward.default: {0: _contiguous},
    aten.log_sigmoid_forward.default: {0: _contiguous, 1: _contiguous},
    aten.mse_loss_backward.default: {0: _contiguous},
    aten.native_layer_norm_backward.default: {0: _contiguous, 1: _contiguous, 2: _contiguous},
    aten.nll_loss2d_forward.default: {0: _contiguous},
    aten.normal.Tensor_Tensor: {0: _contiguous},
    aten.smooth_l1_loss_backward.default: {0: _contiguous},
    aten.pow.Scalar: {0: _contiguous},
    aten._native_batch_norm_legit.default: {0: _suggested(0)},
    aten._native_batch_norm_legit.no_stats: {0: _suggested(0)},
    aten._native_batch_norm_legit_functional.default: {0: _suggested(0)},
    aten._native_batch_norm_legit_no_training.default: {0: _suggested(0)},
    aten.batch_norm_backward.default: {0: _suggested(1)},
    aten.native_batch_norm.default: {0: _suggested(0)},
    aten.native_batch_norm_backward.default: {0: _suggested(1)},
    aten.native_group_norm_backward.default: {0: _suggested(1)},
    aten.channel_shuffle.default: {0: _suggested(0)},
    aten.max_unpool2d.default: {0: _suggested(0)},
    aten.reflection_pad2d_backward.default: {0: _suggested(1)},
    aten.reflection_pad3d.default: {0: _suggested(0)},
    aten.reflection_pad3d_backward.default: {0: _suggested(1)},
    aten.replication_pad2d_backward.default: {0: _suggested(1)},
    aten.replication_pad3d.default: {0: _suggested(0)},
    aten.replication_pad3d_backward.default: {0: _suggested(1)},
    aten.binary_cross_entropy.default: {0: _like(0)},
    aten.binary_cross_entropy_backward.default: {0: _like(1)},
    aten.huber_loss.default: {0: _like(0)},
    aten.index_fill.int_Scalar: {0: _like(0)},
    aten.log_sigmoid_backward.default: {0: _like(0)},
    aten.soft_margin_loss_backward.default: {0: _like(2)},
    aten.add.Tensor: {0: _arithmetic},
    aten.sub.Tensor: {0: _arithmetic},
    aten.mul.Tensor: {0: _arithmetic},
    aten.div.Tensor: {0: _arithmetic},
    aten.eq.Tensor: {0: _arithmetic},
    aten.ne.Tensor: {0: _arithmetic},
    aten.lt.Tensor: {0: _arithmetic},
    aten.le.Tensor: {0: _arithmetic},
    aten.gt.Tensor: {0: _arithmetic},
    aten.ge.Tensor: {0: _arithmetic},
    aten.gelu_backward.default: {0: _elementwise(0, 1)},
    aten.sigmoid_backward.default: {0: _elementwise(0, 1)},
    aten.silu_backward.default: {0: _elementwise(0, 1)},
    aten.tanh_backward.default: {0: _elementwise(0, 1)},
    aten.mish_backward.default: {0: _elementwise(0, 1)},
    aten.mse_loss.default: {0: _elementwise(0, 1)},
    aten.smooth_l1_loss.default: {0: _elementwise(0, 1)},
    aten._prelu_kernel_backward.default: {0: _elementwise(1, 2, 0), 1: _elementwise(1, 2, 0)},
    aten.clamp.Tensor: {0: _elementwise(0, 1, 2)},
    aten.copysign.Tensor: {0: _elementwise(0, 1)},
    aten.div.Tensor_mode: {0: _elementwise(0, 1)},
    aten.elu_backward.default: {0: _elementwise(0, 5)},
    aten.floor_divide.default: {0: _elementwise(0, 1)},
    aten.hardswish_backward.default: {0: _elementwise(0, 1)},
    aten.hardtanh_backward.default: {0: _elementwise(0, 1)},
    aten.leaky_relu_backward.default: {0: _elementwise(1, 0)},
    aten.logaddexp.default: {0: _elementwise(0, 1)},
    aten.logaddexp2.default: {0: _elementwise(0, 1)},
    aten.logit_backward.default: {0: _elementwise(0, 1)},
    aten.native_dropout_backward.default: {0: _elementwise(0, 1)},
    aten.softplus_backward.default: {0: _elementwise(0, 1)},
    aten.threshold_backward.default: {0: _elementwise(1, 0)},
    aten.xlogy.Tensor: {0: _elementwise(0, 1)},
}
