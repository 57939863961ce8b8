"""Formulas that torch computes in another way under a trace than in eager: put back to eager's, bit for bit.

Some composite kernels look at values in eager (is there a zero? which targets count?) and take a formula without
such a look, equal up to rounding, when a tensor isn't a plain one (``areAnyTensorSubclassLike`` in torch's C++). As
one call of fixed output shape, the look is possible in a planned step, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from rematerialize.capture.aliasing import phase_of
from rematerialize.capture.strides import is_dense

aten = torch.ops.aten


def take_eager_paths(graph: fx.Graph) -> None:
    """Rewrite each such formula into eager's."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        for rewrite in (_spread_evenly, _weights_of_targets, _product, _divided_over, _summed_over):
            found = rewrite(node)
            if found is not None:
                node.target, node.args = found
                node.kwargs = {}
                break


_Call = tuple[Callable[..., Tensor], tuple[Any, ...]]


def spread(mask: Tensor, share: Tensor) -> Tensor:
    """The share where the mask is set, +0 elsewhere: the gradient of max(), min() and median() of a whole tensor."""
    return share.new_zeros(mask.shape).masked_fill_(mask, share)


def _spread_evenly(node: Any) -> _Call | None:
    if not _calls(node, aten.mul.Tensor) or phase_of(node) != "backward" or node.meta["val"].is_cuda:
        return None
    mask, share = node.args
    if not _calls(share, aten.div.Tensor) or not _calls(share.args[1], aten.sum.default):
        return None
    # A user's own backward may say mask * (g / mask.sum()); torch's mask is (x == max) | (x.isnan() & max.isnan()).
    if not _calls(mask, aten.logical_or.default) or not _calls(mask.args[0], aten.eq.Tensor):
        return None
    if share.args[1].args[0] is not mask or mask.meta["val"].dtype != torch.bool or share.meta["val"].dim():
        return None
    return spread, (mask, share)


def weight_of_targets(weight: Tensor, target: Tensor, ignored: Tensor) -> Tensor:
    """The sum of the class weights of the targets that count, in eager's order of summands."""
    return weight.gather(0, target.masked_select(~ignored)).sum()


def _weights_of_targets(node: Any) -> _Call | None:
    """The divisor of a cross entropy with label smoothing, class weights and reduction="mean"."""
    if not _calls(node, aten.sum.default) or not _calls(node.args[0], aten.masked_fill.Scalar):
        return None
    gathered, ignored, fill = node.args[0].args
    if fill != 0 or not _calls(gathered, aten.gather.default) or gathered.args[0].meta["val"].dim() != 1:
        return None
    target, ignored = _viewed(gathered.args[2]), _viewed(ignored)
    if not _calls(target, aten.masked_fill.Scalar) or target.args[1] is not ignored or target.args[2] != 0:
        return None
    # A forward that spells this out itself has the formula on lines of its own.
    if node.meta.get("source") != target.meta.get("source") or not _calls(ignored, aten.eq.Scalar):
        return None
    return weight_of_targets, (gathered.args[0], target.args[0], ignored)


def product_backward(gradient: Tensor, others: Tensor, x: Tensor, result: Tensor, dim: int | None) -> Tensor:
    """The gradient of prod(): by division where no factor is zero, else by ``others``, the product of the others."""
    zeros = int((x == 0).sum())
    if zeros:
        return torch.zeros_like(x) if dim is None and zeros > 1 else gradient * others
    if dim is not None and result.dim() < x.dim():
        result = result.unsqueeze(dim)
    return gradient * (result / x).conj()


def _product(node: Any) -> _Call | None:
    """Gradient times (products of the factors before, times of those behind): two cumprods in a backward."""
    if not _calls(node, aten.mul.Tensor) or phase_of(node) != "backward":
        return None
    others = inner = node.args[1]
    for conjugated in (aten.clone.default, aten._conj.default):  # of complex factors, by a copy
        inner = inner.args[0] if _calls(inner, conjugated) else inner
    if not _calls(inner, aten.mul.Tensor) or not _calls(inner.args[0], aten.cumprod.default):
        return None
    if not _calls(inner.args[1], aten.flip.default) or not _calls(inner.args[0].args[0], aten.cat.default):
        return None
    pieces = inner.args[0].args[0].args[0]
    if len(pieces) != 2 or not _calls(pieces[1], aten.slice.Tensor):
        return None
    x, dim = pieces[1].args[:2]
    for forward in _products(node.graph):
        whole = forward.target is aten.prod.default
        if not whole and forward.args[1] % x.meta["val"].dim() != dim % x.meta["val"].dim():
            continue
        # The slices are of the value itself, or of all its elements in their order where the product was of all.
        same_shape = len(_shape(x)) == 1 if whole else _shape(forward.args[0]) == _shape(x)
        if same_shape and _identity(forward.args[0]) == _identity(x):
            return product_backward, (node.args[0], others, x, forward, None if whole else forward.args[1])
    return None


def divided_over(x: Tensor, divisor: Tensor) -> Tensor:
    """A quotient of complex numbers as ``x.div_(divisor)`` rounds it."""
    return x.clone().div_(divisor)


def _divided_over(node: Any) -> _Call | None:
    """A complex division that the user wrote in place.

    Its last elements, which don't fill a vector, are rounded by other instructions than those of ``x / divisor``:
    where the result may overlap an input the compiler's loop is a plain one.
    """
    if not _calls(node, aten.div.Tensor) or not node.meta.get("in_place") or not node.meta["val"].is_complex():
        return None
    x = node.args[0].meta["val"]
    # What was written through a view with gaps isn't divided vector by vector.
    return (divided_over, node.args) if x.stride() == node.meta["val"].stride() else None


def summed_over(first: Tensor, second: Tensor) -> Tensor:
    """A sum of gradients that autograd writes over the first, with its strides (`capture/summed.py`)."""
    return first.clone().add_(second) if is_dense(first.stride(), first.shape) else first + second


def _summed_over(node: Any) -> _Call | None:
    """Where a dimension of one element may be laid out otherwise: for tangents of another layout, if not for these."""
    return (summed_over, node.args) if node.meta.get("summed_in_place") and 1 in _shape(node) else None


def _products(graph: fx.Graph) -> list[fx.Node]:
    found = (graph.find_nodes(op="call_function", target=op) for op in (aten.prod.dim_int, aten.prod.default))
    return [node for nodes in found for node in nodes]


def _identity(node: Any) -> Any:
    """What a value is, whichever view names it: functionalization makes the views of what was written to anew.

    Views and copies of all elements in their order don't count.
    """
    while isinstance(node, fx.Node) and node.target in _WHOLES:
        node = node.args[0]
    schema = getattr(node.target, "_schema", None) if isinstance(node, fx.Node) else None
    if schema is None or schema.is_mutable or not any(item.alias_info is not None for item in schema.returns):
        return node
    base = node.args[0]
    return node.target, _identity(base), _shape(base), str(node.args[1:]), str(node.kwargs)


_WHOLES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.detach.default, aten.alias.default, aten.clone.default}
)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _viewed(node: Any) -> Any:
    return node.args[0] if _calls(node, aten.view.default) else node


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target
