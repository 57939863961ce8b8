"""A U-Net with long skips and dropout: the graph on which chain schedulers have little to say.

Ronneberger, Fischer, Brox, "U-Net: convolutional networks for biomedical image segmentation"
(MICCAI 2015), with GroupNorm, SiLU and nearest-neighbour upsampling as today's variants have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize.zoo.runners import checkpointed, plain
from rematerialize.zoo.spec import Made, Runner, Scale


@dataclass(frozen=True, slots=True)
class UNetConfig:
    width: int
    depth: int
    pixels: int
    batch: int
    dropout: float = 0.1


CONFIGS = {
    "test": UNetConfig(width=8, depth=3, pixels=64, batch=2),
    "bench": UNetConfig(width=24, depth=4, pixels=128, batch=4),
}


class DoubleConv(nn.Sequential):
    def __init__(self, channels_in: int, channels_out: int, dropout: float) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            nn.GroupNorm(4, channels_out),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
            nn.GroupNorm(4, channels_out),
            nn.SiLU(),
        )


class Up(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, dropout: float) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels_in, channels_out, 1)
        self.convs = DoubleConv(2 * channels_out, channels_out, dropout)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(self.reduce(x), scale_factor=2.0, mode="nearest")
        merged: Tensor = self.convs(torch.cat([skip, x], 1))
        return merged


class UNet(nn.Module):
    def __init__(self, config: UNetConfig, run: Runner = plain) -> None:
        super().__init__()
        self.run = run
        widths = [config.width * 2**level for level in range(config.depth + 1)]
        self.down = nn.ModuleList(
            DoubleConv(a, b, config.dropout) for a, b in zip([3, *widths[:-2]], widths[:-1], strict=True)
        )
        self.middle = DoubleConv(widths[-2], widths[-1], config.dropout)
        self.up = nn.ModuleList(Up(a, b, config.dropout) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.head = nn.Conv2d(config.width, 3, 1)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x = images
        skips = []
        for block in self.down:
            skips.append(self.run(block, x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.run(self.middle, x)
        for block in self.up:
            x = self.run(block, x, skips.pop())
        return F.mse_loss(self.head(x), targets)


def _build(scale: Scale, run: Runner) -> Made:
    config = CONFIGS[scale]
    model = UNet(config, run)
    shape = (config.batch, 3, config.pixels, config.pixels)
    return model, (torch.randn(shape), torch.randn(shape))


def make(scale: Scale = "test") -> Made:
    return _build(scale, plain)


def make_per_block(scale: Scale = "test") -> Made:
    return _build(scale, checkpointed)
