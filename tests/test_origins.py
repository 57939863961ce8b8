"""Reports speak the user's language: modules, source lines and shapes, in the backward too."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import rematerialize as remat
from rematerialize.ir import TrainingGraph

HERE = Path(__file__).name


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def graph() -> TrainingGraph:
    return remat.plan(Net(), (torch.randn(4, 8),), activation_budget="100%").graph


def test_ops_know_the_innermost_module_and_the_line_in_both_phases() -> None:
    found = graph()
    by_target = {(op.phase, op.module, op.target.split(" ")[0]): op for op in found.ops}
    forward = by_target["forward", "blocks.0.linear", "aten.addmm.default"]
    assert forward.source.startswith(f"{HERE}:")
    weight_gradients = [op for op in found.ops if op.phase == "backward" and "aten.mm.default" in op.target]
    assert {op.module for op in weight_gradients} == {"blocks.0.linear", "blocks.1.linear"}
    assert {op.source for op in weight_gradients} == {forward.source}
    assert by_target["forward", "", "aten.mean.default"].source != forward.source


def test_a_convolutions_backward_is_its_own_and_not_the_norms_behind_it() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    found = remat.plan(net, (torch.randn(2, 1, 8, 8),), activation_budget="100%").graph
    backward = [op for op in found.ops if op.phase == "backward"]
    assert [op.module for op in backward if "convolution_backward" in op.target] == ["3", "3", "0"]
    assert [op.module for op in backward if "batch_norm_backward" in op.target] == ["4", "1"]


def test_storages_are_labelled_with_names_and_shapes() -> None:
    labels = graph().labels
    assert "blocks.0.linear.weight float32[8, 8]" in labels.values()
    assert "gradient of blocks.1.linear.bias float32[8]" in labels.values()
    assert "input 0 float32[4, 8]" in labels.values()
    assert "float32[4, 8]" in labels.values()


def test_labels_and_modules_survive_the_file_and_change_no_hash() -> None:
    found = graph()
    again = TrainingGraph.from_json(found.to_json())
    assert again == found
    bare = TrainingGraph.from_json({**found.to_dict(), "labels": {}})
    assert bare.content_hash() == found.content_hash()
