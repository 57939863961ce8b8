"""A convolutional autoencoder of flow fields that predicts a stream function.

The velocity is the curl of the prediction, so it is free of divergence by construction; the loss
compares velocity and vorticity with the data.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize.zoo.runners import checkpointed, plain
from rematerialize.zoo.spec import Made, Runner, Scale


@dataclass(frozen=True, slots=True)
class FieldConfig:
    width: int
    levels: int
    pixels: int
    batch: int


CONFIGS = {
    "test": FieldConfig(width=8, levels=3, pixels=64, batch=4),
    "bench": FieldConfig(width=16, levels=4, pixels=128, batch=8),
}


def d_dx(field: Tensor) -> Tensor:
    """Central difference along the last axis of a periodic field, unit spacing."""
    return (torch.roll(field, -1, dims=-1) - torch.roll(field, 1, dims=-1)) / 2


def d_dy(field: Tensor) -> Tensor:
    """Central difference along the axis before the last, periodic, unit spacing."""
    return (torch.roll(field, -1, dims=-2) - torch.roll(field, 1, dims=-2)) / 2


class Stage(nn.Module):
    """Change the resolution, then a residual convolution."""

    def __init__(self, change: nn.Module, width: int) -> None:
        super().__init__()
        self.change = change
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, padding_mode="circular")
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.change(x))
        return F.elu(x + self.conv2(F.elu(self.conv1(x))))


class StreamAutoencoder(nn.Module):
    def __init__(self, config: FieldConfig, run: Runner = plain) -> None:
        super().__init__()
        self.run = run
        widths = [config.width * 2**level for level in range(config.levels + 1)]
        self.stem = nn.Conv2d(2, widths[0], 3, padding=1)
        down = [Stage(nn.Conv2d(a, b, 4, 2, 1), b) for a, b in itertools.pairwise(widths)]
        up = [Stage(nn.ConvTranspose2d(b, a, 4, 2, 1), a) for a, b in itertools.pairwise(widths)]
        self.stages = nn.ModuleList([*down, *reversed(up)])
        self.head = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, velocity: Tensor) -> Tensor:
        x = F.elu(self.stem(velocity))
        for stage in self.stages:
            x = self.run(stage, x)
        stream = self.head(x).squeeze(1)
        u, v = d_dy(stream), -d_dx(stream)
        data = F.mse_loss(u, velocity[:, 0]) + F.mse_loss(v, velocity[:, 1])
        vorticity = d_dx(v) - d_dy(u)
        expected = d_dx(velocity[:, 1]) - d_dy(velocity[:, 0])
        return data + 0.1 * F.mse_loss(vorticity, expected)


def _build(scale: Scale, run: Runner) -> Made:
    config = CONFIGS[scale]
    model = StreamAutoencoder(config, run)
    coarse = torch.randn(config.batch, 1, config.pixels // 8, config.pixels // 8)
    stream = F.interpolate(coarse, scale_factor=8.0, mode="bicubic").squeeze(1)
    return model, (torch.stack([d_dy(stream), -d_dx(stream)], dim=1),)


def make(scale: Scale = "test") -> Made:
    return _build(scale, plain)


def make_per_block(scale: Scale = "test") -> Made:
    return _build(scale, checkpointed)
