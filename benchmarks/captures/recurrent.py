"""Recurrent networks: torch's fused layers, whole and packed, and cells unrolled in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.captures.case import Case, waves
from rematerialize.zoo.spec import Made

FAMILY = "Recurrence"
WIDTH = 16
SPLIT = "split over time below about half of the peak: weight gradients add up in another order"


class Recurrent(nn.Module):
    """An embedding, a fused recurrence, a head; returns the last state, too."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        y, state = self.layer(self.inner(x).tanh())
        return self.head(y), state


class Packed(Recurrent):
    """The same over sequences of unequal lengths, packed."""

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        packed = pack_padded_sequence(self.inner(x).tanh(), lengths, enforce_sorted=False)
        y, state = self.layer(packed)
        return self.head(pad_packed_sequence(y)[0]), state


class KnownLengths(Recurrent):
    """The same with lengths that are Python numbers."""

    def forward(self, x: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Any]:
        packed = pack_padded_sequence(self.inner(x).tanh(), torch.tensor(lengths), enforce_sorted=False)
        y, state = self.layer(packed)
        return self.head(pad_packed_sequence(y)[0]), state


class Unrolled(nn.Module):
    """A cell called step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(self.head(state[0] if isinstance(state, tuple) else state))
        return torch.stack(outputs)


def sequence(layer: Callable[..., nn.Module], *, width: int = WIDTH, steps: int = 6, **options: Any) -> Any:
    def make() -> Made:
        return Recurrent(layer(WIDTH, WIDTH, **options), width), (waves(steps, 4, WIDTH),)

    return make


def packed(layer: Callable[..., nn.Module]) -> Any:
    def make() -> Made:
        return Packed(layer(WIDTH, WIDTH), WIDTH), (waves(12, 4, WIDTH), torch.tensor([12, 9, 7, 3]))

    return make


def known_lengths() -> Made:
    return KnownLengths(nn.GRU(WIDTH, WIDTH), WIDTH), (waves(12, 4, WIDTH), (12, 9, 7, 3))


def unrolled(cell: Callable[..., nn.Module]) -> Any:
    return lambda: (Unrolled(cell(WIDTH, WIDTH)), (waves(4, 4, WIDTH),))


_PADDED = "over padded sequences"
_DEEP = {"num_layers": 2, "dropout": 0.3}

CASES = (
    Case("rnn", FAMILY, sequence(nn.RNN)),
    Case("rnn_relu", FAMILY, sequence(nn.RNN, nonlinearity="relu")),
    Case("gru", FAMILY, sequence(nn.GRU)),
    Case("gru_deep_bidirectional", FAMILY, sequence(nn.GRU, width=2 * WIDTH, bidirectional=True, **_DEEP)),
    Case("lstm_short", FAMILY, sequence(nn.LSTM)),
    Case("lstm_long", FAMILY, sequence(nn.LSTM, steps=64), rounds=SPLIT),
    Case("lstm_deep_bidirectional", FAMILY, sequence(nn.LSTM, width=2 * WIDTH, bidirectional=True, **_DEEP)),
    Case("lstm_projected", FAMILY, sequence(nn.LSTM, width=8, proj_size=8)),
    Case("lstm_packed", FAMILY, packed(nn.LSTM), refused=_PADDED),
    Case("gru_packed", FAMILY, packed(nn.GRU), refused=_PADDED),
    Case("gru_packed_constant_lengths", FAMILY, known_lengths, refused=_PADDED),
    Case("lstm_cell_unrolled", FAMILY, unrolled(nn.LSTMCell)),
    Case("gru_cell_unrolled", FAMILY, unrolled(nn.GRUCell)),
)
