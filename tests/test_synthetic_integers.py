"""Integers of synthetic data make kernels work as a step's do: rows are spread, groups are of one size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rematerialize.cost import call_flops
from rematerialize.prepare import prepare_example
from rematerialize.synthetic import prepare_kernel
from rematerialize.synthetic_integers import decide_work

aten = torch.ops.aten


def call(target: Any, *args: Any) -> tuple[fx.Node, dict[fx.Node, Tensor]]:
    """A call in a graph whose tensors are the given ones, and its data by source."""
    graph, data = fx.Graph(), {}

    def source(given: Any) -> Any:
        if isinstance(given, list):
            return [source(item) for item in given]
        if not isinstance(given, Tensor):
            return given
        node = graph.placeholder(f"source_{len(data)}")
        node.meta["val"], data[node] = given, given
        return node

    return graph.call_function(target, tuple(source(arg) for arg in args)), data


def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


ROWS = torch.rand(50, 3)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.embedding.default, (ROWS, zeros(400))),
        (aten.embedding_dense_backward.default, (torch.rand(400, 3), zeros(400), 50, -1, False)),
        (aten.index_select.default, (ROWS, 0, zeros(400))),
        (aten.index_select.default, (ROWS.t(), -1, zeros(400, dtype=torch.int32))),
        (aten.gather.default, (ROWS, 0, zeros(400, 1).expand(400, 3))),
        (aten.index_add.default, (ROWS, 0, zeros(400), torch.rand(400, 3))),
        (aten.scatter_add.default, (ROWS, 0, zeros(400, 3), torch.rand(400, 3))),
        (aten.index.Tensor, (ROWS, [zeros(400)])),
        (aten.index.Tensor, (ROWS.t(), [None, zeros(20, 20)])),
        (aten.index_put.default, (ROWS, [zeros(400)], torch.rand(400, 3), True)),
    ],
)
def test_indices_reach_every_row_and_no_other(target: Any, args: tuple[Any, ...]) -> None:
    node, data = call(target, *args)
    decide_work(node, data)
    (indices,) = [value for value in data.values() if not value.is_floating_point()]
    assert sorted(set(indices.flatten().tolist())) == list(range(50))
    target(*args)  # eager raises where an index is outside


def test_what_a_mask_selects_stays_selected() -> None:
    mask = torch.ones(50, dtype=torch.bool)
    rows = zeros(50)
    node, data = call(aten.index.Tensor, torch.rand(50, 50), [mask, rows])
    decide_work(node, data)
    assert mask.all()
    assert not rows.any()


def test_indices_of_nothing_stay() -> None:
    node, data = call(aten.embedding.default, torch.rand(0, 3), zeros(0))
    decide_work(node, data)


@pytest.mark.parametrize(
    ("left", "right", "ends"),
    [
        ((40, 8), (4, 8, 6), [10, 20, 30, 40]),  # rows in groups: a forward, and the gradients of its rows
        ((8, 40), (40, 6), [10, 20, 30, 40]),  # sums in groups: the gradients of its weights
        ((4, 8, 5), (5, 41), [10, 20, 30, 41]),  # columns in groups
    ],
)
def test_groups_are_of_one_size_and_as_much_work_as_without(
    left: tuple[int, ...], right: tuple[int, ...], ends: list[int]
) -> None:
    offsets = zeros(4, dtype=torch.int32)
    node, data = call(aten._grouped_mm.default, torch.rand(left), torch.rand(right), offsets)
    decide_work(node, data)
    assert offsets.tolist() == ends
    assert call_flops(node) == 2 * {40: 40 * 8 * 6, 41: 8 * 5 * 41}[ends[-1]]


class Experts(nn.Module):
    """A layer of a mixture of experts: rows in groups, each with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(8, 256, 256) / 16)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        grouped: Tensor = torch._grouped_mm(rows, self.weights, offs=ends)
        return grouped.square().mean()


def test_kernels_are_measured_with_such_groups() -> None:
    rows = torch.randn(2048, 256, requires_grad=True)
    ends = torch.arange(1, 9, dtype=torch.int32) * 256
    kernels = prepare_example(Experts(), (rows, ends)).kernels.kernels
    product = next(one for one in kernels if one.calls and one.head.target is aten._grouped_mm.default)
    made = prepare_kernel(product)()
    assert made.min() >= 256 / 16, "rows of no group are left as memory was: data are at least a quarter"
