"""``plan``: what a model's step needs under a budget, and what is kept and recomputed for it."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from rematerialize.cli.app import command
from rematerialize.cli.console import Console
from rematerialize.cli.options import (
    ActivationBudgetOption,
    BudgetOption,
    ForceOption,
    OutputOption,
    TargetArgument,
    check_budgets,
)
from rematerialize.cli.targets import load_target
from rematerialize.units import format_seconds


@command
def plan(
    console: Console,
    target: TargetArgument,
    budget: BudgetOption = None,
    activation_budget: ActivationBudgetOption = None,
    output: OutputOption = None,
    force: ForceOption = False,
    graph_file: Annotated[
        Path | None, typer.Option("--graph", metavar="PATH", help="Also write the graph, for `solve`.")
    ] = None,
) -> None:
    """Capture a model's training step and say what it needs under a budget."""
    check_budgets(budget, activation_budget)
    console.check_output(output, force=force)
    console.check_output(graph_file, force=force)
    made_of = load_target(target)
    console.progress(f"capturing and planning {target}")
    start_s = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # a model that prints must not mix with our data
        from rematerialize import api

        made = api.plan(made_of.model, made_of.inputs, budget=budget, activation_budget=activation_budget)
    console.progress(f"planned in {format_seconds(time.perf_counter() - start_s)}")
    if output is not None:
        made.save(output)
    if graph_file is not None:
        graph_file.write_text(made.graph.to_json() + "\n", encoding="utf-8")
    print(json.dumps(made.to_dict()) if console.as_json else made)
