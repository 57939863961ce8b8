"""``plan``: what a model's step needs under a budget, and what is kept and recomputed for it."""

from __future__ import annotations

import time
from collections.abc import Callable
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

        (made,) = session.named(
            api.plan(
                session.target.model,
                session.target.inputs,
                budget=budget,
                activation_budget=activation_budget,
                optimizer=optimizer,
                reserve=reserve or 0,
                **session.options,
            )
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
    _print(console, session, made, depth)


def _print(console: Console, session: Session, made: Plan, depth: int) -> None:
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
            *budget_rows(console.size, made),
            *([] if made.origin.whole else [("resident besides", console.size(made.resident_bytes))]),
            ("gap to lower bound", "unknown" if made.gap is None else format_percent(made.gap)),
            ("recomputed ops", f"{made.recomputed} of {len(made.graph.ops)}"),
            ("solver", made.schedule.solver),
            ("costs", session.costs),
        ],
    )
    print()
    explained = made.explain(depth)
    console.table("What is kept for the backward", explained.headers, explained.rows(console.size))


def budget_rows(size: Callable[[int], str], made: Plan) -> list[tuple[str, str]]:
    """What was asked for and the least that works, in the scope of the asking, and what of it is for activations."""
    allowed, least = made.budget_bytes, made.minimum_bytes
    if not made.origin.whole:
        return [("activation budget", size(allowed)), ("smallest that works", size(least))]
    whole, asked = size(allowed + made.besides_bytes), made.origin.asked
    rows = [("budget", f"{asked}: {whole}" if asked == "auto" or asked.endswith("%") else whole)]
    rows.append(("  resident in it", size(made.resident_bytes)))
    if made.origin.reserve_bytes:
        rows.append(("  reserved in it", size(made.origin.reserve_bytes)))
    rows.append(("  left for activations", size(allowed)))
    return [
        *rows,
        ("smallest budget that works", size(least + made.besides_bytes)),
        ("  of it for activations", size(least)),
    ]
