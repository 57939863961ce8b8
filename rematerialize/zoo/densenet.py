"""DenseNet-121 at its real depth: every layer reads all earlier ones of its block.

Huang, Liu, van der Maaten, Weinberger, "Densely connected convolutional networks" (CVPR 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize.zoo.runners import checkpointed, plain
from rematerialize.zoo.spec import Made, Runner, Scale

DEPTHS = (6, 12, 24, 16)
BOTTLENECK = 4


@dataclass(frozen=True, slots=True)
class DenseConfig:
    growth: int
    pixels: int
    batch: int
    classes: int = 100
    depths: tuple[int, ...] = DEPTHS


CONFIGS = {
    "test": DenseConfig(growth=8, pixels=64, batch=4),
    "bench": DenseConfig(growth=32, pixels=64, batch=16),
}


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, *features: Tensor) -> Tensor:
        x = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        grown: Tensor = self.conv2(self.relu(self.norm2(x)))
        return grown


class Transition(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels // 2, 1, bias=False),
            nn.AvgPool2d(2, 2),
        )


class DenseNet121(nn.Module):
    def __init__(self, config: DenseConfig, run: Runner = plain) -> None:
        super().__init__()
        self.run = run
        channels = 2 * config.growth
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 7, 2, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for depth in config.depths:
            self.blocks.append(
                nn.ModuleList(DenseLayer(channels + i * config.growth, config.growth) for i in range(depth))
            )
            channels += depth * config.growth
            if len(self.blocks) < len(config.depths):
                self.transitions.append(Transition(channels))
                channels //= 2
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, config.classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(images)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, nn.ModuleList)
            features = [x]
            for layer in block:
                features.append(self.run(layer, *features))
            x = torch.cat(features, 1)
            if index < len(self.transitions):
                x = self.run(self.transitions[index], x)
        pooled = F.relu(self.norm(x), inplace=True).mean(dim=(2, 3))
        return F.cross_entropy(self.head(pooled), labels)


def _build(scale: Scale, run: Runner) -> Made:
    config = CONFIGS[scale]
    model = DenseNet121(config, run)
    images = torch.randn(config.batch, 3, config.pixels, config.pixels)
    return model, (images, torch.randint(config.classes, (config.batch,)))


def make(scale: Scale = "test") -> Made:
    return _build(scale, plain)


def make_per_block(scale: Scale = "test") -> Made:
    return _build(scale, checkpointed)
