"""A physics-informed network for the 2-D Navier-Stokes equations.

Raissi, Perdikaris, Karniadakis, "Physics-informed neural networks" (J. Comput. Phys. 378, 2019):
the residuals need second derivatives of the network in its inputs, so the step that trains it
differentiates through two nested reverse passes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rematerialize.zoo.runners import checkpointed, plain
from rematerialize.zoo.spec import Made, Runner, Scale


@dataclass(frozen=True, slots=True)
class FlowConfig:
    width: int
    depth: int
    points: int
    viscosity: float = 0.01


CONFIGS = {
    "test": FlowConfig(width=32, depth=4, points=512),
    "bench": FlowConfig(width=128, depth=6, points=4096),
}


def gradient(values: Tensor, at: Tensor) -> Tensor:
    """Return d(values)/d(at) per point, shape of `at`, itself differentiable."""
    return torch.autograd.grad(values.sum(), at, create_graph=True)[0]


class NavierStokes(nn.Module):
    """(x, y, t) -> (u, v, p); the forward is the loss: residuals at the points plus data."""

    def __init__(self, config: FlowConfig, run: Runner = plain) -> None:
        super().__init__()
        self.run = run
        self.viscosity = config.viscosity
        sizes = [3, *[config.width] * config.depth]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(config.width, 3)

    def flow(self, coordinates: Tensor) -> Tensor:
        x = coordinates
        for layer in self.layers:
            x = self.run(layer, x)
        fields: Tensor = self.head(x)
        return fields

    def forward(self, points: Tensor, velocity: Tensor) -> Tensor:
        at = points.detach().clone().requires_grad_(True)
        fields = self.flow(at)
        u, v, p = fields.unbind(1)
        du, dv, dp = gradient(u, at), gradient(v, at), gradient(p, at)
        u_x, u_y, u_t = du.unbind(1)
        v_x, v_y, v_t = dv.unbind(1)
        u_xx, u_yy = gradient(u_x, at)[:, 0], gradient(u_y, at)[:, 1]
        v_xx, v_yy = gradient(v_x, at)[:, 0], gradient(v_y, at)[:, 1]
        momentum_x = u_t + u * u_x + v * u_y + dp[:, 0] - self.viscosity * (u_xx + u_yy)
        momentum_y = v_t + u * v_x + v * v_y + dp[:, 1] - self.viscosity * (v_xx + v_yy)
        continuity = u_x + v_y
        residual = momentum_x.square() + momentum_y.square() + continuity.square()
        return residual.mean() + (fields[:, :2] - velocity).square().mean()


def _build(scale: Scale, run: Runner) -> Made:
    config = CONFIGS[scale]
    model = NavierStokes(config, run)
    points = torch.rand(config.points, 3)
    x, y, t = (2 * torch.pi * points).unbind(1)
    decay = torch.exp(-2 * config.viscosity * t)
    taylor_green = torch.stack([x.cos() * y.sin() * decay, -x.sin() * y.cos() * decay], dim=1)
    return model, (points, taylor_green)


def make(scale: Scale = "test") -> Made:
    return _build(scale, plain)


def make_per_block(scale: Scale = "test") -> Made:
    return _build(scale, checkpointed)
