"""Convolution backward in two ops: the weight's gradient, then the input's.

One op computes both by the same two kernels that the halves run alone, but holds the workspace and the outputs of
both at once, and the layer's input to the end: on a U-Net that op is the peak of the whole step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from rematerialize import torch_private as private

aten = torch.ops.aten

_MASK = 10


def split_convolution_backwards(graph: fx.Graph) -> None:
    """Split every ``convolution_backward`` that computes the input's gradient and another one."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.convolution_backward.default:
            for_input, for_weight, for_bias = node.args[_MASK]
            if for_input and (for_weight or for_bias):
                _split(graph, node, for_weight, for_bias)


def _split(graph: fx.Graph, node: fx.Node, for_weight: bool, for_bias: bool) -> None:
    value = node.meta["val"]
    with graph.inserting_before(node):
        arguments = (*node.args[:_MASK], [False, for_weight, for_bias])
        weight_part = graph.call_function(aten.convolution_backward.default, arguments)
    weight_part.meta.update(node.meta)
    weight_part.meta["val"] = (None, value[1], value[2])
    for user in list(node.users):
        if user.target is private.getitem and user.args[1] != 0:
            user.args = (weight_part, user.args[1])
    gradient, layer_input, *rest = node.args[:_MASK]
    node.args = (gradient, _stand_in(graph, node, gradient, layer_input), *rest, [True, False, False])
    node.meta["val"] = (value[0], None, None)


def _stand_in(graph: fx.Graph, node: fx.Node, gradient: Any, layer_input: Any) -> fx.Node:
    """The input's gradient needs the input's shape only: the incoming gradient can lend its memory for that."""
    grown: Tensor = gradient.meta["val"]
    like: Tensor = layer_input.meta["val"]
    lendable = (
        grown.is_contiguous()
        and like.is_contiguous()
        and grown.storage_offset() == 0
        and grown.numel() >= like.numel()
        and grown.dtype == like.dtype
    )
    if not lendable:
        return layer_input  # type: ignore[no-any-return]
    with graph.inserting_before(node):
        view = graph.call_function(aten.as_strided.default, (gradient, list(like.shape), list(like.stride())))
    view.meta.update({key: node.meta[key] for key in ("partitioner_tag", "seq_nr") if key in node.meta})
    with grown.fake_mode:  # type: ignore[attr-defined]
        view.meta["val"] = aten.as_strided.default(grown, like.shape, like.stride())
    return view
