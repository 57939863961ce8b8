"""Data that chooses its way: embedding bags, mixtures of experts, graph networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.captures.case import Case, waves
from rematerialize.zoo.spec import Made

WIDTH, EXPERTS, TOKENS = 16, 4, 32
NODES, EDGES = 24, 96


class Bags(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(40, WIDTH, **options), nn.Linear(WIDTH, WIDTH)

    def forward(self, words: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.head(self.bags(words, offsets, weights).tanh())


class SparseGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, WIDTH, sparse=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embed(words).tanh())


class Mixture(nn.Module):
    """A router and experts; subclasses dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(EXPERTS)
        )


class DynamicMixture(Mixture):
    """Each expert gets the tokens that chose it: how many is known only at run time."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == number)
            mixed = mixed.index_add(0, token, weights[token, rank, None] * expert(x[token]))
        return x + mixed


class DenseMixture(Mixture):
    """Every expert sees every token, weighted by a gate that is zero for most."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        gates = torch.zeros(len(x), EXPERTS).scatter(1, chosen, weights)
        return x + sum(gates[:, n, None] * expert(x) for n, expert in enumerate(self.experts))


class CapacityMixture(Mixture):
    """Each expert takes a fixed number of tokens, those with the highest gates (expert choice)."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(TOKENS // EXPERTS, 0)
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token = chosen[:, number]
            mixed = mixed.index_add(0, token, weights[:, number, None] * expert(x[token]))
        return x + mixed


class ScatterGraph(nn.Module):
    """Messages along edges by index ops: sums, the highest of each node's, a softmax over its edges."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.score = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.update = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        message = self.message(torch.cat([x[source], x[target]], 1)).relu()
        score = F.leaky_relu(self.score(message))
        index = target[:, None]
        top = torch.full((NODES, 1), -torch.inf).scatter_reduce(0, index, score, "amax")
        weight = (score - top[target]).exp()
        attended = torch.zeros(NODES, WIDTH).index_add(0, target, weight * message)
        highest = x.new_zeros(NODES, WIDTH).scatter_reduce(0, index.expand(-1, WIDTH), message, "amax")
        return self.update(torch.cat([x, attended, highest], 1))


def bags(mode: str) -> Any:
    return lambda: (Bags(mode=mode), (torch.arange(60) * 7 % 40, torch.arange(0, 60, 10)))


def weighted_bags() -> Made:
    return Bags(mode="sum", padding_idx=0), (torch.arange(60).reshape(6, 10) * 7 % 40, None, waves(6, 10).abs())


def sparse_bags() -> Made:
    return Bags(mode="sum", sparse=True), (torch.arange(60) * 7 % 40, torch.arange(0, 60, 10))


def graph() -> tuple[Tensor, Tensor]:
    step = torch.arange(EDGES)
    return waves(NODES, WIDTH), torch.stack([step % NODES, (step * 5 + step // NODES) % NODES])


def geometric(name: str, **options: Any) -> Any:
    def make() -> Made:
        from torch_geometric import nn as geometric_nn

        return getattr(geometric_nn, name)(WIDTH, WIDTH, **{"num_layers": 3} | options), graph()

    return make


_BAGS, _EXPERTS, _GRAPHS = "Embedding bags", "Mixtures of experts", "Graph networks"

CASES = (
    Case("embedding_bag_sum", _BAGS, bags("sum")),
    Case("embedding_bag_mean", _BAGS, bags("mean")),
    Case("embedding_bag_max", _BAGS, bags("max")),
    Case("embedding_bag_weighted", _BAGS, weighted_bags),
    Case("embedding_bag_sparse_gradient", _BAGS, sparse_bags, refused="the gradient of 'bags.weight' is sparse"),
    Case(
        "embedding_sparse_gradient",
        _BAGS,
        lambda: (SparseGradient(), (torch.arange(60) * 7 % 40,)),
        refused="the gradient of 'embed.weight' is sparse",
    ),
    Case(
        "experts_dynamic",
        _EXPERTS,
        lambda: (DynamicMixture(), (waves(TOKENS, WIDTH),)),
        refused="take a fixed number by topk",
    ),
    Case("experts_dense", _EXPERTS, lambda: (DenseMixture(), (waves(TOKENS, WIDTH),))),
    Case("experts_capacity", _EXPERTS, lambda: (CapacityMixture(), (waves(TOKENS, WIDTH),))),
    Case("graph_scatter", _GRAPHS, lambda: (ScatterGraph(), graph())),
    Case("gin", _GRAPHS, geometric("GIN", dropout=0.2), needs="torch_geometric"),
    Case("gin_batch_norm", _GRAPHS, geometric("GIN", norm="batch_norm"), needs="torch_geometric"),
    Case("graph_sage", _GRAPHS, geometric("GraphSAGE", aggr="max"), needs="torch_geometric"),
    Case("edge_cnn", _GRAPHS, geometric("EdgeCNN"), needs="torch_geometric"),
    Case("gcn_geometric", _GRAPHS, geometric("GCN"), refused="add_self_loops=False", needs="torch_geometric"),
    Case("gat_self_loops", _GRAPHS, geometric("GAT", heads=2), refused="add_self_loops=False", needs="torch_geometric"),
    Case("gat_jumping", _GRAPHS, geometric("GAT", heads=2, jk="cat", add_self_loops=False), needs="torch_geometric"),
)
