"""``verify``: loss, gradients, buffers, generator and peak of a planned step against eager's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rematerialize.cli.app import command
from rematerialize.cli.console import Console
from rematerialize.cli.errors import MISMATCH, UsageError
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
    existing_file,
)
from rematerialize.cli.session import open_session, user_output
from rematerialize.cli.targets import check_target


@command
def verify(
    console: Console,
    target: TargetArgument,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="PATH", help="A plan that was made for this target.")
    ] = None,
    budget: BudgetOption = None,
    activation_budget: ActivationBudgetOption = None,
    inputs: SpecOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    optimizer: OptimizerOption = None,
    reserve: ReserveOption = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps to compare, each at its seed.")] = 1,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the first step.")] = 0,
    up_to_rounding: Annotated[
        bool, typer.Option("--up-to-rounding", help="Accept differences of rounding whatever the plan.")
    ] = False,
    cost_cache: CostCacheOption = None,
) -> None:
    """Run eager and planned steps and compare all that they do, bit for bit; exits with 4 on a mismatch.

    Values may differ by rounding where the plan splits a fused recurrence (nn.LSTM) over time, whose weight gradients
    then add up in another order; the line says so. No other plan's may, unless --up-to-rounding is given.
    """
    if plan_file is not None and (budget is not None or activation_budget is not None):
        raise UsageError("expected a --plan or a budget, got both: the plan has its own")
    if plan_file is not None and (optimizer is not None or reserve is not None):
        raise UsageError("expected a --plan, or --optimizer and --reserve with a --budget, got both: leave them out")
    if plan_file is None:
        check_budgets(budget, activation_budget, otherwise=", or a plan file by --plan")
        check_besides(activation_budget, reserve, optimizer)
    check_target(target, inputs, dtype)
    plan = None if plan_file is None else console.load_plan(existing_file(plan_file, "a plan for --plan"))
    session = open_session(console, target, inputs, dtype=dtype, device=device, cost_cache=cost_cache, steps="verify")
    console.progress(f"comparing {steps} step(s) of {target} with eager's")
    with user_output():
        from rematerialize import verify as judge
        from rematerialize.budget import read_budget

        asked = plan or read_budget(budget, activation_budget, reserve or 0, optimizer, session.target.model)
        result = judge.verify(
            session.target,
            asked,
            steps=steps,
            seed=seed,
            rounding=up_to_rounding,
            size=console.size,
            cost_cache=session.options["cost_cache"],
        )
    if console.as_json:
        content = {"passed": result.passed, "steps": steps, "seed": seed, "max_relative": result.max_relative}
        content |= {"budget_bytes": result.plan.budget_bytes, "predicted_peak_bytes": result.plan.peak_bytes}
        content |= {"besides_bytes": result.plan.besides_bytes}
        content |= {"eager_peak_bytes": result.eager_peak_bytes, "planned_peak_bytes": result.planned_peak_bytes}
        findings = [{**asdict(one), "passed": one.passed} for one in result.findings]
        console.data("verification", {**content, "findings": findings})
    else:
        rows = [[one.what, one.verdict, one.detail] for one in result.findings]
        styles = ["red" if not one.passed else "yellow" if one.verdict == "off" else "" for one in result.findings]
        console.table(f"{target} against eager", ["", "verdict", "found"], rows, "<<<", styles=styles)
    if not result.passed:
        raise typer.Exit(MISMATCH)
