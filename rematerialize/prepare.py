"""From a model and a call to a step that can be planned for any budget and then emitted."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rematerialize import torch_private as private
from rematerialize.budget import device_bytes
from rematerialize.capture import (
    CapturedStep,
    FlatInputs,
    KernelGraph,
    capture,
    flatten_inputs,
    group_kernels,
    lower,
    normalize,
)
from rematerialize.capture.generators import StateMoved
from rematerialize.capture.lower import KernelCost
from rematerialize.capture.masks import draw_bytes, saved_bytes, with_byte_masks
from rematerialize.capture.past import without_past
from rematerialize.cost import AnalyticCostModel
from rematerialize.cost_cache import CostCache, device_name
from rematerialize.device_table import DEVICES, DeviceSpec
from rematerialize.drivers import planned_forward, refuse_drivers
from rematerialize.emit import emit
from rematerialize.errors import CaptureError, PlanMismatchError, RematerializeError, did_you_mean
from rematerialize.ir import TrainingGraph
from rematerialize.measure import CostModel
from rematerialize.runtime import TrainingStep, needed_outputs
from rematerialize.schedule import Schedule
from rematerialize.signature import signature
from rematerialize.simulate import simulate
from rematerialize.solve import Planner, solvers
from rematerialize.views import view_kernels, with_views

Progress = Callable[[str, int, int], None]
"""Called with a stage ("capture", "costs", "solve"), how much of it is done, and how much there is."""

_log = logging.getLogger("rematerialize")

# Costs are measured with the generators' states put back after each op: that would disturb a trace, and noise a cost.
_ONE_AT_A_TIME = threading.RLock()
_TRIES = 3

# The finer variant must save this share of the step: only the whole one has eager's bits.
_BITS_WORTH = 0.05
_MASKS_WORTH = 0.02  # of what storing everything takes: what masks of bytes must save to be searched, too


@functools.lru_cache(maxsize=1)
def shared_costs() -> CostModel:
    """The process's cost model: what has been measured once is the same for every plan after it."""
    return CostModel()


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """How a step is costed and searched.

    Attributes
    ----------
    solver : str
    time_limit_s : float, optional
        Safety limit on the search.
    device : DeviceSpec, optional
        Compute costs for this device instead of measuring them here.
    costs : CostModel, optional
        Instead of the process's own.
    progress : Progress, optional

    Raises
    ------
    RematerializeError
        For a solver that isn't there.
    """

    solver: str = "auto"
    time_limit_s: float | None = None
    device: DeviceSpec | None = None
    costs: CostModel | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        known = ["auto", *solvers()]
        if self.solver not in known:
            near = did_you_mean(self.solver, known)
            raise RematerializeError(f"unknown solver {self.solver!r}: expected one of {', '.join(known)}{near}")

    def tell(self, stage: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(stage, done, total)


def home_of(model: nn.Module) -> torch.device:
    """The device of a model's first tensor."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@dataclass(slots=True)
class PreparedStep:
    """One training step of one model for one input signature: captured, costed, ready to plan.

    Attributes
    ----------
    captured : CapturedStep
    kernels : KernelGraph
    costs : mapping of str to KernelCost
        By kernel name.
    graph : TrainingGraph
    planner : Planner
        Its search is shared by all budgets.
    resident_bytes : int
        Parameters, buffers, inputs, and gradients that exist already.
    capture_s, cost_s : float
        Seconds spent on tracing, and on measuring costs.
    device_bytes : int
        Memory of the device that the plan is for.
    analytic : bool
        Whether costs are computed, for a device that needn't be here, rather than measured.
    device_name : str
    model, key
        What was captured, and the input signature for which.
    masked : PreparedStep, optional
        The same step with its random masks drawn as bytes, which cost less memory to keep and time to read.
    finer : PreparedStep, optional
        The same step with its fused recurrences split over time: lower peaks, equal up to rounding.
    """

    captured: CapturedStep
    kernels: KernelGraph
    costs: Mapping[str, KernelCost]
    graph: TrainingGraph
    planner: Planner
    resident_bytes: int
    capture_s: float
    cost_s: float
    device_bytes: int
    analytic: bool
    device_name: str
    model: nn.Module
    key: Hashable
    masked: PreparedStep | None = None
    finer: PreparedStep | None = None

    def variants(self) -> tuple[PreparedStep, ...]:
        """Return this step, and those that compute the same in another way."""
        return tuple(variant for variant in self.ways() if variant is not None)

    def ways(self) -> tuple[PreparedStep, PreparedStep | None, PreparedStep | None]:
        """Return the same by position, None for what this step has not: of two batches, equal places are equal ways."""
        return self, self.masked, self.finer

    def minimum(self) -> int:
        """The smallest activation budget that works, in bytes."""
        return min(variant.planner.minimum() for variant in self.variants())

    def solve(self, budget_bytes: int) -> tuple[PreparedStep, Schedule]:
        """The fastest schedule within a budget, and the variant that it belongs to.

        Raises
        ------
        BudgetError
            When ``budget_bytes < minimum()``.
        """
        exact = [one for one in (self, self.masked) if one is not None and one.planner.minimum() <= budget_bytes]
        found = [(one, one.planner.solve(budget_bytes)) for one in exact]
        best = min(found, key=lambda pair: pair[1].time_s, default=None)
        if self.finer is None or self.finer.planner.minimum() > budget_bytes:
            return best or (self, self.planner.solve(budget_bytes))
        fine = self.finer.planner.solve(budget_bytes)
        if best is not None and best[1].time_s <= fine.time_s + _BITS_WORTH * self.planner.store_all().time_s:
            return best
        return self.finer, fine

    def full_checkpointing(self) -> Schedule:
        """What checkpointing every block needs: the plan with the least memory that recomputes whole blocks once."""
        planner = Planner(self.graph, solver="blocks")
        return planner.solve(planner.minimum())

    def build(self, schedule: Schedule) -> TrainingStep:
        """Judge a schedule by the simulator, then emit it.

        Raises
        ------
        ScheduleError
            If it isn't valid for this step's graph.
        """
        simulate(self.graph, schedule.forward, schedule.backward)
        return TrainingStep(self.captured, emit(self.kernels, schedule, needed_outputs(self.captured.joint)))


def prepare(
    model: nn.Module,
    forward: Callable[..., Any],
    inputs: FlatInputs,
    options: PrepareOptions | None = None,
) -> PreparedStep:
    """Capture a step, measure its costs and set up its planner. Changes nothing that the user can see."""
    options = options or PrepareOptions()
    refuse_drivers(model)  # once more: it may have been sharded since it was wrapped
    with _ONE_AT_A_TIME:
        whole = _prepare(model, forward, inputs, False, options)
        if saved_bytes(whole.kernels) > _MASKS_WORTH * whole.planner.store_all().peak_bytes:
            whole.masked = byte_masks(whole, options)
        if whole.captured.splittable:
            whole.finer = _prepare(model, forward, inputs, True, options)
    return whole


def byte_masks(whole: PreparedStep, options: PrepareOptions) -> PreparedStep:
    """A step with its random masks drawn as bytes; measures what the calls cost that it has instead.

    Both ways draw alike, so a mask takes no less time in two calls than in one, whatever each was measured to take:
    noise would make the one step look faster than the other where everything is stored.
    """
    start = time.perf_counter()
    kernels = group_kernels(with_byte_masks(whole.kernels.normal))
    costs = dict(_costs(kernels, replace(options, progress=None)))
    for kernel in kernels.kernels:
        if kernel.calls and kernel.head.target is draw_bytes:
            at_once = whole.costs[whole.kernels.makers[kernel.head.meta["mask"]].name]
            (cast,) = kernel.head.users
            least_s = at_once.time_s - costs[kernels.makers[cast].name].time_s
            costs[kernel.name] = replace(costs[kernel.name], time_s=max(costs[kernel.name].time_s, least_s))
    graph = _lowered(whole.model, whole.captured, kernels, costs)
    planner = Planner(graph, solver=options.solver, time_limit_s=options.time_limit_s)
    took_s = time.perf_counter() - start
    return replace(whole, kernels=kernels, costs=costs, graph=graph, planner=planner, cost_s=took_s)


def _lowered(
    model: nn.Module, captured: CapturedStep, kernels: KernelGraph, costs: Mapping[str, KernelCost]
) -> TrainingGraph:
    return lower(
        kernels,
        costs,
        module_names={module: name for name, module in model.named_modules()},
        primal_names=captured.primal_names(),
    )


def prepare_example(
    model: nn.Module,
    example_inputs: Any,
    *,
    device: str | None = None,
    solver: str = "auto",
    time_limit_s: float | None = None,
    cost_cache: str | Path | None = None,
    progress: Progress | None = None,
) -> PreparedStep:
    """Check a model and its example inputs, then prepare the step; the arguments are those of ``api.plan``."""
    spec = DEVICES.get(device) if device is not None else None
    checked = check_model(model, None if spec else device)
    inputs = bind_inputs(checked.forward, example_inputs)
    costs = None if cost_cache is None else CostModel(cache=CostCache(Path(cost_cache)))
    options = PrepareOptions(solver, time_limit_s, spec, costs, progress)
    return prepare(checked, checked.forward, inputs, options)


def _prepare(
    model: nn.Module,
    forward: Callable[..., Any],
    inputs: FlatInputs,
    split_recurrences: bool,
    options: PrepareOptions,
) -> PreparedStep:
    start = time.perf_counter()
    options.tell("capture", 0, 1)
    captured = _captured(model, forward, inputs, split_recurrences)
    kernels = group_captured(captured)
    captured_at = time.perf_counter()
    options.tell("capture", 1, 1)
    costs = _costs(kernels, options)
    graph = _lowered(model, captured, kernels, costs)
    costed_at = time.perf_counter()
    _log.info(
        "captured %d ops in %.2f s, measured their costs in %.2f s",
        len(graph.ops),
        captured_at - start,
        costed_at - captured_at,
    )
    tensors = [slot.read() for slot in captured.slots] + list(inputs.tensors)
    gradients = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return PreparedStep(
        captured=captured,
        kernels=kernels,
        costs=costs,
        graph=graph,
        planner=Planner(graph, solver=options.solver, time_limit_s=options.time_limit_s),
        resident_bytes=_storage_bytes([*tensors, *gradients]),
        capture_s=captured_at - start,
        cost_s=costed_at - captured_at,
        device_bytes=options.device.memory_bytes if options.device else device_bytes(home_of(model)),
        analytic=options.device is not None,
        device_name=options.device.name if options.device else device_name(home_of(model)),
        model=model,
        key=signature(model, inputs),
    )


def _captured(
    model: nn.Module, forward: Callable[..., Any], inputs: FlatInputs, split_recurrences: bool
) -> CapturedStep:
    """Capture; once more where another thread may have set the state of the generators that all threads share."""
    for _ in range(_TRIES - 1):
        try:
            return capture(model, forward, inputs, split_recurrences=split_recurrences)
        except StateMoved:
            if threading.active_count() == 1:
                raise
    return capture(model, forward, inputs, split_recurrences=split_recurrences)


def _costs(kernels: KernelGraph, options: PrepareOptions) -> Mapping[str, KernelCost]:
    if options.device is not None:
        return AnalyticCostModel(options.device)(kernels.kernels)
    try:
        measured = options.costs or shared_costs()
        views = view_kernels(kernels)
        in_turn = [each for kernel in kernels.kernels for each in (*views[kernel.name], kernel)]
        return with_views(measured(in_turn, lambda done, total: options.tell("costs", done, total)), views)
    except torch.OutOfMemoryError as error:
        error.add_note(
            "This happened while rematerialize measured what the ops of a training step cost, one at a time: the "
            "largest of them alone doesn't fit beside what is held. The model is as it was: free memory or make the "
            "batch smaller, then call it again."
        )
        raise


def group_captured(captured: CapturedStep) -> KernelGraph:
    """Normalize and group.

    Raises
    ------
    CaptureError
        For what neither knows.
    """
    try:
        return group_kernels(normalize(captured.joint))
    except NotImplementedError as error:
        text = " ".join(str(error).split())
        raise CaptureError(
            f"the step holds a value that can't be planned ({type(error).__name__}: {text[:200]}): leave what makes it "
            "out of the wrapped module"
        ) from error


def _storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors, fake ones among them."""
    return sum({private.storage_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


def bind_inputs(forward: Callable[..., Any], example_inputs: Any) -> FlatInputs:
    """Check example inputs (a tuple of arguments or a dict of keyword arguments) and flatten them.

    Raises
    ------
    RematerializeError
        If they are neither.
    CaptureError
        If the forward's signature doesn't take them.
    """
    if isinstance(example_inputs, tuple):
        args, kwargs = example_inputs, {}
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    else:
        raise RematerializeError(
            f"example inputs must be a tuple of arguments or a dict of keyword arguments, got "
            f"{type(example_inputs).__name__}: for one argument write (x,)"
        )
    try:
        inspect.signature(forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"the example inputs don't match the forward: {error}") from None
    except ValueError:
        pass  # a forward without a readable signature: the trace will tell
    return flatten_inputs(args, without_past(forward, args, kwargs))


def check_model(model: object, device: str | None = None) -> nn.Module:
    """The checks that need no trace: it is a module, not wrapped, in training mode, on one present device."""
    refuse_drivers(model)
    if not isinstance(model, nn.Module):
        what = "its class: create an instance first" if isinstance(model, type) else type(model).__name__
        if inspect.isroutine(model):
            what += ": make a module whose forward calls it, with what it trains as parameters"
        raise RematerializeError(f"expected an nn.Module (torch.nn.Module instance), got {what}")
    for name, module in model.named_modules():
        if planned_forward(module) is not None:
            part = f"its part {name!r} is" if name else "it is"
            raise RematerializeError(
                f"this model is already wrapped ({part} rematerialized): call rematerialize.unwrap first"
            )
    lazy = next((name for name, one in model.named_parameters() if nn.parameter.is_lazy(one)), None)
    if lazy is not None:
        raise RematerializeError(
            f"{lazy!r} has no shape before the model has run (a Lazy layer's): call the model once, under "
            "torch.no_grad(), before it is wrapped or planned"
        )
    if not model.training:
        raise RematerializeError("the model is in eval mode, where nothing is kept: call model.train() first")
    if device is not None:
        _check_device(model, _torch_device(device))
    return model


def _torch_device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        close = difflib.get_close_matches(name, ["cpu", "cuda", *DEVICES], 1, 0.3)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RematerializeError(
            f"unknown device {name!r}: expected cpu, cuda, or one of {', '.join(DEVICES)}{hint}"
        ) from None


def _check_device(model: nn.Module, device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RematerializeError(
            "CUDA was asked for, but torch finds no CUDA device here: plan on the machine that has one"
        )
    homes = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if homes and homes != {device.type}:
        raise RematerializeError(
            f"the model is on {', '.join(sorted(homes))}, not on {device}: move it with model.to({str(device)!r})"
        )


def matching_variant(prepared: PreparedStep, planned: TrainingGraph) -> PreparedStep:
    """The variant of a step that a plan was made for.

    Raises
    ------
    PlanMismatchError
        If none has the plan's structure and sizes.
    """
    for variant in prepared.variants():
        if _structure(variant.graph) == _structure(planned):
            return variant
    graph = prepared.graph
    reason = f"it has {len(planned.ops)} ops, this model's step has {len(graph.ops)}"
    if len(planned.ops) == len(graph.ops):
        pairs = zip(graph.ops, planned.ops, strict=True)
        here = next((f"{a.name} ({a.source})" for a, b in pairs if (a.name, a.target) != (b.name, b.target)), "")
        reason = f"they differ at {here}" if here else "the sizes of their tensors differ"
    raise PlanMismatchError(
        f"this plan belongs to another model, input shape or torch version: {reason}; make a new plan"
    )


def _structure(graph: TrainingGraph) -> Hashable:
    """What a schedule depends on: everything but costs and source lines."""
    ops = tuple((op.name, op.phase, op.inputs, op.outputs, op.recomputable, op.target) for op in graph.ops)
    ends = (frozenset(graph.resident), graph.tangents, graph.outputs, graph.gradients)
    return (ops, frozenset(graph.storages.items()), ends)
