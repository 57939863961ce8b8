"""An LSTM surrogate of a dynamical system: MLP encoder, two nn.LSTM layers over 200 steps, head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize.zoo.runners import checkpointed, plain
from rematerialize.zoo.spec import Made, Runner, Scale


@dataclass(frozen=True, slots=True)
class SurrogateConfig:
    features: int
    hidden: int
    batch: int
    steps: int = 200
    chunk: int = 20  # steps per block: near sqrt(200), where per-chunk checkpointing is at its best


CONFIGS = {
    "test": SurrogateConfig(features=8, hidden=32, batch=8),
    "bench": SurrogateConfig(features=16, hidden=192, batch=48),
}


class Surrogate(nn.Module):
    """Predicts the next state of a driven system from its forcing, over the whole horizon."""

    def __init__(self, config: SurrogateConfig, run: Runner = plain) -> None:
        super().__init__()
        self.run = run
        self.chunk = config.chunk
        self.encoder = nn.Sequential(
            nn.Linear(config.features, config.hidden),
            nn.Tanh(),
            nn.Linear(config.hidden, config.hidden),
            nn.Tanh(),
        )
        self.lstm = nn.LSTM(config.hidden, config.hidden, num_layers=2)
        self.head = nn.Sequential(
            nn.Linear(config.hidden, config.hidden), nn.SiLU(), nn.Linear(config.hidden, config.features)
        )

    def span(self, forcing: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, step and decode a span of time, from the state (h, c)."""
        hidden, (h, c) = self.lstm(self.encoder(forcing), (h, c))
        return self.head(hidden), h, c

    def forward(self, forcing: Tensor, states: Tensor) -> Tensor:
        batch = forcing.shape[1]
        h = forcing.new_zeros(2, batch, self.lstm.hidden_size)
        c = torch.zeros_like(h)
        if self.run is plain:
            predicted, h, c = self.span(forcing, h, c)
        else:
            spans = []
            for chunk in torch.split(forcing, self.chunk):
                prediction, h, c = self.run(self.span, chunk, h, c)
                spans.append(prediction)
            predicted = torch.cat(spans)
        return F.mse_loss(predicted, states)


def _build(scale: Scale, run: Runner) -> Made:
    config = CONFIGS[scale]
    model = Surrogate(config, run)
    shape = (config.steps, config.batch, config.features)
    return model, (torch.randn(shape), torch.randn(shape))


def make(scale: Scale = "test") -> Made:
    return _build(scale, plain)


def make_per_block(scale: Scale = "test") -> Made:
    return _build(scale, checkpointed)
