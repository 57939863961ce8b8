"""What a budget leaves for the step: from a device's bytes to the activation scope."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rematerialize.errors import RematerializeError, did_you_mean
from rematerialize.units import Budget, parse_budget, parse_bytes


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """The budget as the user gave it: one of the two scopes, and what the pass can't see.

    ``budget`` counts everything that a step holds on the device; ``activation_budget`` what the step allocates.
    ``reserve_bytes`` is what the pass can't see, optimizer state among it.
    """

    budget: Budget | None
    activation_budget: Budget | None
    reserve_bytes: int = 0

    def activation_bytes(self, store_all_bytes: int, resident_bytes: int, whole_bytes: int) -> int:
        """The budget in the activation scope; at most 0 when residents alone exceed it.

        Parameters
        ----------
        store_all_bytes, resident_bytes : int
        whole_bytes : int
            The device's memory, of which the budget may be a share.
        """
        if self.activation_budget is not None:
            return self.activation_budget.resolve(store_all_bytes)
        assert self.budget is not None
        return self.budget.resolve(whole_bytes) - resident_bytes - self.reserve_bytes

    @property
    def is_auto(self) -> bool:
        """Whether the budget is what is free."""
        return self.budget is not None and self.budget.is_auto


def read_budget(
    budget: Any, activation_budget: Any, reserve: Any = 0, optimizer: Any = None, model: nn.Module | None = None
) -> BudgetRequest:
    """Check the budget arguments of ``wrap`` and ``plan``; the optimizer's state joins the reserve.

    Raises
    ------
    UnitError
        If a value can't be read.
    RematerializeError
        If both budgets are given, or none.
    """
    if budget is not None and activation_budget is not None:
        raise RematerializeError(
            "got both budget (the peak of all that a step holds, parameters included) and activation_budget (of what "
            "it allocates, or a share of what storing everything takes): give one"
        )
    if budget is None and activation_budget is None:
        raise RematerializeError(
            "got no budget: give budget='8GiB' (everything that a step holds) or activation_budget='30%' "
            "(what it allocates, as a share of store-all's)"
        )
    return BudgetRequest(
        None if budget is None else parse_budget(budget, name="budget", allow_auto=True),
        None if activation_budget is None else parse_budget(activation_budget, name="activation_budget"),
        (parse_bytes(reserve, name="reserve") if reserve else 0)
        + (optimizer_bytes(optimizer, model) if optimizer is not None and model is not None else 0),
    )


def device_bytes(device: torch.device) -> int:
    """Memory of a device: the GPU's, or the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int:
    """What is free now, less a twentieth for fragmentation and for what other libraries take."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + cached) * 19 // 20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") * 19 // 20


def optimizer_bytes(optimizer: Any, model: nn.Module) -> int:
    """Bytes of state that an optimizer keeps once it has stepped.

    Parameters
    ----------
    optimizer : None, str or torch.optim.Optimizer
        A name in ``torch.optim`` ("adamw") with its default options, or an instance. The state of one that
        hasn't stepped is found by one step on the meta device, which allocates nothing.

    Raises
    ------
    RematerializeError
        For an unknown name, or an optimizer that can't step without data: give ``reserve=`` instead.
    """
    if optimizer is None:
        return 0
    if isinstance(optimizer, torch.optim.Optimizer) and optimizer.state:
        return _state_bytes(optimizer)
    if isinstance(optimizer, str):
        classes = _optimizers()
        if optimizer.lower() not in classes:
            near = did_you_mean(optimizer, classes)
            raise RematerializeError(f"unknown optimizer {optimizer!r}: expected one of {', '.join(classes)}{near}")
        kind, groups = classes[optimizer.lower()], [{"params": [p for p in model.parameters() if p.requires_grad]}]
    elif isinstance(optimizer, torch.optim.Optimizer):
        kind, groups = type(optimizer), [dict(group) for group in optimizer.param_groups]
    else:
        raise RematerializeError(f"optimizer must be a name or a torch.optim.Optimizer, got {type(optimizer).__name__}")
    try:
        rehearsal = kind([{**group, "params": [_meta(p) for p in group["params"]]} for group in groups])
        rehearsal.step()
    except Exception as error:
        raise RematerializeError(
            f"can't tell how much state {kind.__name__} keeps ({error}): give its bytes as reserve="
        ) from error
    return _state_bytes(rehearsal)


def _optimizers() -> dict[str, type[Any]]:
    """Those of ``torch.optim`` by their names in lower case."""
    return {
        name.lower(): value
        for name, value in sorted(vars(torch.optim).items())
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }


def _meta(parameter: Tensor) -> Tensor:
    stand_in = torch.empty_like(parameter, device="meta").requires_grad_()
    stand_in.grad = torch.empty_like(stand_in)
    return stand_in


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in (state.values() if isinstance(state, dict) else ())
        if isinstance(value, Tensor)
    )
