"""The independent measurement: peak, equality and time of a training step, whoever runs it.

Nothing here imports what it judges: of the package, only names. On CPU a peak is the largest running sum of the
allocator's own events, kernel workspace included; on CUDA it is what the caching allocator reports.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from rematerialize.garbage import uncollected
from rematerialize.torch_private import DeviceType, tree_flatten
from rematerialize.zoo.spec import Inputs, loss_is_output


@dataclass(frozen=True, slots=True)
class PeakResult:
    """Memory over one call, in bytes above what was allocated when it began.

    On CPU, freeing what was allocated before earns nothing: the allocator doesn't know its size.
    `end_bytes` is what the call left behind (gradients in `.grad`, say). `events` counts
    allocations and frees (0 on CUDA: not traced).
    """

    peak_bytes: int
    end_bytes: int
    events: int


@dataclass(frozen=True, slots=True)
class Stepper:
    """Whatever can do a training step: the module that owns the parameters, and how to call it."""

    module: nn.Module
    inputs: Inputs
    loss_of: Callable[[Any], Tensor] = loss_is_output
    call: Callable[..., Any] | None = None  # None: the module itself
    note: str = ""

    def step(self, seed: int) -> Tensor:
        """Forward and backward from clean gradients; returns the detached loss.

        Outputs are held until the backward is done, as `outputs.loss.backward()` does.
        """
        clear_gradients(self.module)
        _seed(seed)
        forward = self.module if self.call is None else self.call
        outputs = forward(**self.inputs) if isinstance(self.inputs, dict) else forward(*self.inputs)
        loss = self.loss_of(outputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def _seed(seed: int) -> None:
    """Seed the generators of devices in use. `torch.manual_seed` notes a stack trace for each kind that isn't: half a
    millisecond, which is much of a small step's time.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Everything that a training step may change, cloned."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    generators: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two steps side by side. How far values are apart is relative to the largest magnitude of the reference tensor;
    `worst_gradient` names the parameter whose gradients are furthest apart.
    """

    loss_equal: bool
    gradients_equal: bool
    buffers_equal: bool
    generators_equal: bool
    loss_relative: float
    gradients_relative: float
    worst_gradient: str

    @property
    def max_relative(self) -> float:
        """Over loss and gradients."""
        return max(self.loss_relative, self.gradients_relative)

    @property
    def exact(self) -> bool:
        """Whether nothing differs in any bit."""
        return self.loss_equal and self.gradients_equal and self.effects_equal

    @property
    def effects_equal(self) -> bool:
        """Whether buffers and generators stand where the reference step left them."""
        return self.buffers_equal and self.generators_equal

    def within(self, tolerance: float) -> bool:
        """Return True when values differ by rounding only and effects not at all."""
        return self.effects_equal and self.max_relative <= tolerance

    def describe(self) -> str:
        """Say what differs, in a few words."""
        if self.exact:
            return "equal"
        parts = []
        if not (self.loss_equal and self.gradients_equal):
            worst = "loss" if self.loss_relative >= self.gradients_relative else self.worst_gradient
            parts.append(f"values differ by {self.max_relative:.1e} ({worst})")
        if not self.buffers_equal:
            parts.append("buffers differ")
        if not self.generators_equal:
            parts.append("generator state differs")
        return ", ".join(parts)


class _WeightlessLoss(torch.autograd.Function):
    """A scalar whose backward hands every output a gradient of ones and saves nothing."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        # Laid out as the outputs are, as losses do that work element by element.
        ctx.like = [output.detach().to("meta", copy=True) for output in outputs]
        ctx.devices = [output.device for output in outputs]
        return outputs[0].new_zeros((), dtype=outputs[0].dtype.to_real())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ones_like(like, device=device) for like, device in zip(ctx.like, ctx.devices, strict=True))


def weightless_loss(outputs: Any) -> Tensor:
    """Return a loss that adds no memory of its own to the step but the gradients of the outputs.

    A loss outside of the model allocates what no plan of the model can see; this one shows the
    model's peak alone. Takes a tensor, or a container of tensors, at any depth, that torch knows or that is a dict.
    """
    apply: Callable[..., Tensor] = _WeightlessLoss.apply
    return apply(*(part for part in _tensors_in(outputs) if part.requires_grad))


def _tensors_in(outputs: Any) -> Iterator[Tensor]:
    """The tensors that containers hold, those that libraries derive from dict and put into each other included."""
    if isinstance(outputs, Tensor):
        yield outputs
        return
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    if not isinstance(outputs, dict | list | tuple):
        parts = [part for part in tree_flatten(outputs)[0] if part is not outputs]
    for part in parts:
        yield from _tensors_in(part)


def clear_gradients(module: nn.Module) -> None:
    """Forget the gradients of all parameters."""
    for parameter in module.parameters():
        parameter.grad = None


def measure_peak(fn: Callable[[], object], *, device: str = "cpu") -> PeakResult:
    """Call `fn` once and return the most memory that was live during it.

    The CPU allocator reports to the thread that profiles and to what inherits its state; a Python
    thread that `fn` starts isn't seen (`profile_all_threads` drops memory events altogether).

    Parameters
    ----------
    fn : callable
        Takes nothing; its result is dropped inside the measurement.
    device : str
        "cpu", or a CUDA device whose allocator to ask.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        return _measure_cuda_peak(fn, torch.device(device))
    with _recorded() as trace:
        fn()
    assert trace.profiler is not None
    results = trace.profiler.kineto_results
    assert results is not None
    memory = [event for event in results.events() if event.name() == "[memory]"]
    on_cpu = [event for event in memory if event.device_type() == DeviceType.CPU]
    on_cpu.sort(key=lambda event: event.start_ns())
    sums = list(accumulate(event.nbytes() for event in on_cpu))
    return PeakResult(max(sums, default=0), sums[-1] if sums else 0, len(sums))


@contextlib.contextmanager
def _recorded() -> Iterator[Any]:
    """A profile of the CPU's allocations, without the lines that torch writes to stderr at its start and its end."""
    trace: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silenced():
        trace.__enter__()
    try:
        yield trace
    finally:
        with _silenced():
            trace.__exit__(None, None, None)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Send what native code writes to stderr nowhere."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _measure_cuda_peak(fn: Callable[[], object], device: torch.device) -> PeakResult:
    torch.cuda.synchronize(device)
    start = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - start
    return PeakResult(peak, torch.cuda.memory_allocated(device) - start, 0)


def measure_step_peak(stepper: Stepper, *, seed: int = 0, device: str = "cpu") -> PeakResult:
    """Return the peak of one step that begins without gradients."""
    clear_gradients(stepper.module)
    return measure_peak(lambda: stepper.step(seed), device=device)


def buffer_state(module: nn.Module) -> dict[str, Tensor]:
    """Clone all buffers."""
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def restore_buffers(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write what `buffer_state` returned back in place."""
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(state[name])


def run_step(stepper: Stepper, *, seed: int, buffers: Mapping[str, Tensor] | None = None) -> StepResult:
    """Run one step from the given buffers (those of now when None) and collect what it did."""
    if buffers is not None:
        restore_buffers(stepper.module, buffers)
    loss = stepper.step(seed)
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    gradients = {
        name: None if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in stepper.module.named_parameters()
    }
    clear_gradients(stepper.module)
    return StepResult(loss.clone(), gradients, buffer_state(stepper.module), tuple(states))


def _same(reference: Tensor, other: Tensor) -> bool:
    """Equal in every number, where NaN equals NaN: a step that gives NaN is repeated by one that does, too."""
    if torch.equal(reference, other):
        return True
    if reference.shape != other.shape or reference.dtype != other.dtype or reference.device != other.device:
        return False
    return bool(torch.isclose(reference, other, rtol=0.0, atol=0.0, equal_nan=True).all())


def _relative(reference: Tensor | None, other: Tensor | None) -> float:
    if reference is None or other is None:
        return 0.0 if reference is other else float("inf")
    if reference.shape != other.shape or reference.dtype != other.dtype:
        return float("inf")
    if _same(reference, other):
        return 0.0
    a, b = reference.double(), other.double()
    difference = ((a - b).abs().max() / a.abs().max().clamp_min(1e-300)).item()
    return difference if difference == difference else float("inf")  # NaN against a number


def compare_steps(reference: StepResult, other: StepResult) -> Comparison:
    """Compare bit for bit, and say how far the values are apart where they aren't equal."""
    names = reference.gradients.keys() | other.gradients.keys()
    apart = {name: _relative(reference.gradients.get(name), other.gradients.get(name)) for name in sorted(names)}
    worst = max(apart, key=lambda name: apart[name], default="")
    same_buffers = reference.buffers.keys() == other.buffers.keys() and all(
        _same(buffer, other.buffers[name]) for name, buffer in reference.buffers.items()
    )
    same_generators = len(reference.generators) == len(other.generators) and all(
        torch.equal(a, b) for a, b in zip(reference.generators, other.generators, strict=True)
    )
    return Comparison(
        loss_equal=_same(reference.loss, other.loss),
        gradients_equal=not any(apart.values()),
        buffers_equal=same_buffers,
        generators_equal=same_generators,
        loss_relative=_relative(reference.loss, other.loss),
        gradients_relative=apart.get(worst, 0.0),
        worst_gradient=worst,
    )


@dataclass(frozen=True, slots=True)
class Timing:
    """Step times of one contestant; ratios are taken within each round, against the reference.

    Dispersion is the interquartile range.
    """

    median_s: float
    iqr_s: float
    ratio: float
    ratio_iqr: float
    samples_s: tuple[float, ...]


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return quartiles[2] - quartiles[0]


def time_interleaved(
    steps: Mapping[str, Callable[[], object]],
    *,
    reference: str,
    rounds: int = 9,
    warmup: int = 1,
    order_seed: int = 0,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time all contestants in turns, each once per round, in a new random order every round.

    Whatever slows the machine for a while slows all of them, and the median of per-round ratios
    forgets it. The garbage collector is off while a step runs. Between rounds it looks at what is new only: a look at
    all objects would leave the processor's caches full of them, and the next step slower than it is in a loop.

    Parameters
    ----------
    steps : mapping of str to callable
        Contestants by name; `reference` is one of them.
    rounds, warmup : int
        Counted and uncounted rounds, at least 1 and 0.
    synchronize : callable, optional
        Waits for the device; called before each clock reading.
    """
    if reference not in steps:
        raise ValueError(f"the reference {reference!r} is not among {sorted(steps)}")
    wait = synchronize or (lambda: None)
    shuffle = random.Random(order_seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    for turn in range(warmup + rounds):
        gc.collect(1)
        order = list(steps)
        shuffle(order)
        with uncollected():
            for name in order:
                wait()
                start = time.perf_counter()
                steps[name]()
                wait()
                if turn >= warmup:
                    samples[name].append(time.perf_counter() - start)
    base = samples[reference]
    return {name: _timing(values, base) for name, values in samples.items()}


def _timing(values: list[float], base: list[float]) -> Timing:
    ratios = [value / reference for value, reference in zip(values, base, strict=True)]
    return Timing(
        median_s=statistics.median(values),
        iqr_s=_spread(values),
        ratio=statistics.median(ratios),
        ratio_iqr=_spread(ratios),
        samples_s=tuple(values),
    )
