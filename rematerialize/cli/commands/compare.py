"""``compare``: store-all, per-block checkpointing, torch's budget and ours, measured side by side."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from rematerialize.cli.app import command
from rematerialize.cli.console import Console
from rematerialize.cli.errors import UsageError
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
from rematerialize.cli.targets import check_target, load_target
from rematerialize.units import format_percent, format_seconds

if TYPE_CHECKING:
    from rematerialize.compare import Cell

_HEADERS = ("contestant", "peak", "of store-all", "step", "over store-all", "result", "")


@command
def compare(
    console: Console,
    target: TargetArgument,
    budget: BudgetOption = None,
    activation_budget: ActivationBudgetOption = None,
    inputs: SpecOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    optimizer: OptimizerOption = None,
    reserve: ReserveOption = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Timed rounds.")] = 5,
    cost_cache: CostCacheOption = None,
) -> None:
    """Measure a target's step as it is, checkpointed per block, under torch's own budget, and under ours.

    Without a budget: ours at half of store-all's peak, at per block's peak, and at the least that works.
    """
    check_budgets(budget, activation_budget, required=False)
    check_besides(activation_budget, reserve, optimizer)
    if budget is None and (reserve is not None or optimizer is not None):
        raise UsageError("--optimizer and --reserve count in a --budget, got none: give one, or leave them out")
    check_target(target, inputs, dtype)
    session = open_session(console, target, inputs, dtype=dtype, device=device, cost_cache=cost_cache, steps="compare")
    with user_output():
        from rematerialize import compare as contest
        from rematerialize.budget import read_budget

        asked = budget or activation_budget
        request = (
            read_budget(budget, activation_budget, reserve or 0, optimizer, session.target.model) if asked else None
        )
        requests = [(asked, request)] if asked and request else []
        cells = contest.compare(
            session.target,
            lambda per_block: load_target(target, inputs, dtype=dtype, device=device, per_block=per_block),
            requests,
            rounds=rounds,
            cost_cache=session.options["cost_cache"],
            say=lambda cell: console.progress(f"{cell.name}: {cell.status}"),
        )
    if console.as_json:
        console.data("comparison", {"target": target, "rounds": rounds, "cells": [asdict(cell) for cell in cells]})
        return
    rows = [_row(console, cell, cells[0]) for cell in cells]
    styles = ["" if cell.status == "ok" else "red" for cell in cells]
    console.table(f"One step of {target}", _HEADERS, rows, "<>>>><<", styles=styles)


def _row(console: Console, cell: Cell, store_all: Cell) -> list[str]:
    """A contestant's line; figures of a step that isn't eager's are marked, since they can't be compared."""
    mark = "" if cell.status == "ok" else "!"
    figures = ["-"] * 4
    if cell.peak_bytes is not None and cell.step_s is not None and cell.ratio is not None:
        share = cell.peak_bytes / max(store_all.peak_bytes or 0, 1)
        texts = (console.size(cell.peak_bytes), format_percent(share), format_seconds(cell.step_s), f"{cell.ratio:.2f}")
        figures = [mark + text for text in texts]
    return [cell.name, *figures, cell.status, cell.detail]
