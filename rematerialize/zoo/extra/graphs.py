"""A graph attention network of torch_geometric."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematerialize.zoo.spec import Made, Scale

NODES = {"test": 256, "bench": 2048}
DEGREE = 8
FEATURES = 32
CLASSES = 8


class NodeClassifier(nn.Module):
    """A network over nodes with the loss inside."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, edges: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(x, edges)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def gat(scale: Scale = "test") -> Made:
    from torch_geometric.nn import GAT

    network = GAT(FEATURES, 64, num_layers=4, out_channels=CLASSES, heads=4, dropout=0.1)
    nodes = NODES[scale]
    # Self-loops stand in the data: adding them inside takes a count that is known only at run time.
    loops = torch.arange(nodes).expand(2, nodes)
    for module in network.modules():
        if hasattr(module, "add_self_loops"):
            module.add_self_loops = False
    edges = torch.cat([torch.randint(nodes, (2, DEGREE * nodes)), loops], dim=1)
    inputs = (torch.randn(nodes, FEATURES), edges, torch.randint(CLASSES, (nodes,)))
    return NodeClassifier(network).train(), inputs
