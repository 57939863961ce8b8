"""Attention: torch's modules, masks, grouped heads, flex attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.captures.case import Case, waves
from rematerialize.zoo.spec import Made

FAMILY = "Attention"
WIDTH, HEADS, STEPS, BATCH = 32, 4, 16, 2


class SelfAttention(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=self.weights)


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 2 * WIDTH, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = self.transformer.generate_square_subsequent_mask(target.shape[1])
        return self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


class Projected(nn.Module):
    """Queries, keys and values around an attention that subclasses choose."""

    key_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.query, self.key_value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * self.key_heads * size)
        self.out = nn.Linear(WIDTH, WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.query(x).view(b, t, HEADS, -1).transpose(1, 2)
        k, v = (part.view(b, t, self.key_heads, -1).transpose(1, 2) for part in self.key_value(x).chunk(2, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(b, t, -1))


class Grouped(Projected):
    key_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Flex(Projected):
    """Scores changed by a Python function that captures a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(0.1, 0.4, HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slope = self.slope

        def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slope[h] * (i - j).abs()

        return flex_attention(q, k, v, score_mod=biased)


class FlexMasked(Projected):
    """A block mask made in the forward."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, STEPS, STEPS, device="cpu")
        return flex_attention(q, k, v, block_mask=mask)


def padding() -> Tensor:
    return torch.arange(STEPS)[None] >= torch.tensor([[STEPS], [11]])


def tokens() -> Tensor:
    return waves(BATCH, STEPS, WIDTH)


def translator() -> Made:
    return Translator(), (tokens(), waves(BATCH, 12, WIDTH))


_NO_CPU = "FlexAttention does not support backward on CPU"

CASES = (
    Case("multihead", FAMILY, lambda: (SelfAttention(False), (tokens(), padding()))),
    Case("multihead_weights", FAMILY, lambda: (SelfAttention(True), (tokens(), padding()))),
    Case("transformer", FAMILY, translator),
    Case("transformer_encoder_padded", FAMILY, lambda: (Encoder(), (tokens(), padding()))),
    Case("sdpa_causal", FAMILY, lambda: (Projected(), (tokens(),))),
    Case("sdpa_grouped", FAMILY, lambda: (Grouped(), (tokens(),))),
    Case("flex_attention", FAMILY, lambda: (Flex(), (tokens(),)), refused=_NO_CPU),
    Case("flex_attention_masked", FAMILY, lambda: (FlexMasked(), (tokens(),)), refused=_NO_CPU),
)
