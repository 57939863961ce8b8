"""Seconds that kernels take in each other's company, as they stand in a step.

A kernel that is repeated on its own finds its inputs, its weights and its code in the caches: that made a small
network's convolutions a fifth faster than they are in its step. So neighbours run in turns, as they do in the step: an
op of a loop that is unrolled finds what its last run left, and is not made to seem slower than it is.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rematerialize.capture.kernels import Kernel
from rematerialize.synthetic import bytes_of, devices_of, inputs_of, prepare_kernel

_STALLED = 2.0  # a warm run that takes so many times a cold one isn't believed
_MOST_RUNS = 15
_TIMED_SECONDS_PER_KERNEL = 0.02
_MOST_NEIGHBOURS = 128  # with 64 they find caches warmer than a step does, with 200 colder: 6 to 12 % of small steps
_HELD_BYTES = 128 << 20  # inputs of neighbours
_HELD_RESULTS = 8
_CACHED_BYTES = 4 << 20
_HEAP_BYTES, _HEAP_PIECES = 16 << 20, 4


def time_kernels(
    kernels: Mapping[str, tuple[Kernel, float]],
    step: Sequence[str],
    time_limit_s: float,
    tell: Callable[[str, float], None],
) -> None:
    """Time kernels until the time is over, the slowest neighbourhoods first; the rest is left out.

    Parameters
    ----------
    kernels : mapping of str to (Kernel, float)
        In the order of a step; with each its time when it ran first, in seconds.
    step : sequence of str
        The names as they follow each other in a step, each as often as it runs there; others among them count nothing.
    time_limit_s : float
    tell : callable
        Told the name of every kernel that was timed, and its median: after an interrupt, too.
    """
    deadline = time.perf_counter() + time_limit_s
    todo = len(kernels)
    groups = sorted(_neighbours(kernels), key=lambda group: -sum(kernels[name][1] for name in group))
    _cap = used_memory() if kernels else None
    for group in groups:
        left_s = deadline - time.perf_counter()
        if left_s <= 0:
            return
        members = {name: kernels[name][0] for name in group}
        turns = [name for name in step if name in members]
        _time_in_turns(members, turns, min(_TIMED_SECONDS_PER_KERNEL, left_s / todo), tell)
        todo -= len(group)


def used_memory() -> Tensor:
    """Free memory that was used before, at least for as long as what is returned lives: steps find theirs so.

    Results that are the last on the heap would give their pages back to the system when they are freed: an LSTM's
    forward took twice as long as it does in a step.
    """
    torch.empty(_HEAP_BYTES, dtype=torch.uint8)  # the C library maps blocks of this size no longer one by one
    pieces = [torch.zeros(_HEAP_BYTES * 15 // 16, dtype=torch.uint8) for _ in range(_HEAP_PIECES)]
    cap = torch.empty_like(pieces[0])
    pieces.clear()
    return cap


def _neighbours(kernels: Mapping[str, tuple[Kernel, float]]) -> Iterator[list[str]]:
    """Runs of kernels whose inputs fit into memory together."""
    group: list[str] = []
    held = 0
    for name, (kernel, _) in kernels.items():
        size = bytes_of(inputs_of(kernel))
        if group and (held + size > _HELD_BYTES or len(group) == _MOST_NEIGHBOURS):
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


class _Results:
    """What the last kernels made: small results are held until some more kernels have run.

    In a step a kernel doesn't find in the caches where it writes: what was there is still needed. Dropped at once,
    results made the steps of small networks seem a tenth faster than they are; kept to the end of a round, their
    kernels a third slower.
    """

    def __init__(self) -> None:
        self._held: deque[tuple[_Clock, list[Any]]] = deque()

    def take(self, clock: _Clock, result: list[Any]) -> None:
        """Hold a result, in a list that alone has it, and free what was held for long."""
        if clock.large:
            clock.free(result)
            return
        self._held.append((clock, result))
        if len(self._held) > _HELD_RESULTS:
            owner, oldest = self._held.popleft()
            owner.free(oldest)


class _Clock:
    """One kernel's runs, and how long it takes to free what they make: a tenth of a step of very small kernels."""

    def __init__(self, kernel: Kernel, results: _Results) -> None:
        self._run = prepare_kernel(kernel)
        self.large = bytes_of(node for node, _ in kernel.calls) > _CACHED_BYTES  # in no cache, wherever it is written
        self._results = results
        self._cuda = any(device.type == "cuda" for device in devices_of(kernel))
        self._freed_s: list[float] = []
        self._cold_s = self._timed()
        self._times: list[float] = []

    @property
    def ran(self) -> bool:
        return bool(self._times)

    def run(self) -> None:
        self._times.append(self._timed())

    def free(self, result: list[Any]) -> None:
        """Free what a run made."""
        start = time.perf_counter()
        result.clear()
        self._freed_s.append(0.0 if self._cuda else time.perf_counter() - start)  # a device works on meanwhile

    def enough(self, allowed_s: float) -> bool:
        return len(self._times) >= _MOST_RUNS or sum(self._times) >= allowed_s

    def seconds(self) -> float:
        """The median so far."""
        if len(self._times) == 1 and self._times[0] > _STALLED * self._cold_s:
            self._times += [self._cold_s, self._timed()]  # something held the machine up, and used the time up
        return statistics.median(self._times) + statistics.median(self._freed_s or [0.0])

    def _timed(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = [self._run()]
        if self._cuda:
            torch.cuda.synchronize()
        took_s = time.perf_counter() - start
        self._results.take(self, result)
        return took_s


def _time_in_turns(
    kernels: Mapping[str, Kernel], turns: Sequence[str], allowed_s: float, tell: Callable[[str, float], None]
) -> None:
    """Warm runs of neighbours as a step has them, again and again: of each as many as fit into the time allowed for it.

    At least one of each.
    """
    results = _Results()
    clocks = {name: _Clock(kernel, results) for name, kernel in kernels.items()}
    running = {name: clocks[name] for name in turns}
    try:
        while running:
            for name in turns:
                if (clock := running.get(name)) is not None:
                    clock.run()
                    if clock.enough(allowed_s):
                        del running[name]
    finally:
        for name, clock in clocks.items():
            if clock.ran:
                tell(name, clock.seconds())
