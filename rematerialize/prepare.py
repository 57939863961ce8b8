"""From a model and a call to a step that can be planned for any budget and then emitted."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
from rematerialize.capture.lower import KernelCost
from rematerialize.emit import emit
from rematerialize.errors import CaptureError, PlanMismatchError, RematerializeError
from rematerialize.ir import TrainingGraph
from rematerialize.measure import CostModel
from rematerialize.runtime import TrainingStep, needed_outputs
from rematerialize.schedule import Schedule
from rematerialize.signature import signature
from rematerialize.simulate import simulate
from rematerialize.solve import Planner

_log = logging.getLogger("rematerialize")

# The finer variant must save this share of the step: only the whole one has eager's bits.
_BITS_WORTH = 0.05


@functools.lru_cache(maxsize=1)
def shared_costs() -> CostModel:
    """The process's cost model: what has been measured once is the same for every plan after it."""
    return CostModel()


@dataclass(slots=True)
class PreparedStep:
    """One training step of one model for one input signature: captured, costed, ready to plan.

    Attributes
    ----------
    captured : CapturedStep
    kernels : KernelGraph
    graph : TrainingGraph
    planner : Planner
        Its search is shared by all budgets.
    resident_bytes : int
        Parameters, buffers, inputs, and gradients that exist already.
    capture_s, cost_s : float
        Seconds spent on tracing, and on measuring costs.
    model, key
        What was captured, and the input signature for which.
    finer : PreparedStep, optional
        The same step with its fused recurrences split over time: lower peaks, equal up to rounding.
    """

    captured: CapturedStep
    kernels: KernelGraph
    graph: TrainingGraph
    planner: Planner
    resident_bytes: int
    capture_s: float
    cost_s: float
    model: nn.Module
    key: Hashable
    finer: PreparedStep | None = None

    def variants(self) -> tuple[PreparedStep, ...]:
        """Return this step, and the finer one if there is one."""
        return (self,) if self.finer is None else (self, self.finer)

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
        if self.finer is None or self.finer.planner.minimum() > budget_bytes:
            return self, self.planner.solve(budget_bytes)
        fine = self.finer.planner.solve(budget_bytes)
        if self.planner.minimum() <= budget_bytes:
            whole = self.planner.solve(budget_bytes)
            if whole.time_s <= fine.time_s + _BITS_WORTH * self.planner.store_all().time_s:
                return self, whole
        return self.finer, fine

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
    *,
    solver: str = "auto",
    time_limit_s: float | None = None,
) -> PreparedStep:
    """Capture a step, measure its costs and set up its planner. Changes nothing that the user can see."""
    whole = _prepare(model, forward, inputs, False, solver, time_limit_s)
    if whole.captured.splittable:
        whole.finer = _prepare(model, forward, inputs, True, solver, time_limit_s)
    return whole


def _prepare(
    model: nn.Module,
    forward: Callable[..., Any],
    inputs: FlatInputs,
    split_recurrences: bool,
    solver: str,
    time_limit_s: float | None,
) -> PreparedStep:
    start = time.perf_counter()
    captured = capture(model, forward, inputs, split_recurrences=split_recurrences)
    kernels = group_captured(captured)
    captured_at = time.perf_counter()
    graph = lower(
        kernels,
        _costs(kernels),
        module_names={module: name for name, module in model.named_modules()},
        primal_names=captured.primal_names(),
    )
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
        graph=graph,
        planner=Planner(graph, solver=solver, time_limit_s=time_limit_s),
        resident_bytes=_storage_bytes([*tensors, *gradients]),
        capture_s=captured_at - start,
        cost_s=costed_at - captured_at,
        model=model,
        key=signature(model, inputs),
    )


def _costs(kernels: KernelGraph) -> Mapping[str, KernelCost]:
    try:
        return shared_costs()(kernels.kernels)
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
    """Bytes of the distinct storages behind some tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


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
    return flatten_inputs(args, kwargs)


def check_model(model: object, device: str | None = None) -> nn.Module:
    """The checks that need no trace: it is a module, not wrapped, in training mode, on one present device."""
    if not isinstance(model, nn.Module):
        what = "its class: create an instance first" if isinstance(model, type) else type(model).__name__
        raise RematerializeError(f"expected an nn.Module (torch.nn.Module instance), got {what}")
    for name, module in model.named_modules():
        if getattr(vars(module).get("forward"), "is_rematerialized", False):
            part = f"its part {name!r} is" if name else "it is"
            raise RematerializeError(
                f"this model is already wrapped ({part} rematerialized): call rematerialize.unwrap first"
            )
    if not model.training:
        raise RematerializeError("the model is in eval mode, where nothing is kept: call model.train() first")
    if device is not None:
        _check_device(model, torch.device(device))
    return model


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
