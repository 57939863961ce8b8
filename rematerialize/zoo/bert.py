"""A BERT-like encoder with dropout: masked tokens, padded rows, torch's own encoder layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize.zoo.runners import checkpointed, plain
from rematerialize.zoo.spec import Made, Runner, Scale


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    layers: int
    width: int
    heads: int
    tokens: int
    batch: int
    vocabulary: int


CONFIGS = {
    "test": EncoderConfig(layers=4, width=64, heads=4, tokens=64, batch=8, vocabulary=256),
    "bench": EncoderConfig(layers=8, width=256, heads=8, tokens=128, batch=8, vocabulary=1024),
}


class MaskedLanguageModel(nn.Module):
    """Post-norm encoder with dropout 0.1 everywhere; the loss counts masked places only."""

    def __init__(self, config: EncoderConfig, run: Runner = plain) -> None:
        super().__init__()
        self.run = run
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.tokens, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width, config.heads, 4 * config.width, 0.1, activation="gelu", batch_first=True
            )
            for _ in range(config.layers)
        )
        self.transform = nn.Sequential(nn.Linear(config.width, config.width), nn.GELU(), nn.LayerNorm(config.width))
        self.decoder = nn.Linear(config.width, config.vocabulary)

    def forward(self, tokens: Tensor, padding: Tensor, labels: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.norm(self.tokens(tokens) + self.positions(places)))
        for layer in self.layers:
            x = self.run(layer, x, None, padding)
        logits = self.decoder(self.transform(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def _build(scale: Scale, run: Runner) -> Made:
    config = CONFIGS[scale]
    model = MaskedLanguageModel(config, run)
    shape = (config.batch, config.tokens)
    tokens = torch.randint(config.vocabulary, shape)
    lengths = torch.randint(config.tokens // 2, config.tokens + 1, (config.batch, 1))
    padding = torch.arange(config.tokens) >= lengths
    labels = torch.where((torch.rand(shape) < 0.15) & ~padding, tokens, torch.full(shape, -100))
    return model, {"tokens": tokens, "padding": padding, "labels": labels}


def make(scale: Scale = "test") -> Made:
    return _build(scale, plain)


def make_per_block(scale: Scale = "test") -> Made:
    return _build(scale, checkpointed)
