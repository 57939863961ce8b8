"""Layouts that a trace loses: those of in-place ops' results, and storages that tangents share.

Functionalization turns ``x.scatter_add_(...)`` into ``scatter_add(x, ...)``, whose result is contiguous whatever the
layout of ``x``. The values are the same, but the strides that the user sees are not, nor, sometimes, the bits of what
is computed from them: a kernel takes the last elements of a row by other instructions than the rest, so that the rows
of a slice (ATen's GRU cells work in slices of their gates) and of a whole tensor round differently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from rematerialize import torch_private as private
from rematerialize.capture.random import computed, follow
from rematerialize.capture.strides import is_dense, laid_alike

aten = torch.ops.aten

# Pieces that functionalization takes for tensors of their own.
_UNSAFE_SPLITS = frozenset({aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default})


def lay_out(value: Tensor, size: list[int], stride: list[int]) -> Tensor:
    """A copy of a tensor that owns its storage, in a given layout; along a stride of zero it has one element."""
    fresh = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
    written = fresh
    for dim, step in enumerate(stride):
        if step == 0 and size[dim] > 1:
            written, value = written.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    written.copy_(value)
    return fresh


def part_tangents(graph: fx.Graph, primals: Iterable[fx.Node], tangents: Iterable[fx.Node]) -> None:
    """Give each fake tangent a storage of its own: that of an output which looks at another's, or at a parameter's
    (chunk, split, unbind), shares it.
    """
    taken = {private.storage_key(node.meta["val"]) for node in primals if isinstance(node.meta["val"], Tensor)}
    parted: set[fx.Node] = set()
    for node in tangents:
        value = node.meta["val"]
        if private.storage_key(value) in taken:
            _lay_tangent(node, value)
            parted.add(node)
        taken.add(private.storage_key(node.meta["val"]))
    for node in graph.nodes if parted else ():
        if node.op == "call_function" and any(source in parted for source in node.all_input_nodes):
            follow(node, parted)


def eager_layouts(joint: private.JointTrace) -> None:
    """Give values the layouts that they have in eager, where the trace lost them, and correct what depends on them.

    The tangent of an output follows: a step is recorded for tangents in the layout of their outputs.
    """
    tangent_of = {joint.outputs[position]: tangent for tangent, position in joint.tangents}
    changed: set[fx.Node] = set()
    for output, tangent in tangent_of.items():
        # Where an output may be taken for contiguous and for channels last, torch takes its tangent for contiguous.
        value = output.meta["val"] if output is not None else None
        traced = tangent.meta["val"]
        if not isinstance(value, Tensor) or traced.shape != value.shape:
            continue
        if traced.stride() != value.stride() and laid_alike(traced.stride(), value):
            _lay_tangent(tangent, value)
            changed.add(tangent)
    for node in list(joint.graph.nodes):
        if node.op != "call_function":
            continue
        if any(source in changed for source in node.all_input_nodes) or _is_unlike_a_view(node):
            follow(node, changed)
        strides = _eager_strides(node)
        if strides is not None:
            _restore(joint.graph, node, strides)
            changed.add(node)
        if node in changed and node in tangent_of:
            _lay_tangent(tangent_of[node], node.meta["val"])
            changed.add(tangent_of[node])


def _is_unlike_a_view(node: fx.Node) -> bool:
    """Whether a trace gave a view a storage of its own: there the layout of what it looks at allowed none."""
    if node.target is not aten.view.default:
        return False
    looked_at = node.args[0].meta["val"]  # type: ignore[union-attr]
    return private.storage_key(node.meta["val"]) != private.storage_key(looked_at)


def _lay_tangent(tangent: fx.Node, value: Any) -> None:
    """Give a fake tangent a storage of its own, in the layout of a value."""
    with value.fake_mode:
        fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    tangent.meta["val"] = fresh


def _eager_strides(node: fx.Node) -> tuple[int, ...] | None:
    """The strides that a value has in eager, where the trace gives it others."""
    source, value = node.args[0] if node.args else None, node.meta.get("val")
    if not isinstance(source, fx.Node) or not isinstance(value, Tensor):
        return None
    if not node.meta.get("in_place"):
        return None
    like, kernels = source.meta["val"], computed(node)
    if (like.shape, like.dtype) != (value.shape, value.dtype) or like.stride() == kernels.stride():
        return None
    traced = value.stride() == like.stride()  # eager's already, since formulas of the backward ask for it
    return tuple(like.stride()) if traced or is_dense(like.stride(), like.shape) or _goes_on(node, source) else None


def _goes_on(node: fx.Node, source: fx.Node) -> bool:
    """Whether a piece of a tensor that was split is written to again."""
    split = source.args[0] if source.target is private.getitem else None
    again = any(user.meta.get("in_place") and user.args[0] is node for user in node.users)
    return isinstance(split, fx.Node) and split.target in _UNSAFE_SPLITS and again


def _restore(graph: fx.Graph, node: fx.Node, strides: tuple[int, ...]) -> None:
    """The op's result goes to a node of its own; ``node`` becomes the copy in the right layout."""
    value = computed(node)
    with graph.inserting_before(node):
        kernel = graph.call_function(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    kernel.meta.update(node.meta)
    kernel.meta["val"] = value
    node.target, node.args, node.kwargs = lay_out, (kernel, list(value.shape), list(strides)), {}
    with value.fake_mode:
        node.meta["val"] = lay_out(value, list(value.shape), list(strides))
