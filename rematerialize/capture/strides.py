"""Arithmetic of strides: dense layouts in an order of dimensions, and that in which elementwise kernels walk."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Strides = Sequence[int]


def in_order(outer_to_inner: Sequence[int], shape: Sequence[int]) -> Strides:
    """Return dense strides for dimensions in an order, the outermost first."""
    strides = [1] * len(shape)
    step = 1
    for dim in reversed(outer_to_inner):
        strides[dim] = step
        step *= max(1, shape[dim])
    return strides


def channels_last(value: Tensor) -> bool:
    """Return whether strides grow from channels to batch, gaps allowed; no where it could be either way."""
    if value.dim() not in (4, 5) or not value.stride(1) or not value.numel():
        return False
    least = 0
    for dim in (1, *reversed(range(2, value.dim())), 0):
        if value.stride(dim) < least or (dim == 0 and least == value.stride(1)):
            return False
        least = value.stride(dim) * value.shape[dim]
    return True


def walked(operands: Sequence[Strides], shape: Sequence[int]) -> Strides:
    """Return strides of what ATen's TensorIterator allocates for operands of some strides, all of the result's shape.

    Dimensions go from inner to outer by the strides of the first operand that tells two of them apart; one that is
    broadcast along a dimension doesn't.
    """
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
    return in_order(inner_to_outer[::-1], shape)


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


def iterated(operands: Sequence[tuple[Strides, Sequence[int]]], shape: Sequence[int]) -> Strides:
    """Return strides of what ATen's TensorIterator allocates for operands of some strides and shapes, those of
    dimensions of one element among them: kernels that choose by ``suggest_memory_format`` look at these.

    Where all operands have the result's shape, it has ways of its own: contiguous, channels last, or all alike.
    """
    if all(tuple(of) == tuple(shape) for _, of in operands):
        first, *others = (strides for strides, _ in operands)
        dense = taken_for([first, *others], shape, maps=(4,))
        if dense is not None:
            return dense
        if all(tuple(strides) == tuple(first) for strides in others) and is_dense(first, shape):
            return first
    return walked([_broadcast(strides, of, shape) for strides, of in operands], shape)


def kept(strides: Strides, shape: Sequence[int]) -> Strides:
    """Return strides of what ``empty_like`` makes of a tensor: its own where it has no gaps, else its order's."""
    return strides if is_dense(strides, shape) else walked([strides], shape)


def taken_for(operands: Sequence[Strides], shape: Sequence[int], maps: Sequence[int]) -> Strides | None:
    """Return contiguous strides where all operands may be taken for that, or else those of channels last, for shapes
    of so many dimensions; None where neither.
    """
    dims = range(len(shape))
    for order in (dims, [0, *dims[2:], 1]) if len(shape) in maps else (dims,):
        dense = in_order(order, shape)
        if all(_same_places(strides, dense, shape) for strides in operands):
            return dense
    return None


def viewed(strides: Strides, shape: Sequence[int], new_shape: Sequence[int]) -> Strides | None:
    """Return strides of a view of another shape, as ATen's ``computeStride`` finds them; None where it must be a copy.

    Dimensions that lie one in the other without a gap are one chunk, and each is split anew by itself. A new
    dimension of one element stands outside of the chunk that is behind it.
    """
    if not strides:
        return [1] * len(new_shape)
    found = [0] * len(new_shape)
    at = len(new_shape) - 1
    step, elements, taken = strides[-1], 1, 1
    for dim in reversed(range(len(shape))):
        elements *= shape[dim]
        ends = dim == 0 or (shape[dim - 1] != 1 and strides[dim - 1] != elements * step)
        if not ends:
            continue
        while at >= 0 and (taken < elements or new_shape[at] == 1):
            found[at] = taken * step
            taken *= new_shape[at]
            at -= 1
        if taken != elements:
            return None
        step, elements, taken = strides[max(dim - 1, 0)], 1, 1
    return found if at < 0 else None


def _broadcast(strides: Strides, of: Sequence[int], shape: Sequence[int]) -> Strides:
    missing = len(shape) - len(of)
    kept = zip(strides, of, shape[missing:], strict=True)
    return [0] * missing + [0 if size == 1 != wanted else stride for stride, size, wanted in kept]


def _same_places(strides: Strides, others: Strides, shape: Sequence[int]) -> bool:
    return all(ours == other or size == 1 for ours, other, size in zip(strides, others, shape, strict=True))


def laid_alike(strides: Strides, like: Tensor) -> bool:
    """Return whether strides lay elements out as a tensor's do: of dimensions of one element they don't count."""
    return like.numel() == 0 or _same_places(strides, like.stride(), like.shape)


def is_apart(strides: Strides, shape: Sequence[int]) -> bool:
    """Return whether no two elements share memory, but for those along a stride of zero."""
    reached = 0
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1 and s):
        if stride <= reached:
            return False
        reached += stride * (size - 1)
    return True


def adopted_for(strides: Strides, like: Tensor) -> bool:
    """Return whether autograd keeps a gradient of some strides as a dense tensor's: torch's layout contract, by which
    dimensions of one element may have any stride but zero.
    """
    compared = zip(strides, like.stride(), like.shape, strict=True)
    return all(ours if size == 1 else ours == other for ours, other, size in compared)


def is_dense(strides: Strides, shape: Sequence[int]) -> bool:
    """Return whether every byte between the first and the last element belongs to one element."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
