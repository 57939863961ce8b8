"""Cost of kernels, measured on the device: seconds, workspace bytes, real output sizes.

Equal kernels (same calls, shapes, strides, dtypes, device) are measured once, on synthetic data. Memory comes
from the allocator's own events, so that workspace inside a kernel (convolutions, LSTMs) is seen.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from rematerialize import torch_private as private
from rematerialize.capture.aliasing import tensors_of
from rematerialize.capture.inplace import call_in_place
from rematerialize.capture.kernels import Kernel
from rematerialize.capture.lower import KernelCost
from rematerialize.cost_cache import CostCache, MeasuredCost, digest
from rematerialize.garbage import uncollected

# Blocks of these odd sizes, allocated between kernels, mark the borders in the stream of allocator events.
_BORDER_BYTES = 4099
_STALLED = 2.0  # a warm run that takes so many times a cold one isn't believed
_MOST_RUNS = 15
_CHUNK = 64  # kernels per run of the profiler: an interrupt loses at most these
_BLOCK = 4096
_TIMED_SECONDS_PER_KERNEL = 0.02
_KEPT_BYTES = 128 << 20  # allocators give back what is larger than 32 MiB at once, and fetch it anew, anyway
_GUESSED_CALL_S, _GUESSED_S_PER_BYTE = 1e-5, 1e-9


class CostModel:
    """Measured costs, remembered by kernel signature for as long as this object lives, and in a folder if given one.

    Parameters
    ----------
    time_limit_s : float
        For the warm runs of kernels that are new; the longest go first, the others keep the time of their first run.
    cache : CostCache, optional
        Read before measuring, written after, an interrupt included.
    """

    def __init__(self, time_limit_s: float = 2.0, cache: CostCache | None = None) -> None:
        self.time_limit_s = time_limit_s
        self.cache = cache
        self._known: dict[str, MeasuredCost] = {}
        self._unfinished: set[str] = set()  # what an interrupt or another process left with a cold time

    def __call__(
        self, kernels: Iterable[Kernel], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, KernelCost]:
        """Costs by kernel name. New kernels are run: each once for memory, some times for time.

        Parameters
        ----------
        kernels : iterable of Kernel
        progress : callable, optional
            Called with how many of the new kernels are done, and how many there are.
        """
        named = {kernel.name: (_signature(kernel), kernel) for kernel in kernels if kernel.calls}
        distinct = dict(reversed(named.values()))
        self._read_cache(distinct)
        fresh = {s: kernel for s, kernel in distinct.items() if s not in self._known or s in self._unfinished}
        self._unfinished.update(fresh)
        try:
            with torch.no_grad(), private.disable_autocast(), _kept_generator_state(fresh.values()):
                _measure(fresh, self._known, self.time_limit_s, progress or (lambda done, total: None))
            self._unfinished.difference_update(fresh)
        finally:
            self._write_cache(fresh)
        return {name: self._known[signature].cost for name, (signature, _) in named.items()}

    def _read_cache(self, distinct: Iterable[str]) -> None:
        """Take over what the file knows; cold times from it are worth another try."""
        unknown = [signature for signature in distinct if signature not in self._known]
        if self.cache is None or not unknown:
            return
        stored = self.cache.load()
        for signature in unknown:
            if (found := stored.get(digest(signature))) is not None:
                self._known[signature] = found
                if not found.warm:
                    self._unfinished.add(signature)

    def _write_cache(self, signatures: Iterable[str]) -> None:
        if self.cache is not None:
            known = {digest(s): self._known[s] for s in signatures if s in self._known}
            if known:
                self.cache.save(known)


def _measure(
    fresh: dict[str, Kernel],
    known: dict[str, MeasuredCost],
    time_limit_s: float,
    progress: Callable[[int, int], None],
) -> None:
    """Measure into ``known``: first every kernel once, then warm runs until the time is over."""
    if not fresh:
        return
    total = 2 * len(fresh)
    _measure_memory(fresh, known, lambda done: progress(done, total))
    deadline = time.perf_counter() + time_limit_s
    cold = [signature for signature in fresh if not known[signature].warm]
    # The longest ones first: they make up most of a step.
    for at, signature in enumerate(sorted(cold, key=lambda name: -known[name].cost.time_s)):
        progress(total - len(cold) + at, total)
        left_s = deadline - time.perf_counter()
        if left_s > 0:
            measured = _time(fresh[signature], min(_TIMED_SECONDS_PER_KERNEL, left_s / (len(cold) - at)))
            known[signature] = MeasuredCost(replace(known[signature].cost, time_s=measured), warm=True)
    progress(total, total)


def _measure_memory(fresh: dict[str, Kernel], known: dict[str, MeasuredCost], progress: Callable[[int], None]) -> None:
    """One run of every kernel: its workspace, its real sizes, and a first time."""
    unknown = [signature for signature in fresh if signature not in known]
    on_cpu = {device.type for kernel in fresh.values() for device in _devices(kernel)} <= {"cpu"}
    for start in range(0, len(unknown), _CHUNK):
        memory: dict[str, _Memory] = {}
        first_s: dict[str, float] = {}
        part = {signature: fresh[signature] for signature in unknown[start : start + _CHUNK]}
        if on_cpu:
            memory, first_s = _memory_by_events(part)
        else:
            for signature, kernel in part.items():
                with _refusing_data():
                    memory[signature], first_s[signature] = _memory_by_statistics(kernel)
        for signature, kernel in part.items():
            if signature in memory:
                found = memory[signature]
                cost = KernelCost(first_s[signature], found.transient_bytes, found.output_bytes)
                known[signature] = MeasuredCost(cost, warm=False)
            else:
                known[signature] = MeasuredCost(_guess(kernel), warm=True)
        progress(min(start + _CHUNK, len(unknown)))


@dataclass(frozen=True, slots=True)
class _Memory:
    transient_bytes: int
    output_bytes: dict[int, int]


def _memory_by_events(fresh: dict[str, Kernel]) -> tuple[dict[str, _Memory], dict[str, float]]:
    """CPU: run every kernel once under the profiler and cut the event stream at the border blocks.

    Garbage isn't collected meanwhile: a tensor from elsewhere that dies in the middle of a kernel would count as memory
    that the kernel gives back.
    """
    sizes: dict[str, dict[int, int]] = {}
    first_s: dict[str, float] = {}
    began: list[str] = []
    with uncollected(), private.allocation_events() as read:
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


def _time(kernel: Kernel, allowed_s: float) -> float:
    """The median of some warm runs: as many as fit into the allowed time, one at least.

    On the CPU results are kept meanwhile: a step that stores activations writes them to memory that is new to the
    process, which the first write makes up to ten times slower (softmax's backward on 8 MiB: 2.4 ms, 0.3 ms where
    it writes again what it has just written).
    """
    run = _prepare(kernel)
    cuda = any(device.type == "cuda" for device in _devices(kernel))

    def timed() -> tuple[float, Any]:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    cold_s = timed()[0]
    times: list[float] = []
    spent, kept_bytes = 0.0, 0
    kept: list[Any] = []
    while not times or (spent < allowed_s and len(times) < _MOST_RUNS):
        took_s, result = timed()
        times.append(took_s)
        spent += took_s
        kept_bytes += sum(_sizes(result).values())
        if not cuda and kept_bytes <= _KEPT_BYTES:
            kept.append(result)
        del result
    if len(times) == 1 and times[0] > _STALLED * cold_s:  # something held the machine up, and used the time up
        times += [cold_s, timed()[0]]
    return statistics.median(times)


def _prepare(kernel: Kernel) -> Callable[[], Any]:
    """A closure that runs the kernel on synthetic data; it returns the allocating call's result."""
    data: dict[fx.Node, Any] = {}
    inside = {node for node, _ in kernel.calls}
    for node, _ in kernel.calls:
        for source in node.all_input_nodes:
            if source not in inside and source not in data:
                workspace = _opaque(source)
                data[source] = _synthetic(source.meta["val"]) if workspace is None else workspace
    for node, _ in kernel.calls:
        # Its source may hold fewer values than the mask: the one op that refuses a mask all true.
        mask = node.args[1] if node.target is torch.ops.aten.masked_scatter.default else None
        if isinstance(mask, fx.Node) and mask in data:
            data[mask].zero_()

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
    """A real tensor with the layout of a fake one: floats in (0.25, 1), so that no formula meets a NaN.

    Booleans are true: what a mask selects takes workspace (a backward of `masked_scatter`).
    """
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
    elif value.dtype == torch.bool:
        base.fill_(True)
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
