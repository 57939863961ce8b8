"""``frontier``: what less memory costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rematerialize.cli.app import command
from rematerialize.cli.console import Console
from rematerialize.cli.errors import UsageError
from rematerialize.cli.options import (
    CostCacheOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    MeasureOption,
    OptimizerOption,
    OutputOption,
    ReserveOption,
    SpecOption,
    TargetArgument,
    check_reserve,
)
from rematerialize.cli.session import open_session, user_output
from rematerialize.units import format_percent, format_seconds

if TYPE_CHECKING:
    from rematerialize.plans import Plan
    from rematerialize.trial import Trial

_SUFFIXES = (".html", ".png", ".svg", ".pdf", ".csv")


@command
def frontier(
    console: Console,
    target: TargetArgument,
    inputs: SpecOption = None,
    points: Annotated[int, typer.Option("--points", metavar="N", min=2, help="At most so many plans.")] = 12,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    optimizer: OptimizerOption = None,
    reserve: ReserveOption = None,
    measure: MeasureOption = False,
    output: OutputOption = None,
    force: ForceOption = False,
    cost_cache: CostCacheOption = None,
) -> None:
    """Plan for falling budgets: the memory / overhead curve, as a table, a page (.html) or a figure (.png, .svg)."""
    console.check_output(output, force=force)
    reserve_bytes = check_reserve(reserve)
    if output is not None and output.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"expected -o to end in one of {', '.join(_SUFFIXES)}, got {output}")
    session = open_session(
        console, target, inputs, dtype=dtype, device=device, cost_cache=cost_cache, steps="--measure" if measure else ""
    )
    model, example_inputs = session.target.model, session.target.inputs
    trials: tuple[Trial, ...] = ()
    with user_output():
        from rematerialize import api
        from rematerialize.budget import optimizer_bytes

        state_bytes = optimizer_bytes(optimizer, model)
        if measure:
            from rematerialize.trial import settle, try_plans

            settle(model, example_inputs)
        plans = session.named(*api.frontier(model, example_inputs, points=points, **session.options))
        if measure:
            console.progress("running steps")
            _, trials = try_plans(model, example_inputs, plans)
    besides_bytes = state_bytes + reserve_bytes
    if output is not None:
        _write(console, output, target, plans, besides_bytes)
    headers, rows = _table(console, plans, trials, besides_bytes)
    if console.as_json:
        measured = [{"peak_bytes": t.peak_bytes, "step_s": t.step_s, "of_eager": t.ratio} for t in trials]
        besides = {"optimizer_bytes": state_bytes, "reserve_bytes": reserve_bytes}
        points_data = [plan.metrics() for plan in plans]
        console.data("frontier", {"target": target, **besides, "points": points_data, "measured": measured})
        return
    shown = _shown(plans) if output is not None and output.suffix.lower() == ".html" else None
    styles = ["green" if at == shown else "" for at in range(len(rows))]
    console.table(f"Memory and overhead of {target}, costs {session.costs}", headers, rows, styles=styles)


def _shown(plans: tuple[Plan, ...]) -> int:
    """Which plan a page is about."""
    return len(plans) // 2


def _table(
    console: Console, plans: tuple[Plan, ...], trials: tuple[Trial, ...], besides_bytes: int
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    headers: tuple[str, ...] = (
        "activation peak",
        "of store-all",
        "with residents",
        "overhead",
        "gap",
        "recomputed ops",
    )
    rows: list[tuple[str, ...]] = [
        (
            console.size(plan.peak_bytes),
            format_percent(plan.peak_bytes / max(plan.store_all_peak_bytes, 1)),
            console.size(plan.peak_bytes + plan.resident_bytes + besides_bytes),
            format_percent(plan.overhead),
            "-" if plan.gap is None else format_percent(plan.gap),
            str(plan.recomputed),
        )
        for plan in plans
    ]
    if trials:
        headers += ("measured peak", "measured step", "of eager's")
        rows = [
            (*row, console.size(trial.peak_bytes), format_seconds(trial.step_s), f"{trial.ratio:.2f}")
            for row, trial in zip(rows, trials, strict=True)
        ]
    return headers, rows


def _write(console: Console, output: Path, target: str, plans: tuple[Plan, ...], besides_bytes: int) -> None:
    from rematerialize.report.figures import FrontierPoint

    points = [FrontierPoint(plan.budget_bytes, plan.peak_bytes, plan.overhead) for plan in plans]
    suffix = output.suffix.lower()
    if suffix == ".html":
        from rematerialize.report.html import html_report

        chosen = _shown(plans)
        plan = plans[chosen]
        why = {1: "the only one", 2: "the one that recomputes more"}.get(len(plans), "the one in the middle")
        which = f"plan {chosen + 1} of {len(plans)}, {why}"
        console.progress(f"the page shows {which}")
        page = html_report(
            plan.graph,
            plan.schedule,
            budget_bytes=plan.budget_bytes,
            resident_bytes=plan.resident_bytes + besides_bytes,
            minimum_bytes=plan.minimum_bytes,
            stored=plan.stored_timeline(),
            frontier=points,
            chosen=chosen,
            title=f"Memory and overhead of {target}",
            origin=plan.origin,
            about=f"This page shows {which}. For another: rematerialize plan {target} --activation-budget SIZE -o "
            "plan.json, then rematerialize export plan.json -o page.html.",
        )
        console.write(output, page)
        return
    if suffix == ".csv":
        lines = ["budget_bytes,peak_bytes,overhead"]
        lines += [f"{point.budget_bytes},{point.peak_bytes},{point.overhead!r}" for point in points]
        console.write(output, "\n".join(lines))
        return
    from rematerialize.report.plot import frontier_figure, save_figure

    save_figure(frontier_figure(points), output)
    console.progress(f"wrote {output}")
