"""Which layout ATen's CPU kernels give their results, for the ops whose fake kernels report another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rematerialize.capture.strides import Strides, channels_last, in_order, walked

aten = torch.ops.aten

# From the arguments and one of the results, as the fake kernel has it: the strides that the kernel returns.
Rule = Callable[[Sequence[Any], Tensor], Strides]


def _contiguous(args: Sequence[Any], result: Tensor) -> Strides:
    return in_order(range(result.dim()), result.shape)


def _suggested(position: int) -> Rule:
    """Channels last where an argument is, contiguous otherwise (ATen's ``suggest_memory_format``)."""

    def rule(args: Sequence[Any], result: Tensor) -> Strides:
        dims = range(result.dim())
        last = args[position].dim() == result.dim() and channels_last(args[position])
        return in_order([0, *dims[2:], 1] if last else dims, result.shape)

    return rule


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
        return walked(operands, result.shape)

    return rule


def promoted(args: Sequence[Any], result: Tensor) -> Strides:
    """As elementwise kernels do; an operand of another type is converted first, as it is, and has gaps no more."""
    tensors = [operand for operand in args if isinstance(operand, Tensor)]
    common = torch.result_type(args[0], args[1]) if result.dtype == torch.bool else result.dtype
    operands = []
    for operand in tensors:
        converted = operand if operand.dtype == common else torch.empty_like(operand, dtype=common)
        operands.append(converted.expand(result.shape).stride())
    return walked(operands, result.shape)


def _rectified(args: Sequence[Any], result: Tensor) -> Strides:
    """Gradient times noise; that of a plain leaky rectifier where none was drawn."""
    lower, upper, training = args[3:6]
    drawn = training and upper - lower > 1e-6
    return (_elementwise(2, 0) if drawn else _elementwise(1, 0))(args, result)


def _indexed(args: Sequence[Any], result: Tensor) -> Strides:
    """As an elementwise kernel of the source, which stands still along the indices' dimensions, and the indices."""
    source: Tensor = args[0]
    indices: list[Tensor | None] = [*args[1], *[None] * (source.dim() - len(args[1]))]
    given = [index for index in indices if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in given):
        return result.stride()  # of one dimension, once it is known
    at = [dim for dim, index in enumerate(indices) if index is not None]
    shape = torch.broadcast_shapes(*(index.shape for index in given))  # type: ignore[no-untyped-call]
    adjacent = at[-1] - at[0] == len(at) - 1
    before = [source.stride(dim) for dim in range(at[0])] if adjacent else []
    after = [source.stride(dim) for dim in range(len(before), source.dim()) if dim not in at]
    operands = [[*before, *[0] * len(shape), *after]]
    for index in given:
        operands.append([*[0] * len(before), *index.expand(shape).stride(), *[0] * len(after)])
    return walked(operands, result.shape)


def _rolled(args: Sequence[Any], result: Tensor) -> Strides:
    """One dimension after the other, each a ``cat`` of two pieces, or a contiguous copy where nothing moves."""
    value: Tensor = args[0]
    shifts, dims = args[1], args[2] if len(args) > 2 else ()
    if not dims:
        return _contiguous(args, result)
    for shift, dim in zip(shifts, dims, strict=True):
        start = -shift % max(1, value.shape[dim])
        if start:
            value = torch.cat((value.narrow(dim, start, value.shape[dim] - start), value.narrow(dim, 0, start)), dim)
        else:
            value = value.clone(memory_format=torch.contiguous_format)
    return value.stride()


def _real_part(args: Sequence[Any], result: Tensor) -> Strides:
    return _contiguous(args, result) if args[0].is_complex() else result.stride()


RULES: dict[Any, dict[int, Rule]] = {
    aten._log_softmax_backward_data.default: {0: _contiguous},
    aten.huber_loss_backward.default: {0: _contiguous},
    aten.log_sigmoid_forward.default: {0: _contiguous, 1: _contiguous},
    aten.mse_loss_backward.default: {0: _contiguous},
    aten.native_layer_norm_backward.default: {0: _contiguous, 1: _contiguous, 2: _contiguous},
    aten.nll_loss2d_forward.default: {0: _contiguous},
    aten.normal.Tensor_Tensor: {0: _contiguous},
    aten.smooth_l1_loss_backward.default: {0: _contiguous},
    aten.pow.Scalar: {0: _contiguous},
    aten.masked_fill.Scalar: {0: _contiguous},
    aten.grid_sampler_2d.default: {0: _contiguous},
    aten.glu_backward.default: {0: _contiguous},
    aten.poisson.default: {0: _contiguous},
    aten._standard_gamma.default: {0: _contiguous},
    aten.normal.float_Tensor: {0: _contiguous},
    aten.isin.Tensor_Tensor: {0: _contiguous},
    aten.isin.Tensor_Scalar: {0: _contiguous},
    aten.index.Tensor: {0: _indexed},
    aten.angle.default: {0: _real_part},
    aten.roll.default: {0: _rolled},
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
    aten.upsample_bicubic2d.default: {0: _suggested(0)},
    aten.upsample_bilinear2d.vec: {0: _suggested(0)},
    aten.upsample_trilinear3d.vec: {0: _suggested(0)},
    aten.upsample_trilinear3d.default: {0: _suggested(0)},
    aten.upsample_bilinear2d.default: {0: _suggested(0)},
    aten.upsample_bicubic2d.vec: {0: _suggested(0)},
    aten.hardsigmoid_backward.default: {0: _elementwise(0, 1)},
    aten.polar.default: {0: _elementwise(0, 1)},
    aten.mish_backward.default: {0: _elementwise(0, 1)},
    aten.mse_loss.default: {0: _elementwise(0, 1)},
    aten.smooth_l1_loss.default: {0: _elementwise(0, 1)},
    aten._prelu_kernel_backward.default: {0: _elementwise(1, 2, 0), 1: _elementwise(1, 2, 0)},
    aten.clamp.Tensor: {0: _elementwise(0, 1, 2)},
    aten.elu_backward.default: {0: _elementwise(0, 5)},
    aten.floor_divide.default: {0: _elementwise(0, 1)},
    aten.hardswish_backward.default: {0: _elementwise(0, 1)},
    aten.hardtanh_backward.default: {0: _elementwise(0, 1)},
    aten.rrelu_with_noise_backward.default: {0: _rectified},
    aten.leaky_relu_backward.default: {0: _elementwise(1, 0)},
    aten.softplus_backward.default: {0: _elementwise(0, 1)},
    aten.threshold_backward.default: {0: _elementwise(1, 0)},
}
