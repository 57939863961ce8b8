"""Layouts of what ATen's CPU kernels return, for the ops whose fake kernels report another one.

A trace believes its fake kernels. Where they report a layout that the kernel doesn't return, a ``contiguous()`` or a
``reshape`` behind it copies in a real step and is left out of the trace, or the reverse: a kernel that relies on the
layout then reads its input in the wrong order. The rules (`layout_rules`) are those of ATen's kernels;
``python -m benchmarks.conformance layouts`` compares every op of torch's own test samples with its fake kernel,
``python -m benchmarks.conformance.generated`` every functional op of ATen on drawn arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rematerialize import torch_private as private
from rematerialize.capture.layout_rules import rule_for
from rematerialize.capture.strides import Strides

aten = torch.ops.aten


def kernel_strides(
    op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], index: int, result: Tensor
) -> Strides | None:
    """Return the strides of the op's result at an index, where they differ from those of the fake ``result``.

    Those of dimensions of one element count: convolutions and norms choose by them between channels last and
    contiguous (``suggest_memory_format``). Results of less than two dimensions don't: a loss that was reduced has no
    layout.
    """
    if result.device.type != "cpu" or result.layout != torch.strided or result.dim() < 2 or not result.numel():
        return None
    rule = rule_for(op, args, kwargs, index, result)
    found = rule(args, result) if rule is not None else result.stride()
    return None if tuple(found) == result.stride() else found


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
