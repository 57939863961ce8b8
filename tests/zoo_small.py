"""Small models that between them meet every construct of a capture, with inputs; for tests of the torch side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Small:
    """How to build a model, and one call of it."""

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]


class Loss(nn.Sequential):
    """Layers, then a loss that isn't linear in their output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).pow(2).mean()


class Attention(nn.Module):
    """One head's block, by hand: views, a non-contiguous softmax dropout, residuals."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        weights = F.dropout((q @ k.transpose(-1, -2) / 3).softmax(-1), 0.2)
        mixed = (weights @ v).transpose(1, 2).reshape(b, t, c)
        return x + F.dropout(self.out(mixed), 0.2)


class Sparse(nn.Module):
    """Writes into slices, gathers, scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(20, 32), nn.Linear(32, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.linear(self.embed(tokens))
        shifted = torch.zeros_like(y)
        shifted[:, 1:] = y[:, :-1]
        pooled = torch.zeros(20, 32).index_add(0, tokens.flatten(), shifted.flatten(0, 1))
        return pooled.tanh()[tokens].square().mean() + y.gather(2, tokens[..., None]).sum()


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(16, 16, num_layers=2, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0].square().mean()


def images(channels: int = 3) -> Tensor:
    return torch.linspace(-1, 1, 4 * channels * 256).reshape(4, channels, 16, 16).sin()


def rows(count: int = 64, width: int = 32) -> Tensor:
    return torch.linspace(-2, 2, count * width).reshape(count, width).sin()


def mlp() -> nn.Module:
    return Loss(*(part for _ in range(4) for part in (nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.2))))


def convnet() -> nn.Module:
    return Loss(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout2d(0.2),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 3, 1),
    )


SMALL = {
    "mlp": Small(mlp, (rows(),)),
    "convnet": Small(convnet, (images(),)),
    "channels last": Small(
        lambda: convnet().to(memory_format=torch.channels_last),
        (images().to(memory_format=torch.channels_last),),
    ),
    "attention": Small(lambda: Loss(Attention(), Attention()), (rows().reshape(4, 16, 32),)),
    "encoder layer": Small(
        lambda: Loss(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)), (rows().reshape(4, 16, 32),)
    ),
    "sparse": Small(Sparse, (torch.arange(64).reshape(4, 16) % 20,)),
    "lstm": Small(LSTM, (rows(40 * 4, 16).reshape(40, 4, 16),)),
}
