"""``plan``: what a model's step needs under a budget, and what is kept and recomputed for it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rematerialize.cli.app import command
from rematerialize.cli.console import Console
from rematerialize.cli.options import (
    ActivationBudgetOption,
    BudgetOption,
    CostCacheOption,
    DepthOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    OptimizerOption,
    OutputOption,
    ReserveOption,
    SpecOption,
    TargetArgument,
    check_besides,
    check_budgets,
)
from rematerialize.cli.session import Session, open_session, user_output
from rematerialize.units import format_percent, format_seconds

if TYPE_CHECKING:
    from rematerialize.budget import BudgetRequest
    from rematerialize.plans import Plan


@command
def plan(
    console: Console,
    target: TargetArgument,
    inputs: SpecOption = None,
    budget: BudgetOption = None,
    activation_budget: ActivationBudgetOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    optimizer: OptimizerOption = None,
    reserve: ReserveOption = None,
    output: OutputOption = None,
    graph_file: Annotated[
        Path | None, typer.Option("--graph", metavar="PATH", help="Also write the graph, for `solve`.")
    ] = None,
    force: ForceOption = False,
    depth: DepthOption = 1,
    cost_cache: CostCacheOption = None,
) -> None:
    """Plan a step under a budget: its peak and overhead beside storing everything and recomputing whole blocks."""
    check_budgets(budget, activation_budget)
    check_besides(activation_budget, reserve, optimizer)
    console.check_output(output, force=force)
    console.check_output(graph_file, force=force)
    session = open_session(console, target, inputs, dtype=dtype, device=device, cost_cache=cost_cache)
    start_s = time.perf_counter()
    with user_output():
        from rematerialize import api

        made = api.plan(
            session.target.model,
            session.target.inputs,
            budget=budget,
            activation_budget=activation_budget,
            optimizer=optimizer,
            reserve=reserve or 0,
            **session.options,
        )
    console.progress(f"planned in {format_seconds(time.perf_counter() - start_s)}")
    if output is not None:
        made.save(output)
        console.progress(f"wrote {output}")
    if graph_file is not None:
        console.write(graph_file, made.graph.to_json())
    if console.as_json:
        console.data("plan", made.to_dict())
        return
    from rematerialize.budget import read_budget

    request = read_budget(budget, activation_budget, reserve or 0, optimizer, session.target.model)
    _print(console, session, made, request, depth)


def _print(console: Console, session: Session, made: Plan, request: BudgetRequest, depth: int) -> None:
    assert made.prepared is not None
    full = made.prepared.full_checkpointing()
    stored_s, stored = made.store_all_time_s, made.store_all_peak_bytes

    def row(name: str, peak: int, time_s: float) -> tuple[str, ...]:
        return (
            name,
            console.size(peak),
            format_percent(peak / max(stored, 1)),
            console.size(peak + made.resident_bytes),
            format_percent(time_s / stored_s - 1 if stored_s else 0.0),
        )

    console.table(
        f"Training step of {session.target.name}",
        ("", "activations", "of store-all", "with residents", "overhead"),
        [
            row("store all", stored, stored_s),
            row("recompute whole blocks", full.peak_bytes, full.time_s),
            row("this plan", made.peak_bytes, made.schedule.time_s),
        ],
        styles=["", "", "green"],
    )
    print()
    console.pairs(
        "Plan",
        [
            *_budget_rows(console, made, request),
            ("smallest that works", console.size(made.minimum_bytes)),
            *([("resident besides", console.size(made.resident_bytes))] if request.budget is None else []),
            ("gap to lower bound", "unknown" if made.gap is None else format_percent(made.gap)),
            ("recomputed ops", f"{made.recomputed} of {len(made.graph.ops)}"),
            ("solver", made.schedule.solver),
            ("costs", session.costs),
        ],
    )
    print()
    explained = made.explain(depth)
    console.table("What is kept for the backward", explained.headers, explained.rows(console.size))


def _budget_rows(console: Console, made: Plan, request: BudgetRequest) -> list[tuple[str, str]]:
    """What was asked for, in the scope in which it was, and what of it is left for activations."""
    left = ("activation budget", console.size(made.budget_bytes))
    if request.budget is None:
        return [left]
    whole = console.size(made.budget_bytes + made.resident_bytes + request.reserve_bytes)
    rows = [("budget", whole if request.budget.size_bytes else f"{request.budget}: {whole}")]
    rows.append(("  resident in it", console.size(made.resident_bytes)))
    if request.reserve_bytes:
        rows.append(("  reserved in it", console.size(request.reserve_bytes)))
    return [*rows, left]
