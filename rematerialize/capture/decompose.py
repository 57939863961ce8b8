"""Ops that are too coarse to plan, split during the capture into pieces with the same values.

A fused LSTM layer over 200 steps is one op whose workspace alone can exceed a budget. Run over chunks of the
time axis, with the state carried over, the same kernel gives the same outputs (to the bit where the rounding of a
matrix product does not depend on how many rows it has) at the same speed, and each
chunk can be recomputed on its own. Weight gradients are then summed over chunks: equal up to rounding.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rematerialize.capture.explain import looks_at_values
from rematerialize.capture.kernel_layouts import DRAWS
from rematerialize.capture.refusals import refuse_before, refuse_other_layouts
from rematerialize.errors import CaptureError

_SHORTEST_SPLIT_SEQUENCE = 32
# A chunk's workspace is several times its outputs, so chunks are shorter than the square root of the steps.
_CHUNK_OF_SQRT = 0.7


class splitting_recurrences(TorchFunctionMode):
    """While active, unpacked one-directional LSTMs run layer by layer over chunks of the time axis.

    With ``split=False`` they run whole. ``found`` says whether there were any, and ``looked`` is what the first
    look at a value raised, which the forward may have caught. ``drew`` is told of every generator that a function was
    given.
    """

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.split = split
        self.found = False
        self.looked: Exception | None = None
        self.drew: Callable[[torch.Generator], None] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        refuse_before(func, sys._getframe(1).f_code)
        if func is torch.lstm and not kwargs and _splittable(args):
            self.found = True
            if self.split:
                return _lstm_in_chunks(*args)
        if func is Tensor.random_:
            args, kwargs = _from_zero(args, kwargs or {})
        generator = kwargs.get("generator") if kwargs else None
        draw = DRAWS.get(func) if generator is not None else None
        try:
            result = (draw or func)(*args, **(kwargs or {}))
        except Exception as error:
            if self.looked is None and looks_at_values(func, error):
                self.looked = error
            raise
        if isinstance(generator, torch.Generator) and self.drew is not None:
            self.drew(generator)
        refuse_other_layouts(result)
        # Torch's own trace of the draw in place takes no generator.
        return result if draw is None else args[0].copy_(result)


def _from_zero(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """``random_(0, n)`` as ``random_(n)``, which draws alike: torch can't write the code of a trace with the former,
    whose overload has the name of a keyword of Python.
    """
    rest = dict(kwargs)
    bounds = [*args[1:], *(rest.pop(name) for name in ("from", "to") if name in rest)]
    if len(bounds) < 2:
        return args, kwargs
    if bounds[0] != 0 or bounds[1] is None:
        raise CaptureError(
            "the forward calls random_ with a lower bound other than 0, which torch can't trace: draw random_(n) and "
            "add the bound"
        )
    return (args[0], bounds[1]), rest


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
