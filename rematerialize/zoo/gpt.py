"""A GPT decoder with dropout: 12 layers with the loss inside, a small one with it outside, and a huge one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize.zoo.runners import checkpointed, plain
from rematerialize.zoo.spec import Made, Runner, Scale


@dataclass(frozen=True, slots=True)
class GPTConfig:
    layers: int
    width: int
    heads: int
    tokens: int
    batch: int
    vocabulary: int
    dropout: float = 0.1


CONFIGS = {
    "test": GPTConfig(layers=12, width=64, heads=4, tokens=64, batch=4, vocabulary=256),
    "bench": GPTConfig(layers=12, width=256, heads=8, tokens=256, batch=2, vocabulary=1024),
}
SMALL_CONFIGS = {
    "test": GPTConfig(layers=2, width=64, heads=4, tokens=64, batch=8, vocabulary=512),
    "bench": GPTConfig(layers=4, width=256, heads=8, tokens=256, batch=4, vocabulary=2048),
}

# Shoeybi et al., "Megatron-LM: training multi-billion parameter language models using model parallelism" (2019), table
# 1, but for its dropout, which attention kernels of a CPU don't fuse.
MEGATRON = GPTConfig(layers=72, width=3072, heads=24, tokens=1024, batch=8, vocabulary=51200, dropout=0.0)


class Block(nn.Module):
    """Pre-norm attention and MLP, each behind a residual with dropout."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.dropout
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.projection = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
            nn.Dropout(config.dropout),
        )
        self.dropout = nn.Dropout(config.dropout)

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        joined: Tensor = self.dropout(self.projection(mixed.transpose(1, 2).reshape(x.shape)))
        return joined

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class GPT(nn.Module):
    """Decoder-only language model with tied embeddings; returns the loss when given targets."""

    def __init__(self, config: GPTConfig, run: Runner = plain) -> None:
        super().__init__()
        self.run = run
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.tokens, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = self.run(block, x)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _build(config: GPTConfig, run: Runner, *, loss_inside: bool) -> Made:
    model = GPT(config, run)
    text = torch.randint(config.vocabulary, (config.batch, config.tokens + 1))
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    return model, (tokens, targets) if loss_inside else (tokens,)


def make(scale: Scale = "test") -> Made:
    return _build(CONFIGS[scale], plain, loss_inside=True)


def make_per_block(scale: Scale = "test") -> Made:
    return _build(CONFIGS[scale], checkpointed, loss_inside=True)


def make_megatron(scale: Scale = "test") -> Made:
    """Return 8.3 billion parameters, whatever the scale; call it under `analytic.on_fake_tensors`."""
    return _build(MEGATRON, plain, loss_inside=True)


def make_small(scale: Scale = "test") -> Made:
    return _build(SMALL_CONFIGS[scale], plain, loss_inside=False)


def make_small_per_block(scale: Scale = "test") -> Made:
    return _build(SMALL_CONFIGS[scale], checkpointed, loss_inside=False)


def loss_from_logits(logits: Tensor) -> Tensor:
    """Return the cross entropy against a fixed text, computed outside of the model."""
    scores = logits.flatten(0, 1)
    targets = torch.arange(scores.shape[0], device=scores.device) * 31 % scores.shape[1]
    return F.cross_entropy(scores, targets)
