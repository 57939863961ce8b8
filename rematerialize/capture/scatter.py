"""Writes into a part of a tensor: what functionalization makes of ``x[:, 1:] = y``, put together again.

Functionalization turns such a write into a chain: slice, slice of the slice, copy, scatter, scatter, each
scatter a new copy of the whole tensor. Here the chain becomes one call, ``write_through``, which has an
in-place form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# Scatter op -> the view that it writes through, and the number of arguments after (base, source).
_VIEW_OF = {
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
    aten.as_strided_scatter.default: aten.as_strided.default,
    aten.diagonal_scatter.default: aten.diagonal.default,
}
_VIEWS = {str(view): view for view in _VIEW_OF.values()}

Path = tuple[tuple[Any, ...], ...]


def write_through(base: Tensor, source: Tensor, path: Path) -> Tensor:
    """A copy of ``base``, in its layout, with ``source`` written into the view that ``path`` leads to."""
    fresh = torch.empty_strided(base.shape, base.stride(), dtype=base.dtype, device=base.device)
    return write_through_(fresh.copy_(base), source, path)


def write_through_(base: Tensor, source: Tensor, path: Path) -> Tensor:
    """The same on ``base`` itself."""
    view = base
    for name, *arguments in path:
        view = _VIEWS[name](view, *arguments)
    view.copy_(source)
    return base


def write_through_scatters(graph: fx.Graph) -> None:
    """Rewrite scatters into ``write_through`` calls, nested ones into one, copies before them away."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _VIEW_OF and not node.kwargs:
            base, source, *arguments = node.args
            if _dense(base):
                path = ((str(_VIEW_OF[node.target]), *arguments),)
                _become(node, base, _without_copy(node, source), path)
                _absorb_inner(node)


def _dense(base: Any) -> bool:
    value = base.meta.get("val") if isinstance(base, fx.Node) else None
    return isinstance(value, Tensor) and not value.is_conj() and not value.is_neg()


def _become(node: fx.Node, base: Any, source: Any, path: Path) -> None:
    node.target = write_through
    node.args = (base, source, path)


def _without_copy(node: fx.Node, source: Any) -> Any:
    """``copy(view, y)`` only gives y the view's dtype and layout, which writing does anyway."""
    while isinstance(source, fx.Node) and source.target is aten.copy.default and len(source.args) == 2:
        inner = source.args[1]
        if not isinstance(inner, fx.Node) or inner.meta["val"].shape != source.meta["val"].shape:
            break
        if inner.meta["val"].device != source.meta["val"].device:
            break
        source = inner
    return source


def _absorb_inner(node: fx.Node) -> None:
    """``scatter(B, scatter(view(B), y))`` through the same view is one write into B."""
    base, inner, path = node.args
    while isinstance(inner, fx.Node) and inner.target is write_through and len(inner.users) == 1:
        view, source, inner_path = inner.args
        if not isinstance(view, fx.Node) or view.op != "call_function":
            return
        through = ((str(view.target), *view.args[1:]),)
        if view.args[0] is not base or view.kwargs or _padded(through) != _padded(path):  # type: ignore[arg-type]
            return
        path = (*path, *inner_path)  # type: ignore[misc]
        node.args = (base, source, path)
        inner = source


_DEFAULTS = {str(aten.slice.Tensor): (0, None, None, 1), str(aten.diagonal.default): (0, 0, 1)}


def _padded(path: Path) -> list[tuple[Any, ...]]:
    """Arguments with their defaults filled in, ends beyond any tensor made equal."""
    padded = []
    for name, *arguments in path:
        defaults = _DEFAULTS.get(name, ())
        full = [*arguments, *defaults[len(arguments) :]]
        if name == str(aten.slice.Tensor):
            full[1] = full[1] or 0
            full[2] = None if full[2] is None or full[2] >= 2**63 - 1 else full[2]
        padded.append((name, *full))
    return padded


def reads_elsewhere(node: fx.Node) -> bool:
    """Does a ``write_through`` read only parts of its own base that it doesn't write?

    Its source may be a slice of the base along a dimension where the written slice lies apart.
    """
    if node.target is not write_through:
        return False
    base, source, path = cast("tuple[fx.Node, Any, Path]", node.args)
    written: dict[int, tuple[int, int]] = {}
    for name, *arguments in path:
        if name != str(aten.slice.Tensor):
            return False
        dim, start, end, step = _slice_arguments(arguments)
        if step != 1 or dim in written:
            return False
        written[dim] = _range(base, dim, start, end)
    read: dict[int, tuple[int, int]] = {}
    current = source
    while isinstance(current, fx.Node) and current is not base:
        if current.target is not aten.slice.Tensor or current.kwargs:
            return False
        dim, start, end, step = _slice_arguments(current.args[1:])
        if step != 1 or dim in read:
            return False
        read[dim] = _range(base, dim, start, end)
        current = current.args[0]
    return current is base and any(
        dim in read and (read[dim][1] <= low or high <= read[dim][0]) for dim, (low, high) in written.items()
    )


def _slice_arguments(given: Sequence[Any]) -> tuple[int, int | None, int | None, int]:
    defaults: list[Any] = [0, None, None, 1]
    dim, start, end, step = [*given, *defaults[len(given) :]]
    return dim, start, end, step


def _range(base: Any, dim: int, start: int | None, end: int | None) -> tuple[int, int]:
    size = base.meta["val"].shape[dim]
    low = start or 0
    high = size if end is None else min(end, size)
    return (low + size if low < 0 else low), (high + size if high < 0 else high)
