"""Cost of kernels without running them: a roofline of flops and bytes moved, per device.

A call takes its launch overhead, and then whichever is longer: its floating-point operations at the device's peak
rate, or its bytes at the memory's bandwidth (Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009). Nothing is
executed, so fake tensors do, and a model that no machine at hand could hold can be planned.

Departures from a real device, all of them on the optimistic side: peaks are data-sheet peaks, every tensor is read
and written once, and arithmetic is counted only where it can be the limit (products, convolutions, attention,
recurrences); every other call is bound by its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from rematerialize import torch_private as private
from rematerialize.capture import Kernel, KernelCost
from rematerialize.capture.aliasing import tensors_of
from rematerialize.capture.masks import draw_bytes
from rematerialize.device_table import DeviceSpec

aten = torch.ops.aten


class AnalyticCostModel:
    """Costs by formula; stands in wherever `measure.CostModel` does.

    Workspace is modelled for convolutions, as one copy of the image that the kernel reads (libraries reorder it, and
    the weight, into their own layout), for LSTM layers, whose saved gates have no size before they run, and for draws
    that become bytes; it is 0 for everything else.

    Parameters
    ----------
    device : DeviceSpec
    """

    def __init__(self, device: DeviceSpec) -> None:
        self.device = device

    def __call__(self, kernels: Iterable[Kernel]) -> dict[str, KernelCost]:
        """Costs by kernel name. Linear in the number of calls."""
        return {kernel.name: self.cost(kernel) for kernel in kernels if kernel.calls}

    def cost(self, kernel: Kernel) -> KernelCost:
        """The sum of its calls' times; the workspace of its allocating call."""
        times = [call_seconds(self.device, node) for node, _ in kernel.calls]
        return KernelCost(sum(times), _workspace_bytes(kernel.head), _hidden_outputs(kernel.head))


def call_seconds(device: DeviceSpec, node: fx.Node) -> float:
    """Seconds of one call: overhead, then the slower of arithmetic and memory."""
    arithmetic = call_flops(node) / device.flops_per_s(str(_working_dtype(node)).removeprefix("torch."))
    return device.launch_s + max(arithmetic, call_bytes(node) / device.bandwidth)


def call_flops(node: fx.Node) -> int:
    """Floating-point operations of one call, by torch's formulas and a few more; 0 where none is known."""
    packet = getattr(node.target, "_overloadpacket", node.target)
    args = fx.node.map_arg(node.args, lambda source: source.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda source: source.meta["val"])
    if packet in _MORE_FLOPS:
        return _MORE_FLOPS[packet](*args)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=node.meta["val"]))


def _working_dtype(node: fx.Node) -> torch.dtype:
    for value in (*(source.meta["val"] for source in node.all_input_nodes), node.meta["val"]):
        for _, tensor in tensors_of(value):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Two products: queries by keys, weights by values. A causal mask saves nothing here, as in torch's formulas."""
    heads = math.prod(query.shape[:-2])
    return 2 * heads * query.shape[-2] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward_flops(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> int:
    """Five products, the weights' recomputation among them."""
    return _attention_flops(query, key, value) * 5 // 2


def _rnn_layer_flops(inputs: Tensor, weight: Tensor, recurrent: Tensor, *_: Any) -> int:
    return 2 * math.prod(inputs.shape[:-1]) * (weight.numel() + recurrent.numel())


def _grouped_flops(left: Tensor, right: Tensor, *_: Any) -> int:
    """One product per group of rows, or of the dimension that both sum over: together as much as without groups."""
    rows = left.shape[-2] if right.dim() == 2 else math.prod(left.shape[:-1])
    return 2 * rows * left.shape[-1] * right.shape[-1]


_MORE_FLOPS: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    private.training_rnn_layer: _rnn_layer_flops,
    aten.mkldnn_rnn_layer_backward: lambda *args: 2 * _rnn_layer_flops(*args),
    aten._grouped_mm: _grouped_flops,
    aten.mv: lambda matrix, vector: 2 * matrix.numel(),
    aten.dot: lambda left, right: 2 * left.numel(),
}

_FRESH = frozenset({aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty})
# They read as much of their first tensor as they return.
_GATHERS = frozenset({aten.embedding, aten.index, aten.index_select, aten.gather})


def call_bytes(node: fx.Node) -> int:
    """Bytes that one call reads and writes, every distinct tensor once."""
    packet = getattr(node.target, "_overloadpacket", node.target)
    if packet in _FRESH:
        return 0
    if node.target is draw_bytes:  # as much as drawing numbers, which is what it comes down to
        return 2 * _drawn_bytes(node)
    written = sum(_touched_bytes(tensor) for _, tensor in tensors_of(node.meta["val"]))
    sources = [[tensor for _, tensor in tensors_of(source.meta["val"])] for source in node.all_input_nodes]
    reads = [sum(_touched_bytes(tensor) for tensor in tensors) for tensors in sources]
    if packet in _GATHERS:
        reads[0] = min(reads[0], written)
    return written + sum(reads)


def _touched_bytes(tensor: Tensor) -> int:
    """Bytes behind a view: an expanded dimension is one row."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


_CONVOLUTIONS = frozenset({aten.convolution, aten.convolution_backward})


def _workspace_bytes(head: fx.Node) -> int:
    if head.target is draw_bytes:
        return 0 if head.kwargs["direct"] else _drawn_bytes(head)
    if getattr(head.target, "_overloadpacket", None) not in _CONVOLUTIONS:
        return 0
    source = head.args[0]
    assert isinstance(source, fx.Node)
    return _touched_bytes(source.meta["val"])


def _drawn_bytes(node: fx.Node) -> int:
    """Bytes of the numbers that are drawn as bytes."""
    return int(node.meta["val"].numel() * node.kwargs["dtype"].itemsize)  # type: ignore[union-attr]


def _hidden_outputs(head: fx.Node) -> dict[int, int]:
    """An LSTM layer of oneDNN saves 15 times its output or more; its fake kernel gives that no size."""
    if head.target is not private.training_rnn_layer:
        return {}
    output = head.meta["val"][0]
    return {3: 15 * output.numel() * output.element_size()}
