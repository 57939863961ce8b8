"""An actor-critic with a shared residual trunk and two heads; the loss is computed outside.

The trunk is IMPALA's (Espeholt et al., ICML 2018).
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
class AgentConfig:
    pixels: int
    batch: int
    widths: tuple[int, ...]
    features: int = 256
    actions: int = 18


CONFIGS = {
    "test": AgentConfig(pixels=32, batch=32, widths=(8, 16, 16)),
    "bench": AgentConfig(pixels=64, batch=96, widths=(16, 32, 32)),
}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv2(F.relu(self.conv1(F.relu(x))))
        return x


class Stage(nn.Sequential):
    def __init__(self, channels_in: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, width, 3, padding=1),
            nn.MaxPool2d(3, 2, 1),
            Residual(width),
            Residual(width),
        )


class ActorCritic(nn.Module):
    def __init__(self, config: AgentConfig, run: Runner = plain) -> None:
        super().__init__()
        self.run = run
        widths = [4, *config.widths]
        self.stages = nn.ModuleList(Stage(a, b) for a, b in itertools.pairwise(widths))
        side = config.pixels // 2 ** len(config.widths)
        self.features = nn.Linear(widths[-1] * side * side, config.features)
        self.actor = nn.Linear(config.features, config.actions)
        self.critic = nn.Linear(config.features, 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        x = frames
        for stage in self.stages:
            x = self.run(stage, x)
        features = F.relu(self.features(F.relu(x).flatten(1)))
        return self.actor(features), self.critic(features).squeeze(1)


def loss_from_heads(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """Return the advantage actor-critic loss for fixed actions and returns."""
    logits, values = outputs
    steps = torch.arange(values.shape[0], device=values.device)
    returns = torch.cos(0.1 * steps)
    log_policy = F.log_softmax(logits, dim=1)
    taken = log_policy.gather(1, (steps * 7 % logits.shape[1]).unsqueeze(1)).squeeze(1)
    advantages = (returns - values).detach()
    entropy = -(log_policy.exp() * log_policy).sum(1).mean()
    return -(advantages * taken).mean() + 0.5 * F.mse_loss(values, returns) - 0.01 * entropy


def _build(scale: Scale, run: Runner) -> Made:
    config = CONFIGS[scale]
    model = ActorCritic(config, run)
    return model, (torch.rand(config.batch, 4, config.pixels, config.pixels),)


def make(scale: Scale = "test") -> Made:
    return _build(scale, plain)


def make_per_block(scale: Scale = "test") -> Made:
    return _build(scale, checkpointed)
