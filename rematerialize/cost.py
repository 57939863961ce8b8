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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from rematerialize import torch_private as private
from rematerialize.capture import Kernel, KernelCost
from rematerialize.capture.aliasing import tensors_of
from rematerialize.capture.masks import draw_bytes
from rematerialize.errors import RematerializeError, did_you_mean

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What a roofline needs to know of a device.

    Attributes
    ----------
    name : str
    memory_bytes : int
    bandwidth : float
        Bytes per second between the device's memory and its cores.
    peak_flops : mapping of torch.dtype to float
        Floating-point operations per second of a matrix product (a multiply-add is two); other types run at
        float32's rate.
    launch_s : float
        Seconds that a call takes at least.
    source : str
        Where each figure comes from.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    peak_flops: Mapping[torch.dtype, float]
    launch_s: float
    source: str = ""

    def flops_per_s(self, dtype: torch.dtype) -> float:
        """The rate of a type."""
        return self.peak_flops.get(dtype, self.peak_flops[torch.float32])

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready data."""
        rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.peak_flops.items()}
        return {
            "name": self.name,
            "memory_bytes": self.memory_bytes,
            "bandwidth": self.bandwidth,
            "peak_flops": rates,
            "launch_s": self.launch_s,
            "source": self.source,
        }


def _peaks(double: float, single: float, half: float, brain: float | None = None) -> Mapping[torch.dtype, float]:
    """Rates in 10^12 per second; bfloat16 has that of float16 unless given."""
    rates = {torch.float64: double, torch.float32: single, torch.float16: half, torch.bfloat16: brain or half}
    return {dtype: rate * 1e12 for dtype, rate in rates.items()}


_LAUNCH_S = 3e-6
_SHEET = "NVIDIA {} data sheet, dense{}; launch: assumed"
_TENSOR_CORES = ", tensor cores for half types and float64 (no TF32)"
_HALF_ONLY = ", tensor cores for half types (no TF32); float64: {} of float32"
_NO_BRAIN = ", tensor cores for float16; bfloat16 as float32, for want of a unit"


def _gpu(
    name: str, memory_gb: int, bandwidth_gb_s: float, peaks: Mapping[torch.dtype, float], sheet: str, more: str = ""
) -> DeviceSpec:
    return DeviceSpec(name, memory_gb * 10**9, bandwidth_gb_s * 1e9, peaks, _LAUNCH_S, _SHEET.format(sheet, more))


DEVICES: Mapping[str, DeviceSpec] = {
    spec.name: spec
    for spec in (
        DeviceSpec(
            "2-core CPU",
            8 * 2**30,
            20e9,
            _peaks(0.08, 0.16, 0.16),
            4e-6,
            "assumed: two cores at 2.5 GHz, two 256-bit multiply-add units each; a share of a server's memory channels",
        ),
        _gpu("NVIDIA A100 40GB", 40, 1555, _peaks(19.5, 19.5, 312), "A100 (SXM)", _TENSOR_CORES),
        _gpu("NVIDIA A100 80GB", 80, 2039, _peaks(19.5, 19.5, 312), "A100 (SXM)", _TENSOR_CORES),
        _gpu("NVIDIA H100 80GB", 80, 3350, _peaks(67, 67, 989), "H100 (SXM)", _TENSOR_CORES),
        _gpu("NVIDIA H100 PCIe 80GB", 80, 2000, _peaks(51, 51, 756), "H100 (PCIe)", _TENSOR_CORES),
        _gpu("NVIDIA H200 141GB", 141, 4800, _peaks(67, 67, 989), "H200 (SXM)", _TENSOR_CORES),
        _gpu("NVIDIA L4 24GB", 24, 300, _peaks(0.49, 30.3, 121), "L4", _HALF_ONLY.format("a 64th")),
        _gpu("NVIDIA L40S 48GB", 48, 864, _peaks(1.43, 91.6, 362), "L40S", _HALF_ONLY.format("a 64th")),
        _gpu("NVIDIA T4 16GB", 16, 320, _peaks(0.25, 8.1, 65, 8.1), "T4", _NO_BRAIN + "; float64: a 32nd of float32"),
        _gpu(
            "NVIDIA V100 32GB",
            32,
            900,
            _peaks(7.8, 15.7, 125, 15.7),
            "V100 (SXM2)",
            _NO_BRAIN,
        ),
    )
}


def device_spec(name: str) -> DeviceSpec:
    """Look a device up by name.

    Raises
    ------
    RematerializeError
        If the table lacks it.
    """
    if name not in DEVICES:
        near = did_you_mean(name, DEVICES)
        raise RematerializeError(f"no figures for a device named {name!r}: known are {', '.join(DEVICES)}{near}")
    return DEVICES[name]


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
    arithmetic = call_flops(node) / device.flops_per_s(_working_dtype(node))
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


_MORE_FLOPS: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    private.training_rnn_layer: _rnn_layer_flops,
    aten.mkldnn_rnn_layer_backward: lambda *args: 2 * _rnn_layer_flops(*args),
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
