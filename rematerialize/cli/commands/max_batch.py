"""``max-batch``: the largest batch that fits, with everything stored and with a plan."""

from __future__ import annotations

from typing import Annotated

import typer

from rematerialize.cli.app import command
from rematerialize.cli.console import Console
from rematerialize.cli.errors import NOTHING_FITS
from rematerialize.cli.options import (
    ActivationBudgetOption,
    BudgetOption,
    CostCacheOption,
    DeviceOption,
    DtypeOption,
    OptimizerOption,
    ReserveOption,
    SpecOption,
    TargetArgument,
    check_besides,
    check_budgets,
)
from rematerialize.cli.session import open_session, user_output
from rematerialize.units import parse_overhead


@command
def max_batch(
    console: Console,
    target: TargetArgument,
    inputs: SpecOption = None,
    budget: BudgetOption = None,
    activation_budget: ActivationBudgetOption = None,
    batch_dim: Annotated[int, typer.Option("--batch-dim", metavar="N", help="Which dimension is the batch.")] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    optimizer: OptimizerOption = None,
    reserve: ReserveOption = None,
    max_overhead: Annotated[
        str | None,
        typer.Option("--max-overhead", metavar="SHARE", help="Also the largest that recomputes no more: 25%."),
    ] = None,
    confirm: Annotated[
        bool, typer.Option("--confirm/--no-confirm", help="Run one real step at the answer, where the device is here.")
    ] = True,
    cost_cache: CostCacheOption = None,
) -> None:
    """Find the largest batch that fits the budget, without a plan and with one; exits with 3 if not even 1 fits."""
    check_budgets(budget, activation_budget)
    check_besides(activation_budget, reserve, optimizer)
    if max_overhead is not None:
        parse_overhead(max_overhead, name="--max-overhead")
    session = open_session(console, target, inputs, dtype=dtype, device=device, cost_cache=cost_cache)
    with user_output():
        from rematerialize.batches import max_batch as find

        found = find(
            session.target.model,
            session.target.inputs,
            budget=budget,
            activation_budget=activation_budget,
            batch_dim=batch_dim,
            reserve=reserve or 0,
            optimizer=optimizer,
            device=session.device,
            confirm=confirm,
            max_overhead=max_overhead,
            cost_cache=session.options["cost_cache"],
            tell=console.progress,
        )
    if console.as_json:
        console.data("max-batch", {"target": target, **found.to_dict()})
    else:
        console.pairs(f"Largest batch of {target}", found.rows(console.size))
    if not found.with_plan:
        raise typer.Exit(NOTHING_FITS)
