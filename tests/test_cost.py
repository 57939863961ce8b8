"""The roofline: positive, monotone, exact where arithmetic is known; and what is captured on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rematerialize.analytic import analytic_graph, on_fake_tensors
from rematerialize.capture import KernelGraph, capture, flatten_inputs, group_kernels, normalize
from rematerialize.cost import AnalyticCostModel, call_bytes, call_flops, call_seconds
from rematerialize.device_table import DEVICES, DeviceSpec, device_spec
from rematerialize.errors import RematerializeError
from rematerialize.ir import TrainingGraph
from rematerialize.zoo import gpt
from rematerialize.zoo.spec import Made
from tests.zoo_small import SMALL, Loss

CPU = device_spec("2-core CPU")
aten = torch.ops.aten


def kernels_of(model: nn.Module, *inputs: Any) -> KernelGraph:
    return group_kernels(normalize(capture(model, model.forward, flatten_inputs(inputs, {})).joint))


def calls(graph: KernelGraph, target: Any) -> list[fx.Node]:
    return [node for kernel in graph.kernels for node, _ in kernel.calls if node.target is target]


def call(target: Any, *tensors: Tensor, result: Any = None) -> fx.Node:
    """One call of an op on tensors, as a trace would hold it."""
    graph = fx.Graph()
    sources = []
    for index, tensor in enumerate(tensors):
        source = graph.placeholder(f"x{index}")
        source.meta["val"] = tensor
        sources.append(source)
    node = graph.call_function(target, tuple(sources))
    node.meta["val"] = target(*tensors) if result is None else result
    return node


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_kernel_of_every_small_model_has_a_positive_cost(name: str) -> None:
    small = SMALL[name]
    graph = kernels_of(small.make(), *small.inputs)
    for device in DEVICES.values():
        costs = AnalyticCostModel(device)(graph.kernels)
        assert set(costs) == {kernel.name for kernel in graph.kernels if kernel.calls}
        assert all(cost.time_s >= device.launch_s and cost.transient_bytes >= 0 for cost in costs.values())


def test_a_linear_layer_takes_two_flops_per_weight_and_row_in_each_of_its_three_products() -> None:
    rows, wide, narrow = 64, 32, 48
    graph = kernels_of(Loss(nn.Linear(wide, wide), nn.Linear(wide, narrow)), torch.randn(rows, wide))
    forward = [call_flops(node) for node in calls(graph, aten.addmm.default)]
    backward = sorted(call_flops(node) for node in calls(graph, aten.mm.default))
    first, second = 2 * rows * wide * wide, 2 * rows * wide * narrow
    assert forward == [first, second]
    assert backward == sorted([first, second, second])  # the input needs no gradient


def test_the_halves_of_a_convolutions_backward_each_take_the_forwards_flops() -> None:
    model = Loss(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 3, padding=1, bias=False))
    graph = kernels_of(model, torch.randn(2, 3, 16, 16))
    first, second = 2 * 2 * 256 * 9 * 3 * 8, 2 * 2 * 256 * 9 * 8 * 4
    assert [call_flops(node) for node in calls(graph, aten.convolution.default)] == [first, second]
    assert sorted(call_flops(node) for node in calls(graph, aten.convolution_backward.default)) == sorted(
        [first, second, second]
    )


def test_an_lstm_layer_takes_the_flops_of_its_two_products_per_step() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(16, 24)

        def forward(self, x: Tensor) -> Tensor:
            loss: Tensor = self.rnn(x)[0].square().mean()
            return loss

    graph = kernels_of(Recurrent(), torch.randn(10, 4, 16))
    heads = [k.head for k in graph.kernels if k.calls]
    forward = 2 * 10 * 4 * 4 * 24 * (16 + 24)
    assert [call_flops(node) for node in heads if call_flops(node)] == [forward, 2 * forward]


def test_an_unknown_op_costs_its_bytes() -> None:
    def invented(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    node = call(invented, meta(1000, 1000))
    assert call_flops(node) == 0
    assert call_bytes(node) == 2 * 4_000_000
    assert call_seconds(CPU, node) == pytest.approx(CPU.launch_s + 8_000_000 / CPU.bandwidth)


def test_bytes_count_what_is_touched() -> None:
    assert call_bytes(call(aten.add.Tensor, meta(100, 100), meta(100).expand(100, 100))) == 4 * (10_000 + 100 + 10_000)
    table, rows = meta(50_000, 64), meta(10, dtype=torch.int64)
    assert call_bytes(call(aten.embedding.default, table, rows)) == 2 * 10 * 64 * 4 + 10 * 8
    assert call_bytes(call(lambda x: x, meta(0, 5))) == 0
    assert call_bytes(call(aten.empty_like.default, meta(100))) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda n: call(aten.mm.default, meta(n, 64), meta(64, n)),
        lambda n: call(aten.tanh.default, meta(n, n)),
        lambda n: call(aten.bmm.default, meta(4, n, 32), meta(4, 32, n)),
        lambda n: call(aten.native_layer_norm.default, meta(n, 8), result=(meta(n, 8), meta(n, 1), meta(n, 1))),
    ],
    ids=["mm", "tanh", "bmm", "layer norm"],
)
@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_more_work_never_takes_less_time(make: Callable[[int], fx.Node], device: DeviceSpec) -> None:
    times = [call_seconds(device, make(size)) for size in (0, 1, 8, 64, 512, 4096, 32768)]
    assert times == sorted(times)
    assert times[-1] > times[1]


def test_half_precision_products_run_at_the_half_rate() -> None:
    device = device_spec("NVIDIA A100 80GB")
    single, half = (
        call_seconds(device, call(aten.mm.default, meta(8192, 8192, dtype=d), meta(8192, 8192, dtype=d)))
        for d in (torch.float32, torch.bfloat16)
    )
    assert single / half == pytest.approx(312 / 19.5, rel=0.05)


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(RematerializeError, match="toaster"):
        device_spec("toaster")


def small_gpt() -> Made:
    config = gpt.GPTConfig(layers=2, width=32, heads=4, tokens=16, batch=2, vocabulary=64)
    torch.manual_seed(0)
    text = torch.randint(config.vocabulary, (config.batch, config.tokens))
    return gpt.GPT(config), (text, text.clone())


def test_a_fake_model_gives_the_graph_of_the_real_one() -> None:
    real = analytic_graph(*small_gpt(), CPU)
    fake = analytic_graph(*on_fake_tensors(small_gpt), CPU)
    assert fake == real


# Torch can't move a module of fake tensors to another layout.
@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"channels last"}))
def test_every_construct_is_captured_on_fake_tensors(name: str) -> None:
    small = SMALL[name]

    def fake() -> Made:
        inputs = tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in small.inputs)
        return small.make(), inputs

    assert analytic_graph(*on_fake_tensors(fake), CPU) == analytic_graph(small.make(), small.inputs, CPU)


def test_a_model_beyond_this_machines_memory_is_captured() -> None:
    def huge() -> Made:
        return Loss(nn.Linear(10**6, 10**6), nn.Linear(10**6, 10**6)), (torch.randn(8, 10**6),)

    graph: TrainingGraph = analytic_graph(*on_fake_tensors(huge), CPU)
    assert sum(graph.storages[name] for name in graph.gradients) == 2 * 4 * (10**12 + 10**6)


def test_the_model_must_train() -> None:
    with pytest.raises(RematerializeError, match="eval mode"):
        analytic_graph(nn.Linear(2, 2).eval(), (torch.randn(1, 2),), CPU)
