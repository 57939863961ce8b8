"""Which layout ATen's CPU kernels give their results, for the ops whose fake kernels report another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rematerialize.capture.strides import (
    Strides,
    channels_last,
    in_order,
    iterated,
    kept,
    laid_alike,
    taken_for,
    viewed,
)

aten = torch.ops.aten

_HAS_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]

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


def _normed(position: int) -> Rule:
    """Of a batch norm: where its input may be taken for contiguous it is, or else for channels last."""

    def rule(args: Sequence[Any], result: Tensor) -> Strides:
        value: Tensor = args[position]
        return taken_for([value.stride()], value.shape, maps=(4, 5)) or _suggested(position)(args, result)

    return rule


def _normed_backward(args: Sequence[Any], result: Tensor) -> Strides:
    alike = channels_last(args[0]) == channels_last(args[1])
    return (_normed if alike else _suggested)(1)(args, result)


def _like(position: int) -> Rule:
    """As ``empty_like`` of one argument, where the result has its shape (a loss without reduction)."""

    def rule(args: Sequence[Any], result: Tensor) -> Strides:
        like: Tensor = args[position]
        return kept(like.stride(), like.shape) if like.shape == result.shape else result.stride()

    return rule


def _elementwise(*positions: int, numbers: int = 0, converted: bool = True) -> Rule:
    """As elementwise kernels do, of operands in the order in which they take them, and of numbers that they take for
    tensors without dimensions.

    An operand of another type is ``converted`` first, as ``empty_like`` lays it out.
    """

    def rule(args: Sequence[Any], result: Tensor) -> Strides:
        given = [args[at] for at in positions if at < len(args)] if positions else args
        tensors = [operand for operand in given if isinstance(operand, Tensor)]
        common = result.dtype
        if result.dtype == torch.bool:  # of comparisons, and of what asks one operand
            compares = len(args) > 1 and isinstance(args[1], (Tensor, bool, int, float, complex))
            common = torch.result_type(args[0], args[1]) if compares else args[0].dtype
        operands: list[tuple[Strides, Sequence[int]]] = [((), ())] * numbers
        for operand in tensors:
            strides = operand.stride()
            as_is = operand.dtype == common or not converted
            operands.append((strides if as_is else kept(strides, operand.shape), operand.shape))
        return iterated(operands, result.shape)

    return rule


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
    before = range(at[0]) if adjacent else range(0)
    after = [dim for dim in range(len(before), source.dim()) if dim not in at]
    strides = [*(source.stride(dim) for dim in before), *[0] * len(shape), *(source.stride(dim) for dim in after)]
    operands: list[tuple[Strides, Sequence[int]]] = [(strides, result.shape)]
    for index in given:
        around = [1] * len(before) + [*shape] + [1] * len(after)
        operands.append((viewed(index.expand(shape).stride(), shape, around) or [], around))
    return iterated(operands, result.shape)


def _of_view(args: Sequence[Any], result: Tensor) -> Strides:
    return viewed(args[0].stride(), args[0].shape, result.shape) or result.stride()


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


def _matrix_exp(args: Sequence[Any], result: Tensor) -> Strides:
    """Of matrices of one element it is the exponential of each."""
    return _elementwise(0)(args, result) if result.shape[-2:] == (1, 1) else result.stride()


def _pooled3d(args: Sequence[Any], result: Tensor) -> Strides:
    """One volume is looked at as a batch of one."""
    if result.dim() == 5:
        return _suggested(0)(args, result)
    batch = args[0].unsqueeze(0)
    last = not batch.is_contiguous() and batch.is_contiguous(memory_format=torch.channels_last_3d)
    return in_order([1, 2, 3, 0] if last else range(4), result.shape)


def _turned(args: Sequence[Any], result: Tensor) -> Strides:
    """By quarters: a flip, and every other time a transposition."""
    times, dims = (args[1] if len(args) > 1 else 1) % 4, args[2] if len(args) > 2 else (0, 1)
    if not times:
        return _contiguous(args, result)
    strides = [*kept(args[0].stride(), args[0].shape)]
    if times != 2:
        strides[dims[0]], strides[dims[1]] = strides[dims[1]], strides[dims[0]]
    return strides


def _plainly(args: Sequence[Any], result: Tensor) -> Strides:
    """Contiguous where it may be taken for that."""
    found = _contiguous(args, result)
    return found if laid_alike(found, result) else result.stride()


def _gated(args: Sequence[Any], result: Tensor) -> Strides:
    """Of two halves."""
    return iterated([(args[0].stride(), result.shape)] * 2, result.shape)


def _weights_gradient(args: Sequence[Any], result: Tensor) -> Strides:
    """Of a convolution in one dimension as its weight, if that is contiguous."""
    weight: Tensor = args[2]
    return weight.stride() if result.dim() == 3 and weight.is_contiguous() else result.stride()


def _of_complex(rule: Rule) -> Rule:
    """A rule for complex arguments; of others, elementwise kernels take a way that is no exception."""

    def chosen(args: Sequence[Any], result: Tensor) -> Strides:
        return (rule if args[0].is_complex() else _elementwise())(args, result)

    return chosen


def _transformed(strides: Strides, dims: Sequence[int], shape: Sequence[int]) -> Strides:
    """Return strides of a Fourier transform over some dimensions: these are the innermost, in the given order.

    The fake kernel leaves the others in their order where two of their strides are equal. MKL's way swaps them while it
    sets the transformed ones apart, and then sorts.
    """
    others = list(range(len(shape)))
    left, right = 0, len(others)
    while True:
        while left < right and others[left] not in dims:
            left += 1
        while left < right and others[right - 1] in dims:
            right -= 1
        if left == right:
            break
        others[left], others[right - 1] = others[right - 1], others[left]
        left, right = left + 1, right - 1
    return in_order([*sorted(others[:left], key=lambda dim: -strides[dim]), *dims], shape)


def _fourier(args: Sequence[Any], result: Tensor) -> Strides:
    """Complex to complex, and real to complex, where the last dimension stays the innermost."""
    strides = args[0].stride()
    if not args[1] or not _HAS_MKL:
        return result.stride()
    last = [] if args[0].is_complex() else [args[1][-1]]
    dims = sorted(args[1][: len(args[1]) - len(last)], key=lambda dim: -strides[dim])
    return _transformed(strides, [*dims, *last], result.shape)


def _fourier_to_real(args: Sequence[Any], result: Tensor) -> Strides:
    """Complex to complex over all dimensions but the last, then to real over that."""
    if not _HAS_MKL:
        return result.stride()
    value, (*dims, last) = args[0], args[1]
    strides = value.stride()
    if dims:
        dims.sort(key=lambda dim: -strides[dim])
        strides = _transformed(strides, dims, value.shape)
    return _transformed(strides, [last], result.shape)


RULES: dict[Any, dict[int, Rule]] = {
    aten._fft_c2c.default: {0: _fourier},
    aten._fft_r2c.default: {0: _fourier},
    aten._fft_c2r.default: {0: _fourier_to_real},
    aten._log_softmax_backward_data.default: {0: _contiguous},
    aten.huber_loss_backward.default: {0: _contiguous},
    aten._log_softmax.default: {0: _contiguous},
    aten._softmax_backward_data.default: {0: _contiguous},
    aten.normal.Tensor_float: {0: _contiguous},
    aten.renorm.default: {0: _contiguous},
    aten.index_put.default: {0: _like(0)},
    aten.hardtanh.default: {0: _like(0)},
    aten.nan_to_num.default: {0: _like(0)},
    aten.deg2rad.default: {0: _like(0)},
    aten.rad2deg.default: {0: _like(0)},
    aten.frexp.Tensor: {0: _like(0), 1: _like(0)},
    aten.log_normal.default: {0: _like(0)},
    aten.upsample_nearest2d.default: {0: _suggested(0)},
    aten.upsample_nearest2d.vec: {0: _suggested(0)},
    aten._upsample_nearest_exact2d.default: {0: _suggested(0)},
    aten._upsample_nearest_exact2d.vec: {0: _suggested(0)},
    aten.log_sigmoid_forward.default: {0: _contiguous, 1: _contiguous},
    aten.mse_loss_backward.default: {0: _contiguous},
    aten.native_layer_norm.default: {0: _contiguous, 1: _contiguous, 2: _contiguous},
    aten.native_layer_norm_backward.default: {0: _contiguous, 1: _contiguous, 2: _contiguous},
    aten.nll_loss2d_forward.default: {0: _contiguous},
    aten.normal.Tensor_Tensor: {0: _contiguous},
    aten.smooth_l1_loss_backward.default: {0: _contiguous},
    aten.pow.Scalar: {0: _contiguous},
    aten.masked_fill.Scalar: {0: _contiguous},
    aten.grid_sampler_2d.default: {0: _contiguous},
    aten.im2col.default: {0: _contiguous},
    aten.glu_backward.default: {0: _contiguous},
    aten.poisson.default: {0: _contiguous},
    aten._standard_gamma.default: {0: _contiguous},
    aten.normal.float_Tensor: {0: _contiguous},
    aten.isin.Tensor_Tensor: {0: _contiguous},
    aten.isin.Tensor_Scalar: {0: _contiguous},
    aten.index.Tensor: {0: _indexed},
    aten.abs.default: {0: _of_complex(_like(0))},
    aten.view.default: {0: _of_view},
    aten._unsafe_view.default: {0: _of_view},
    aten._reshape_alias.default: {0: lambda args, result: args[2]},
    aten.angle.default: {0: _of_complex(_contiguous)},
    aten.roll.default: {0: _rolled},
    aten._native_batch_norm_legit.default: {0: _normed(0)},
    aten._native_batch_norm_legit.no_stats: {0: _normed(0)},
    aten._native_batch_norm_legit_functional.default: {0: _normed(0)},
    aten._native_batch_norm_legit_no_training.default: {0: _normed(0)},
    aten.batch_norm_backward.default: {0: _normed_backward},
    aten.native_batch_norm.default: {0: _normed(0)},
    aten.native_batch_norm_backward.default: {0: _normed_backward},
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
    aten.soft_margin_loss_backward.default: {0: _elementwise(2)},
    aten.upsample_bicubic2d.default: {0: _suggested(0)},
    aten.upsample_bilinear2d.vec: {0: _suggested(0)},
    aten.upsample_trilinear3d.vec: {0: _suggested(0)},
    aten.upsample_trilinear3d.default: {0: _suggested(0)},
    aten.upsample_bilinear2d.default: {0: _suggested(0)},
    aten.upsample_bicubic2d.vec: {0: _suggested(0)},
    aten.linalg_matrix_exp.default: {0: _matrix_exp},
    aten.max_pool3d_with_indices.default: {0: _pooled3d, 1: _pooled3d},
    aten.norm.ScalarOpt_dim: {0: _contiguous},
    aten.rsub.Tensor: {0: _elementwise(1, 0)},
    aten.zero.default: {0: _like(0)},
    aten.fill.Scalar: {0: _like(0)},
    aten.fill.Tensor: {0: _like(0)},
    aten.hardswish.default: {0: _elementwise(0)},
    aten.hardsigmoid_backward.default: {0: _elementwise(0, 1)},
    aten.polar.default: {0: _elementwise(0, 1, converted=False)},
    aten.complex.default: {0: _elementwise(0, 1, converted=False)},
    aten.mish_backward.default: {0: _elementwise(0, 1)},
    aten.mse_loss.default: {0: _elementwise(0, 1)},
    aten.smooth_l1_loss.default: {0: _elementwise(0, 1)},
    aten._prelu_kernel.default: {0: _like(0)},
    aten._scaled_dot_product_flash_attention_for_cpu.default: {0: _like(0)},
    aten.binary_cross_entropy_with_logits.default: {0: _like(1)},
    aten.addr.default: {0: _elementwise(0, numbers=1)},
    aten.convolution_backward.default: {1: _weights_gradient},
    aten.diag_embed.default: {0: _plainly},
    aten.flip.default: {0: _like(0)},
    aten.mvlgamma.default: {0: _plainly},
    aten.rot90.default: {0: _turned},
    aten.glu.default: {0: _gated},
    aten.linalg_vector_norm.default: {0: _contiguous},
    aten.sort.default: {0: _like(0), 1: _like(0)},
    aten.sort.stable: {0: _like(0), 1: _like(0)},
    aten.nll_loss2d_backward.default: {0: _contiguous},
    aten.tril.default: {0: _contiguous},
    aten.triu.default: {0: _contiguous},
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

# Pointwise ops that take a number as it is, though their names speak of one.
_NUMBER_IN_KERNEL = frozenset({aten.pow.Tensor_Scalar, aten.lerp.Scalar})
# They take a memory format, and keep that of their argument unless given one.
_COPIES = frozenset(
    {
        *(aten.clone.default, aten._to_copy.default, aten.empty_like.default, aten.full_like.default),
        *(aten.zeros_like.default, aten.ones_like.default, aten.rand_like.default, aten.randn_like.default),
        *(aten.randint_like.default, aten.randint_like.low_dtype),
    }
)


def rule_for(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], index: int, result: Tensor) -> Rule | None:
    """Return the rule of an op's result at an index, None where its fake kernel is to be believed."""
    if op in RULES:
        return RULES[op].get(index)
    if op in _COPIES:
        return _like(0) if kwargs.get("memory_format") in (None, torch.preserve_format) else None
    if torch.Tag.pointwise not in op.tags:
        return None
    named = "scalar" in op._overloadname.lower() and op not in _NUMBER_IN_KERNEL
    given = zip(op._schema.arguments, args, strict=False)
    wrapped = (isinstance(item.type, torch.TensorType) and not isinstance(one, Tensor) for item, one in given)
    return _elementwise(numbers=int(named or any(wrapped)))
