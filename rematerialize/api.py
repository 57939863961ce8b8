"""The public interface: ``wrap`` does, ``plan`` explains, ``frontier`` shows the choice.

Every schedule is replayed by the simulator before it is emitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rematerialize.budget import BudgetRequest, free_bytes, read_budget
from rematerialize.capture import FlatInputs
from rematerialize.drivers import planned_forward
from rematerialize.errors import BudgetError, RematerializeError
from rematerialize.plans import Plan, Scope, below_minimum
from rematerialize.prepare import (
    PreparedStep,
    PrepareOptions,
    Progress,
    bind_inputs,
    check_model,
    home_of,
    matching_variant,
    prepare,
    prepare_example,
)
from rematerialize.report.origin import Origin
from rematerialize.runtime import TrainingStep
from rematerialize.signature import signature
from rematerialize.wrapper import RematerializedForward

__all__ = ["Plan", "frontier", "plan", "plans_of", "unwrap", "wrap"]


def plan(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    *,
    budget: int | str | None = None,
    activation_budget: int | str | None = None,
    reserve: int | str = 0,
    optimizer: torch.optim.Optimizer | str | None = None,
    device: str | None = None,
    solver: str = "auto",
    time_limit_s: float | None = None,
    cost_cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan one training step under a memory budget, without running or changing anything.

    Parameters
    ----------
    model : nn.Module
        In training mode.
    example_inputs : tuple or dict
        Positional arguments, or keyword arguments, of one forward call.
    budget : int or str, optional
        Peak of everything that a step holds on the device: parameters, buffers, gradients, inputs, activations,
        workspace, plus ``reserve`` and the optimizer's state. Bytes, "8GiB" (2**30), "8GB" (10**9), "80%" of the
        device's memory, or "auto" (what is free).
    activation_budget : int or str, optional
        Peak of what the step allocates above what was resident when it began, gradients included. Bytes, a size,
        or "30%" of store-all's. Give one of the two budgets.
    reserve : int or str
        Bytes, under ``budget``, for what the pass can't see.
    optimizer : torch.optim.Optimizer or str, optional
        Count its state under ``budget``; a name such as "adamw" means its default options.
    device : str, optional
        Where the model is expected to be ("cpu", "cuda"), or a device of ``rematerialize.device_table.DEVICES`` such as
        "NVIDIA H100 80GB": then costs are computed, and nothing is run.
    solver : str
        A name from ``rematerialize.solve.solvers()``, or "auto" for all of them.
    time_limit_s : float, optional
        Safety limit on the search.
    cost_cache : str or Path, optional
        A folder in which measured costs are kept for other processes.
    progress : callable, optional
        Called as ``progress(stage, done, total)``; stages are "capture", "costs" and "solve".

    Returns
    -------
    Plan
        ``print(plan)`` is an aligned table.

    Raises
    ------
    BudgetError
        If nothing fits; its ``minimum_bytes``, in the scope of the budget given, works.
    CaptureError
        If the step can't be captured.
    UnitError, RematerializeError
        For arguments that can't be read or used.
    """
    tell = progress or (lambda stage, done, total: None)
    _check_scope(activation_budget, reserve, optimizer)
    request = read_budget(budget, activation_budget, reserve, optimizer, check_model(model))
    prepared = prepare_example(
        model,
        example_inputs,
        device=device,
        solver=solver,
        time_limit_s=time_limit_s,
        cost_cache=cost_cache,
        progress=progress,
    )
    tell("solve", 0, 1)
    made = choose(model, prepared, request)
    tell("solve", 1, 1)
    return made


def _check_scope(activation_budget: object, reserve: object, optimizer: object) -> None:
    if activation_budget is not None and (reserve or optimizer is not None):
        raise RematerializeError(
            "reserve and optimizer are parts of budget=, which counts everything; activation_budget= is for what a "
            "step allocates, so leave them out"
        )


def choose(model: nn.Module, prepared: PreparedStep, request: BudgetRequest, *, search: bool = True) -> Plan:
    """The plan for a prepared step under a requested budget; raises BudgetError in the request's scope.

    Without ``search``, none where storing everything fits: the plan finds the smallest budget when it is asked.
    """
    start = time.perf_counter()
    store_all = prepared.planner.store_all()
    whole = prepared.device_bytes
    if request.is_auto and not prepared.analytic:
        whole = free_bytes(home_of(model)) + prepared.resident_bytes
    asked = request.activation_bytes(store_all.peak_bytes, prepared.resident_bytes, whole)
    minimum, variant, schedule = None, prepared, store_all
    if search or asked < store_all.peak_bytes:
        minimum = prepared.minimum()
        try:
            variant, schedule = prepared.solve(asked)
        except BudgetError:
            if request.activation_budget is not None:
                given, stored = str(request.activation_budget), store_all.peak_bytes
                scope = Scope("an activation budget", given, stored, "store-all's")
                raise below_minimum(asked, minimum, scope) from None
            besides = prepared.resident_bytes + request.reserve_bytes
            scope = Scope("a budget", str(request.budget), whole, "the device's memory")
            raise below_minimum(asked + besides, minimum + besides, scope) from None
    return Plan(
        graph=variant.graph,
        schedule=schedule,
        budget_bytes=asked,
        store_all_peak_bytes=store_all.peak_bytes,
        store_all_time_s=store_all.time_s,
        searched_minimum_bytes=minimum,
        resident_bytes=prepared.resident_bytes,
        plan_s=time.perf_counter() - start,
        prepared=variant,
        origin=_origin(model, prepared, request),
    )


def _origin(model: nn.Module, prepared: PreparedStep, request: BudgetRequest) -> Origin:
    """What readers are told of a plan; a command line puts the target in the place of the class."""
    asked = request.budget or request.activation_budget
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return Origin(
        target=type(model).__name__,
        dtype=", ".join(sorted(dtypes)),
        device=prepared.device_name,
        computed=prepared.analytic,
        asked=str(asked),
        whole=request.budget is not None,
        reserve_bytes=request.reserve_bytes if request.budget is not None else 0,
    )


def frontier(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    *,
    points: int = 12,
    device: str | None = None,
    solver: str = "auto",
    time_limit_s: float | None = None,
    cost_cache: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, ...]:
    """Plans from store-all's peak down to the smallest budget: the budget / overhead curve.

    Parameters
    ----------
    points : int
        At most so many plans; budgets fall, overheads rise.

    The other parameters and errors are those of `plan`.
    """
    if not isinstance(points, int) or isinstance(points, bool) or points < 2:
        raise RematerializeError(f"points must be an int of at least 2, got {points!r}")
    prepared = prepare_example(
        model,
        example_inputs,
        device=device,
        solver=solver,
        time_limit_s=time_limit_s,
        cost_cache=cost_cache,
        progress=progress,
    )
    tell = progress or (lambda stage, done, total: None)
    high, low = prepared.planner.store_all().peak_bytes, prepared.minimum()
    found: list[Plan] = []
    for rank in range(points):
        budget_bytes = high - (high - low) * rank // (points - 1)
        tell("solve", rank, points)
        made = choose(model, prepared, read_budget(None, budget_bytes))
        if not found or made.peak_bytes < found[-1].peak_bytes:
            found.append(replace(made, origin=replace(made.origin, asked="")))  # nobody asked for these budgets
    tell("solve", points, points)
    return tuple(found)


def wrap(
    model: nn.Module,
    budget: int | str | None = None,
    *,
    activation_budget: int | str | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    plan: Plan | None = None,
    reserve: int | str = 0,
    optimizer: torch.optim.Optimizer | str | None = None,
    device: str | None = None,
    solver: str = "auto",
    time_limit_s: float | None = None,
    max_plans: int = 8,
) -> nn.Module:
    """Make a model train within a memory budget, with the same gradients.

    The model itself is returned: same class, parameters, ``state_dict`` and modules; only its ``forward`` is
    replaced, until `unwrap`. In training mode with gradients enabled a call runs the planned step; in eval mode
    or under ``no_grad`` it runs the original forward. A new input signature is planned at its first call.

    Parameters
    ----------
    model : nn.Module
        In training mode.
    budget : int or str, optional
        Peak of everything that a step holds on the device: parameters, buffers, gradients, inputs, activations,
        workspace, ``reserve``, optimizer state. Bytes, "8GiB", "80%" of the device's memory, or "auto" (what is free).
    activation_budget : int or str, optional
        Instead: peak of what a step allocates above what was there when it began. Bytes, "2GiB", or "30%" of what
        storing everything takes.
    example_inputs : tuple or dict, optional
        Plan now for these inputs, rather than at the first training call.
    plan : Plan, optional
        Use this plan (for the signature that it fits) instead of a budget.
    reserve : int or str
        Part of ``budget`` that is left free for what the pass can't see: bytes, or a size.
    optimizer : torch.optim.Optimizer or str, optional
        Its state is a part of ``budget``, too; a name such as "adamw" means its default options.
    device : str, optional
        Where the model is expected to be, "cpu" or "cuda": another place is an error.
    solver : str
        A name from ``rematerialize.solve.solvers()``, or "auto" for all of them.
    time_limit_s : float, optional
        Seconds after which a search ends with the best that it has found.
    max_plans : int
        How many input signatures to keep plans for; the least recently used goes first.

    Raises
    ------
    BudgetError, CaptureError
        As `plan`, at the call that plans.
    PlanMismatchError
        If ``plan`` belongs to another model.
    UnitError, RematerializeError
        For arguments that can't be read or used, a model already wrapped among them.
    """
    if plan is not None and (budget is not None or activation_budget is not None):
        raise RematerializeError("got both a plan and a budget: the plan has its own")
    checked = check_model(model, device)
    options = PrepareOptions(solver, time_limit_s)
    _check_scope(activation_budget, reserve, optimizer)
    if plan is None:
        request = read_budget(budget, activation_budget, reserve, optimizer, checked)
    else:
        request = read_budget(None, plan.budget_bytes)
    rematerialized = RematerializedForward(checked, _planned(request, plan, options), max_plans=max_plans)
    if example_inputs is not None:
        rematerialized.plan_for(bind_inputs(checked.forward, example_inputs))
    checked.forward = rematerialized
    return checked


class _planned:
    """How a wrapped model plans a signature: by budget, or by a given plan when its step is the same."""

    def __init__(self, request: BudgetRequest, given: Plan | None, options: PrepareOptions) -> None:
        self.request = request
        self.given = given
        self.options = options
        self.prepared = None if given is None else given.prepared
        self.held_then = 0
        self.granted_bytes = 0  # the most that a plan of a share of store-all's was given

    def held_bytes(self, model: nn.Module, inputs: FlatInputs) -> int:
        """Gradients in memory count under a budget; an activation budget is for what the step adds to them."""
        if self.request.budget is None:
            return 0
        leaves = [tensor for tensor in (*model.parameters(), *inputs.tensors) if tensor.is_leaf]
        return sum(leaf.grad.untyped_storage().nbytes() for leaf in leaves if leaf.grad is not None)

    def __call__(self, model: nn.Module, forward: Callable[..., Any], inputs: FlatInputs) -> tuple[Plan, TrainingStep]:
        prepared, held = self.prepared, self.held_bytes(model, inputs)
        if (
            prepared is None
            or prepared.model is not model
            or prepared.key != signature(model, inputs)
            or not prepared.captured.fits(inputs)
        ):
            prepared = prepare(model, forward, inputs, self.options)
            self.prepared, self.held_then = prepared, held
        if self.given is not None:
            return self.given, matching_variant(prepared, self.given.graph).build(self.given.schedule)
        resident = prepared.resident_bytes + held - self.held_then
        request = self._request_for(prepared)
        made = choose(model, replace(prepared, resident_bytes=resident), request, search=False)
        if self._is_share:
            self.granted_bytes = max(self.granted_bytes, made.budget_bytes)
        assert made.prepared is not None
        return made, made.prepared.build(made.schedule)

    @property
    def _is_share(self) -> bool:
        given = self.request.activation_budget
        return given is not None and given.fraction is not None

    def _request_for(self, prepared: PreparedStep) -> BudgetRequest:
        """A share of store-all's bytes is never less than what another signature got: a last smaller batch may use
        the memory that those before it used, and needs not recompute more than they do.
        """
        if not self._is_share:
            return self.request
        share_bytes = self.request.activation_bytes(prepared.planner.store_all().peak_bytes, 0, 0)
        return read_budget(None, self.granted_bytes) if share_bytes < self.granted_bytes else self.request

    def __getstate__(self) -> dict[str, Any]:
        """A prepared step holds code for this process: a copy captures again."""
        given = None if self.given is None else replace(self.given, prepared=None)
        return {**vars(self), "given": given, "prepared": None}


def unwrap(model: nn.Module) -> nn.Module:
    """Give a wrapped model its own forward back; the model is returned.

    Raises
    ------
    RematerializeError
        If it isn't wrapped, or others have put theirs around its forward since.
    """
    _forward_of(model, "there is nothing to unwrap").restore()
    return model


def plans_of(model: nn.Module) -> tuple[Plan, ...]:
    """The plans that a wrapped model keeps, one per input signature, the last used last; none before it has planned.

    Raises
    ------
    RematerializeError
        If it isn't wrapped.

    Examples
    --------
    >>> model = wrap(nn.Linear(4, 4), activation_budget="100%", example_inputs=(torch.ones(2, 4),))
    >>> [plan.recomputed for plan in plans_of(model)]
    [0]
    """
    forward = _forward_of(model, "it has no plans")
    with forward._lock:
        return tuple({id(plan): plan for entries in forward._steps.values() for plan, *_ in entries}.values())


def _forward_of(model: nn.Module, otherwise: str) -> RematerializedForward:
    forward = planned_forward(model) if isinstance(model, nn.Module) else None
    if not isinstance(forward, RematerializedForward):
        raise RematerializeError(f"this model is not wrapped, so {otherwise}")
    return forward
