"""Which sums of gradients autograd writes over the first of them.

Where several gradients of one value meet, autograd's engine adds each to what is there: in place where nobody else
holds that, else by a new tensor (``accumulate`` in torch's ``input_buffer.cpp``). A trace always makes new ones. Both
have the same values, but written over, the sum keeps the first gradient's strides, those of dimensions of one element
among them, by which norms and convolutions choose their way.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rematerialize import torch_private as private
from rematerialize.capture.aliasing import find_aliases, tensors_of
from rematerialize.capture.strides import is_dense, iterated


def sums_in_place(joint: private.JointTrace) -> frozenset[int]:
    """Return which of a trace's sums of gradients (``meta["summed"]``, in their order) eager computes in place."""
    graph = joint.graph
    # All other sums keep the first one's layout anyway.
    sums = [node for node in graph.nodes if "summed" in node.meta and 1 in node.meta["val"].shape]
    if not sums or any(_has_sparse(node) for node in graph.nodes):  # sparse gradients are refused later
        return frozenset()
    place = {node: at for at, node in enumerate(graph.nodes)}
    aliases = find_aliases(graph)
    last: dict[str, int] = {}  # by storage, where it is read last
    for node in graph.nodes:
        own = aliases.of.get(node, ())
        for read in node.all_input_nodes:
            for storage in aliases.of.get(read, ()):
                if storage not in own:
                    last[storage] = place[node]

    tangents = {tangent for tangent, _ in joint.tangents}

    def alone(node: fx.Node) -> bool:
        first: Any = node.args[0]
        value, storage = first.meta["val"], aliases.single(first)
        origin = aliases.origin[storage]
        while first.target in _NO_VIEWS:
            first = first.args[0]
        # Autograd's views hold on to their base, even where no gradient is recorded.
        made = first is origin and (origin.op == "call_function" or origin in tangents)
        return made and last[storage] == place[node] and is_dense(value.stride(), value.shape)

    return frozenset(node.meta["summed"] for node in sums if alone(node))


def _has_sparse(node: fx.Node) -> bool:
    return any(tensor.layout != torch.strided for _, tensor in tensors_of(node.meta.get("val")))


# They share a storage with their argument, but aren't views of it.
_NO_VIEWS = frozenset({operator.getitem, torch.ops.aten._unsafe_view.default})


def is_laid_otherwise(node: fx.Node) -> bool:
    """Return whether a new tensor for a sum has other strides than its first summand."""
    first, second = (argument.meta["val"] for argument in node.args[:2])  # type: ignore[union-attr]
    new = iterated([(first.stride(), first.shape), (second.stride(), second.shape)], first.shape)
    return tuple(first.stride()) != tuple(new)
