"""ResNet-50 at its real depth: bottlenecks with BatchNorm and in-place ReLU.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition" (CVPR 2016), in the variant
that users train: the stride stands in the 3x3 convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize.zoo.runners import checkpointed, plain
from rematerialize.zoo.spec import Made, Runner, Scale

DEPTHS = (3, 4, 6, 3)
EXPANSION = 4


@dataclass(frozen=True, slots=True)
class ImageConfig:
    width: int
    pixels: int
    batch: int
    classes: int = 100
    depths: tuple[int, ...] = DEPTHS


CONFIGS = {
    "test": ImageConfig(width=16, pixels=64, batch=4),
    "bench": ImageConfig(width=64, pixels=96, batch=16),
}


class Bottleneck(nn.Module):
    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels_out = EXPANSION * width
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        activated: Tensor = self.relu(out)
        return activated


class ResNet50(nn.Module):
    def __init__(self, config: ImageConfig, run: Runner = plain) -> None:
        super().__init__()
        self.run = run
        self.stem = nn.Sequential(
            nn.Conv2d(3, config.width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(config.width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks: list[nn.Module] = []
        channels = config.width
        for stage, depth in enumerate(config.depths):
            width = config.width * 2**stage
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(channels, width, stride))
                channels = EXPANSION * width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, config.classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = self.run(block, x)
        logits = self.head(x.mean(dim=(2, 3)))
        return F.cross_entropy(logits, labels)


def _build(scale: Scale, run: Runner) -> Made:
    config = CONFIGS[scale]
    model = ResNet50(config, run)
    images = torch.randn(config.batch, 3, config.pixels, config.pixels)
    return model, (images, torch.randint(config.classes, (config.batch,)))


def make(scale: Scale = "test") -> Made:
    return _build(scale, plain)


def make_per_block(scale: Scale = "test") -> Made:
    return _build(scale, checkpointed)
