"""Cost of kernels, measured on the device: seconds, workspace bytes, real output sizes.

Equal kernels (same calls, shapes, strides, dtypes, device) are measured once, on synthetic data. Memory comes
from the allocator's own events, so that workspace inside a kernel (convolutions, LSTMs) is seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from rematerialize import torch_private as private
from rematerialize.capture.aliasing import tensors_of
from rematerialize.capture.kernels import Kernel
from rematerialize.capture.lower import KernelCost
from rematerialize.cost_cache import CostCache, MeasuredCost, digest
from rematerialize.garbage import uncollected
from rematerialize.synthetic import bytes_of, devices_of, prepare_kernel, refusing_data
from rematerialize.timing import time_kernels

# Blocks of these odd sizes, allocated between kernels, mark the borders in the stream of allocator events.
_BORDER_BYTES = 4099
_CHUNK = 64  # kernels per run of the profiler: an interrupt loses at most these
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
        step = [signature for signature, _ in named.values()]
        distinct = dict(reversed(named.values()))  # the first of equal ones
        self._read_cache(distinct)
        fresh = {s: kernel for s, kernel in distinct.items() if s not in self._known or s in self._unfinished}
        self._unfinished.update(fresh)
        try:
            with torch.no_grad(), private.disable_autocast(), kept_generator_state(fresh.values()):
                _measure(fresh, step, self._known, self.time_limit_s, progress or (lambda done, total: None))
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
    step: Sequence[str],
    known: dict[str, MeasuredCost],
    time_limit_s: float,
    progress: Callable[[int, int], None],
) -> None:
    """Measure into ``known``: first every kernel once, then warm runs until the time is over."""
    if not fresh:
        return
    total = 2 * len(fresh)
    _measure_memory(fresh, known, lambda done: progress(done, total))
    cold = {name: (kernel, known[name].cost.time_s) for name, kernel in fresh.items() if not known[name].warm}
    timed = total - len(cold)

    def tell(signature: str, time_s: float) -> None:
        nonlocal timed
        known[signature] = MeasuredCost(replace(known[signature].cost, time_s=time_s), warm=True)
        timed += 1
        progress(timed, total)

    time_kernels(cold, step, time_limit_s, tell)
    progress(total, total)


def _measure_memory(fresh: dict[str, Kernel], known: dict[str, MeasuredCost], progress: Callable[[int], None]) -> None:
    """One run of every kernel: its workspace, its real sizes, and a first time."""
    unknown = [signature for signature in fresh if signature not in known]
    on_cpu = {device.type for kernel in fresh.values() for device in devices_of(kernel)} <= {"cpu"}
    for start in range(0, len(unknown), _CHUNK):
        memory: dict[str, _Memory] = {}
        first_s: dict[str, float] = {}
        part = {signature: fresh[signature] for signature in unknown[start : start + _CHUNK]}
        if on_cpu:
            memory, first_s = _memory_by_events(part)
        else:
            for signature, kernel in part.items():
                with refusing_data():
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
            with refusing_data():
                run = prepare_kernel(kernel)
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


def _guess(kernel: Kernel) -> KernelCost:
    """The cost of a kernel that synthetic data doesn't suit (pivots that permute nothing, say).

    Workspace as large as all that it reads and writes: factorizations copy their input, few need more.
    """
    if not kernel.writes:
        return KernelCost(_GUESSED_CALL_S)
    nodes = {node for call, _ in kernel.calls for node in (call, *call.all_input_nodes)}
    size = bytes_of(nodes)
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
    run = prepare_kernel(kernel)
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


class kept_generator_state:
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
