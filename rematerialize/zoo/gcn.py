"""A deep graph convolution network in plain torch: gather along edges, index_add into nodes.

Kipf, Welling, "Semi-supervised classification with graph convolutional networks" (ICLR 2017),
with residuals and LayerNorm so that it can be deep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize.zoo.runners import checkpointed, plain
from rematerialize.zoo.spec import Made, Runner, Scale


@dataclass(frozen=True, slots=True)
class GraphConfig:
    nodes: int
    edges: int
    width: int
    layers: int
    classes: int = 16


CONFIGS = {
    "test": GraphConfig(nodes=512, edges=4096, width=32, layers=4),
    "bench": GraphConfig(nodes=4096, edges=16384, width=128, layers=8),
}


class GraphConvolution(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.message = nn.Linear(width, width)
        self.gate = nn.Linear(2 * width, 1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        h = self.message(F.relu(self.norm(x)))
        sent, received = h.index_select(0, source), h.index_select(0, target)
        gate = torch.sigmoid(self.gate(torch.cat([sent, received], dim=1)))
        mixed = torch.zeros_like(h).index_add(0, target, weight * gate * sent)
        x = x + self.dropout(mixed)
        return x


class GCN(nn.Module):
    def __init__(self, config: GraphConfig, run: Runner = plain) -> None:
        super().__init__()
        self.run = run
        self.encoder = nn.Linear(config.width, config.width)
        self.layers = nn.ModuleList(GraphConvolution(config.width) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, x: Tensor, edges: Tensor, labels: Tensor) -> Tensor:
        source, target = edges.unbind(0)
        ones = torch.ones(edges.shape[1], device=x.device)
        degree = torch.ones(x.shape[0], device=x.device).index_add(0, target, ones)
        weight = (degree[source] * degree[target]).rsqrt().unsqueeze(1)
        x = self.encoder(x)
        for layer in self.layers:
            x = self.run(layer, x, source, target, weight)
        return F.cross_entropy(self.head(x), labels)


def _build(scale: Scale, run: Runner) -> Made:
    config = CONFIGS[scale]
    model = GCN(config, run)
    features = torch.randn(config.nodes, config.width)
    edges = torch.randint(config.nodes, (2, config.edges))
    return model, (features, edges, torch.randint(config.classes, (config.nodes,)))


def make(scale: Scale = "test") -> Made:
    return _build(scale, plain)


def make_per_block(scale: Scale = "test") -> Made:
    return _build(scale, checkpointed)
