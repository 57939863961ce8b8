"""Ops that are too coarse to plan, split during the capture into pieces with the same values.

A fused LSTM layer over 200 steps is one op whose workspace alone can exceed a budget. Run over chunks of the
time axis, with the state carried over, the same kernel gives the same outputs (to the bit where the rounding of a
matrix product does not depend on how many rows it has) at the same speed, and each
chunk can be recomputed on its own. Weight gradients are then summed over chunks: equal up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_SHORTEST_SPLIT_SEQUENCE = 32
# A chunk's workspace is several times its outputs, so chunks are shorter than the square root of the steps.
_CHUNK_OF_SQRT = 0.7


def split_recurrence(func: Callable[..., Any], args: Sequence[Any]) -> Callable[..., Any] | None:
    """Return what runs a call of ``torch.lstm`` over chunks of time, or None where it isn't one that can be split."""
    return _lstm_in_chunks if func is torch.lstm and _splittable(args) else None


def _splittable(args: Sequence[Any]) -> bool:
    # The packed overload has (data, batch_sizes, hx, weights, ...): a tensor where this one has a tuple.
    if len(args) != 9 or not isinstance(args[1], (tuple, list)):
        return False
    inputs, _, _, _, _, _, _, bidirectional, batch_first = args
    return not bidirectional and inputs.shape[1 if batch_first else 0] >= _SHORTEST_SPLIT_SEQUENCE


def _lstm_in_chunks(
    inputs: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm`` over chunks of time; each chunk passes through all layers before the next one starts.

    So the backward, too, finishes a chunk before it needs the one before: no layer's outputs or gradients are needed
    over the whole sequence. Dropout between the layers draws for whole sequences in eager: then layer by layer, and as
    in eager's kernels with time first, whatever the order of the inputs: its draws go over memory.
    """
    if batch_first:
        inputs = inputs.transpose(0, 1)
    steps = inputs.shape[0]
    chunk = math.ceil(_CHUNK_OF_SQRT * math.sqrt(steps))
    per_layer = len(weights) // num_layers
    groups = [range(num_layers)] if not (dropout > 0 and train) else [[layer] for layer in range(num_layers)]
    h = [hx[0][layer : layer + 1] for layer in range(num_layers)]
    c = [hx[1][layer : layer + 1] for layer in range(num_layers)]
    for number, group in enumerate(groups):
        pieces = []
        for piece in torch.split(inputs, chunk):
            for layer in group:
                own = list(weights[layer * per_layer : (layer + 1) * per_layer])
                piece, h[layer], c[layer] = torch.lstm(
                    piece, (h[layer], c[layer]), own, has_biases, 1, 0.0, train, bidirectional, False
                )
            pieces.append(piece)
        inputs = torch.cat(pieces)
        if number < len(groups) - 1:
            inputs = torch.dropout(inputs, dropout, train)
    return inputs.transpose(0, 1) if batch_first else inputs, torch.cat(h), torch.cat(c)
