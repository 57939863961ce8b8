"""Cost of kernels, measured on the device: seconds, workspace bytes, real output sizes.

Equal kernels (same calls, shapes, strides, dtypes, device) are measured once, on synthetic data. Memory comes
from the allocator's own events, so that workspace inside a kernel (convolutions, LSTMs) is seen.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rematerialize import torch_private as private
from rematerialize.capture.aliasing import tensors_of
from rematerialize.capture.inplace import call_in_place
from rematerialize.capture.kernels import Kernel
from rematerialize.capture.lower import KernelCost

# Blocks of these odd sizes, allocated between kernels, mark the borders in the stream of allocator events.
_BORDER_BYTES = 4099
_LEAST_RUNS = 3
_BLOCK = 4096
_TIMED_SECONDS_PER_KERNEL = 0.02
_GUESSED_CALL_S, _GUESSED_S_PER_BYTE = 1e-5, 1e-9


class CostModel:
    """Measured costs, remembered by kernel signature for as long as this object lives."""

    def __init__(self, time_limit_s: float = 2.0) -> None:
        self.time_limit_s = time_limit_s
        self._known: dict[str, KernelCost] = {}

    def __call__(self, kernels: Iterable[Kernel]) -> dict[str, KernelCost]:
        """Costs by kernel name. New kernels are run: each once for memory, some times for time."""
        signatures = {kernel.name: _signature(kernel) for kernel in kernels if kernel.calls}
        fresh: dict[str, Kernel] = {}
        for kernel in kernels:
            if kernel.calls and signatures[kernel.name] not in self._known:
                fresh.setdefault(signatures[kernel.name], kernel)
        with torch.no_grad(), private.disable_autocast(), _kept_generator_state(fresh.values()):
            self._known.update(_measure(fresh, self.time_limit_s))
        return {name: self._known[signature] for name, signature in signatures.items()}


def _measure(fresh: dict[str, Kernel], time_limit_s: float) -> dict[str, KernelCost]:
    memory: dict[str, _Memory] = {}
    first_s: dict[str, float] = {}
    devices = {device.type for kernel in fresh.values() for device in _devices(kernel)}
    if devices <= {"cpu"}:
        memory, first_s = _memory_by_events(fresh)
    else:
        for signature, kernel in fresh.items():
            with _refusing_data():
                memory[signature], first_s[signature] = _memory_by_statistics(kernel)
    deadline = time.perf_counter() + time_limit_s
    costs = {}
    for signature, kernel in sorted(fresh.items(), key=lambda item: first_s.get(item[0], 0.0)):
        if signature not in memory:
            costs[signature] = _guess(kernel)
            continue
        measured = first_s[signature]
        if time.perf_counter() < deadline:
            measured = min(measured, _time(kernel, deadline))
        found = memory[signature]
        costs[signature] = KernelCost(measured, found.transient_bytes, found.output_bytes)
    return costs


@dataclass(frozen=True, slots=True)
class _Memory:
    transient_bytes: int
    output_bytes: dict[int, int]


def _memory_by_events(fresh: dict[str, Kernel]) -> tuple[dict[str, _Memory], dict[str, float]]:
    """CPU: run every kernel once under the profiler and cut the event stream at the border blocks."""
    sizes: dict[str, dict[int, int]] = {}
    first_s: dict[str, float] = {}
    began: list[str] = []
    with private.allocation_events() as read:
        for signature, kernel in fresh.items():
            with _refusing_data():
                run = _prepare(kernel)
                began.append(signature)
                torch.empty(_BORDER_BYTES, dtype=torch.uint8)
                start = time.perf_counter()
                try:
                    result = run()
                    first_s[signature] = time.perf_counter() - start
                finally:
                    torch.empty(_BORDER_BYTES, dtype=torch.uint8)
                sizes[signature] = _sizes(result)
                del run, result
    windows = _windows(read())
    memory = {}
    for signature, window in zip(began, windows, strict=True):
        if signature not in sizes:
            continue
        level = peak = 0
        for change in window:
            level += change
            peak = max(peak, level)
        # Not "less what is left at the end": outputs that the fake kernel believes to be one tensor may be two.
        memory[signature] = _Memory(max(0, peak - _owned(fresh[signature], sizes[signature])), sizes[signature])
    return memory, first_s


@contextlib.contextmanager
def _refusing_data() -> Iterator[None]:
    """Let an op refuse synthetic data (a matrix that isn't positive definite, a pivot out of range)."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError):
        pass


def _guess(kernel: Kernel) -> KernelCost:
    """The cost of a kernel that synthetic data doesn't suit (pivots that permute nothing, say).

    Workspace as large as all that it reads and writes: factorizations copy their input, few need more.
    """
    nodes = {node for call, _ in kernel.calls for node in (call, *call.all_input_nodes)}
    tensors = [tensor for node in nodes for _, tensor in tensors_of(node.meta["val"])]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return KernelCost(_GUESSED_CALL_S + size * _GUESSED_S_PER_BYTE, size)


def _owned(kernel: Kernel, sizes: dict[int, int]) -> int:
    """Bytes of the outputs that the training graph counts for this kernel."""
    head = kernel.head.name
    written = set(kernel.writes)
    return sum(size for index, size in sizes.items() if written & {head, f"{head}.{index}"})


def _windows(events: list[int]) -> list[list[int]]:
    windows: list[list[int]] = []
    inside = False
    for change in events:
        if change == _BORDER_BYTES:
            inside = not inside
            if inside:
                windows.append([])
        elif change != -_BORDER_BYTES and inside:
            windows[-1].append(change)
    return windows


def _memory_by_statistics(kernel: Kernel) -> tuple[_Memory, float]:
    """CUDA: the caching allocator's own peak around one run."""
    run = _prepare(kernel)
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before
    sizes = _sizes(result)
    return _Memory(max(0, peak - _owned(kernel, sizes)), sizes), elapsed


def _sizes(result: Any) -> dict[int, int]:
    return {index: tensor.untyped_storage().nbytes() for index, tensor in tensors_of(result)}


def _time(kernel: Kernel, deadline: float) -> float:
    """The fastest of some warm runs: what other processes add is never negative."""
    run = _prepare(kernel)
    cuda = any(device.type == "cuda" for device in _devices(kernel))
    run()
    times: list[float] = []
    spent = 0.0
    while len(times) < _LEAST_RUNS or (spent < _TIMED_SECONDS_PER_KERNEL and len(times) < 15):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        spent += times[-1]
        if time.perf_counter() > deadline:
            break
    return min(times)


def _prepare(kernel: Kernel) -> Callable[[], Any]:
    """A closure that runs the kernel on synthetic data; it returns the allocating call's result."""
    data: dict[fx.Node, Any] = {}
    inside = {node for node, _ in kernel.calls}
    for node, _ in kernel.calls:
        for source in node.all_input_nodes:
            if source not in inside and source not in data:
                workspace = _opaque(source)
                data[source] = _synthetic(source.meta["val"]) if workspace is None else workspace

    def run() -> Any:
        values = dict(data)
        first = None
        for node, form in kernel.calls:
            args = fx.node.map_arg(node.args, lambda source: values[source])
            kwargs = fx.node.map_arg(node.kwargs, lambda source: values[source])
            target = node.target
            if form is not None:
                target, args, kwargs = call_in_place(form, args, kwargs)
            result = target(*args, **kwargs)  # type: ignore[operator]
            values[node] = result
            # Inside a kernel only the written-over value goes on: items of a tuple are looked up by views.
            for user in node.users:
                if user.target is private.getitem and user not in values:
                    values[user] = result[user.args[1]]
            first = result if first is None else first
        return first

    return run


def _opaque(source: fx.Node) -> Tensor | None:
    """A workspace that only its own kernel can fill (oneDNN's LSTM crashes on any other): run that kernel."""
    while source.op == "call_function" and source.target is not private.getitem and source.all_input_nodes:
        if source.target is not torch.ops.aten.detach.default:
            return None
        source = source.all_input_nodes[0]
    if source.target is not private.getitem:
        return None
    maker, index = source.args
    if not isinstance(maker, fx.Node) or maker.target is not private.training_rnn_layer or index != 3:
        return None
    args = fx.node.map_arg(maker.args, lambda node: _synthetic(node.meta["val"]))
    result: Tensor = maker.target(*args)[3]
    return result


def _synthetic(value: Any) -> Any:
    """A real tensor with the layout of a fake one: floats in (0.25, 1), so that no formula meets a NaN."""
    if isinstance(value, (tuple, list)):
        return type(value)(_synthetic(item) for item in value)
    if not isinstance(value, Tensor):
        return value
    needed = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    base = torch.empty(max(needed, 0), dtype=value.dtype, device=value.device)
    if value.is_floating_point():
        _fill(base)
        filled = base.as_strided(value.shape, value.stride())
        if value.dim() >= 2 and value.shape[-1] == value.shape[-2] > 1:
            # So that factorizations and solvers find a positive definite matrix.
            filled.diagonal(dim1=-2, dim2=-1).fill_(float(value.shape[-1]))
        return filled
    elif value.is_complex():
        base.fill_(0.5)
    else:
        base.zero_()
    return base.as_strided(value.shape, value.stride())


def _fill(flat: Tensor) -> None:
    """Random values in (0.25, 1) at the speed of a copy: one block of them, repeated."""
    block = torch.empty(min(flat.numel(), _BLOCK), dtype=flat.dtype, device=flat.device).uniform_(0.25, 1.0)
    if block.numel():
        whole = flat.numel() - flat.numel() % block.numel()
        flat[:whole].view(-1, block.numel()).copy_(block)
        flat[whole:].copy_(block[: flat.numel() - whole])


def _devices(kernel: Kernel) -> Iterator[torch.device]:
    for node, _ in kernel.calls:
        for _, tensor in tensors_of(node.meta["val"]):
            yield tensor.device


def _signature(kernel: Kernel) -> str:
    """Everything that a kernel's cost depends on, as text."""
    numbers: dict[fx.Node, str] = {}

    def describe(source: fx.Node) -> str:
        if source not in numbers:
            layouts = [f"{tuple(t.shape)}{t.stride()}{t.dtype}{t.device}" for _, t in tensors_of(source.meta["val"])]
            numbers[source] = f"${len(numbers)}:{layouts}"
        return numbers[source]

    parts = []
    for node, form in kernel.calls:
        args = fx.node.map_arg(node.args, lambda source: describe(source))
        kwargs = fx.node.map_arg(node.kwargs, lambda source: describe(source))
        parts.append(f"{node.target} {form.position if form else ''} {args} {kwargs}")
    return "; ".join(parts)


class _kept_generator_state:
    """Measuring random kernels must not change what the user's generators draw next."""

    def __init__(self, kernels: Iterable[Kernel]) -> None:
        sources = {source for kernel in kernels for node, _ in kernel.calls for source in node.all_input_nodes}
        values = [source.meta["val"] for source in sources]
        self._generators = [value for value in values if isinstance(value, torch.Generator)]

    def __enter__(self) -> None:
        self._own = [generator.get_state() for generator in self._generators]
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if private.cuda_started() else []

    def __exit__(self, *exc: object) -> None:
        for generator, state in zip(self._generators, self._own, strict=True):
            generator.set_state(state)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
