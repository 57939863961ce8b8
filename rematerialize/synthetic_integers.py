"""Integers that decide how much a kernel works: indices spread over what they index, and groups of one size.

With zeros everywhere a gather would read one row again and again, a scatter would add to one row in turn, and the
groups of a mixture of experts would be empty: their products took a tenth of their time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_SPREAD = 0.6180339887498949  # multiples of the golden ratio lie evenly in (0, 1), and neighbours far apart


def decide_work(node: fx.Node, data: Mapping[fx.Node, Any]) -> None:
    """Write the integers that one call reads, of those sources that have data.

    Parameters
    ----------
    node : fx.Node
        A call, with its value in ``meta``.
    data : mapping of fx.Node to tensor
        What the call will read; integers in it are written, the whole storage behind them.
    """
    packet = getattr(node.target, "_overloadpacket", None)
    for source, bound in _indices(packet, node.args):
        indices = _integers(data, source)
        if indices is not None:
            flat = _flat(indices)
            places = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device).mul_(_SPREAD).frac_()
            flat.copy_(places.mul_(bound).clamp_(max=max(bound - 1, 0)))
    ends = _integers(data, node.args[2]) if packet is aten._grouped_mm and len(node.args) > 2 else None
    if ends is not None:
        left, right = (_shape(source) for source in node.args[:2])
        rows = right[-1] if len(left) == 3 else left[-2] if len(right) == 3 else left[-1]
        ends.copy_(torch.arange(1, len(ends) + 1, device=ends.device) * rows // len(ends))


def _indices(packet: Any, args: Any) -> Iterator[tuple[Any, int]]:
    """Sources of indices that a call reads, each with the size of the dimension that it indexes."""
    if packet in _BY_POSITION:
        yield _BY_POSITION[packet](args)
    elif packet in _LISTS:
        sizes = _shape(args[0])
        if all(source is None or not _is_mask(source) for source in args[1]):  # a mask takes several dimensions
            yield from ((source, size) for source, size in zip(args[1], sizes, strict=False) if source is not None)


def _of_dimension(args: Any) -> tuple[Any, int]:
    sizes = _shape(args[0])
    return args[2], sizes[args[1]] if sizes else 1


_BY_POSITION: Mapping[Any, Callable[[Any], tuple[Any, int]]] = {
    aten.embedding: lambda args: (args[1], _shape(args[0])[0]),
    aten.embedding_dense_backward: lambda args: (args[1], args[2]),
    **dict.fromkeys(
        (
            aten.gather,
            aten.index_add,
            aten.index_copy,
            aten.index_fill,
            aten.index_select,
            aten.scatter,
            aten.scatter_add,
            aten.scatter_reduce,
        ),
        _of_dimension,
    ),
}
_LISTS = frozenset({aten.index, aten.index_put, aten._unsafe_index, aten._unsafe_index_put})


def _shape(source: Any) -> torch.Size:
    value: Tensor = source.meta["val"]
    return value.shape


def _is_mask(source: fx.Node) -> bool:
    value: Tensor = source.meta["val"]
    return value.dtype in (torch.bool, torch.uint8)


def _integers(data: Mapping[fx.Node, Any], source: Any) -> Tensor | None:
    value = data.get(source)
    return value if isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64) else None


def _flat(tensor: Tensor) -> Tensor:
    """All of the memory behind a tensor, which may show it more than once, or in part."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
