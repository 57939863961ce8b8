"""Three towers (image, text, sound) of different lengths that join: a tree, not a chain.

The shape of Beaumont, Herrmann, Pallez, Shilova, "Optimal memory-aware backpropagation of deep
join networks" (Phil. Trans. R. Soc. A 378, 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize.zoo.runners import checkpointed, plain
from rematerialize.zoo.spec import Made, Runner, Scale


@dataclass(frozen=True, slots=True)
class TowersConfig:
    width: int
    batch: int
    pixels: int
    tokens: int
    samples: int
    image_blocks: int
    text_blocks: int
    sound_blocks: int
    vocabulary: int = 256


CONFIGS = {
    "test": TowersConfig(32, 4, 16, 32, 256, image_blocks=4, text_blocks=2, sound_blocks=6),
    "bench": TowersConfig(96, 8, 32, 128, 1024, image_blocks=8, text_blocks=6, sound_blocks=12),
}


class ImageBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.body(x)
        return x


class SoundBlock(nn.Module):
    """A gated, dilated convolution as in WaveNet."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, 2 * width, 3, padding=dilation, dilation=dilation)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        signal, gate = self.conv(x).chunk(2, dim=1)
        x = x + self.mix(torch.tanh(signal) * torch.sigmoid(gate))
        return x


class CrossModal(nn.Module):
    def __init__(self, config: TowersConfig, run: Runner = plain) -> None:
        super().__init__()
        self.run = run
        width = config.width
        self.image_stem = nn.Conv2d(3, width, 3, padding=1)
        self.image = nn.ModuleList(ImageBlock(width) for _ in range(config.image_blocks))
        self.text_stem = nn.Embedding(config.vocabulary, width)
        self.text = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, batch_first=True, norm_first=True)
            for _ in range(config.text_blocks)
        )
        self.sound_stem = nn.Conv1d(1, width, 3, padding=1)
        self.sound = nn.ModuleList(SoundBlock(width, 2 ** (i % 4)) for i in range(config.sound_blocks))
        self.join = nn.Sequential(nn.Linear(3 * width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, 1))

    def forward(self, images: Tensor, text: Tensor, sound: Tensor, match: Tensor) -> Tensor:
        image, words, wave = self.image_stem(images), self.text_stem(text), self.sound_stem(sound)
        for block in self.image:
            image = self.run(block, image)
        for block in self.text:
            words = self.run(block, words)
        for block in self.sound:
            wave = self.run(block, wave)
        pooled = torch.cat([image.mean(dim=(2, 3)), words.mean(dim=1), wave.mean(dim=2)], dim=1)
        return F.binary_cross_entropy_with_logits(self.join(pooled).squeeze(1), match)


def _build(scale: Scale, run: Runner) -> Made:
    config = CONFIGS[scale]
    model = CrossModal(config, run)
    batch = config.batch
    inputs = {
        "images": torch.randn(batch, 3, config.pixels, config.pixels),
        "text": torch.randint(config.vocabulary, (batch, config.tokens)),
        "sound": torch.randn(batch, 1, config.samples),
        "match": torch.randint(2, (batch,)).float(),
    }
    return model, inputs


def make(scale: Scale = "test") -> Made:
    return _build(scale, plain)


def make_per_block(scale: Scale = "test") -> Made:
    return _build(scale, checkpointed)
