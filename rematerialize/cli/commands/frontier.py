"""``frontier``: what less memory costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from rematerialize.errors import did_you_mean
from rematerialize.report.figures import FrontierPoint
from rematerialize.units import format_percent, format_seconds

if TYPE_CHECKING:
    from rematerialize.plans import Plan
    from rematerialize.trial import Trial

_SUFFIXES = (".html", ".png", ".svg", ".pdf", ".csv", ".json")


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
    """Plan for falling budgets: the memory / overhead curve, as a table, page (.html), figure (.png) or data (.csv)."""
    console.check_output(output, force=force)
    reserve_bytes = check_reserve(reserve)
    if output is not None and output.suffix.lower() not in _SUFFIXES:
        near = did_you_mean(output.suffix, _SUFFIXES)
        raise UsageError(f"expected -o to end in one of {', '.join(_SUFFIXES)}, got {output}{near}")
    session = open_session(
        console, target, inputs, dtype=dtype, device=device, cost_cache=cost_cache, steps="--measure" if measure else ""
    )
    model, example_inputs = session.target.model, session.target.inputs
    trials: tuple[Trial, ...] = ()
    call_s = 0.0
    with user_output():
        from rematerialize import api
        from rematerialize.budget import optimizer_bytes

        state_bytes = optimizer_bytes(optimizer, model)
        if measure:
            from rematerialize.trial import settle, try_plans

            settle(model, example_inputs)
        plans = session.named(*api.frontier(model, example_inputs, points=points, **session.options))
        if measure:
            from rematerialize.call_cost import call_seconds
            from rematerialize.prepare import bind_inputs

            assert plans[0].prepared is not None
            call_s = call_seconds(plans[0].prepared, model, bind_inputs(model.forward, example_inputs))
            console.progress("running steps")
            _, trials = try_plans(model, example_inputs, plans)
    curve = _Curve(target, session.costs, plans, trials, call_s, state_bytes, reserve_bytes)
    if output is not None:
        _write(console, output, curve)
    if console.as_json:
        console.data("frontier", curve.to_dict())
        return
    headers, rows = curve.table(console.size)
    shown = _shown(plans) if output is not None and output.suffix.lower() == ".html" else None
    styles = ["green" if at == shown else "" for at in range(len(rows))]
    console.table(f"Memory and overhead of {target}, costs {session.costs}", headers, rows, styles=styles)


@dataclass(frozen=True, slots=True)
class _Curve:
    """The plans of a target by falling budget, and a real step of each, if they ran."""

    target: str
    costs: str
    plans: tuple[Plan, ...]
    trials: tuple[Trial, ...]
    call_s: float  # of each step, besides its kernels
    optimizer_bytes: int
    reserve_bytes: int

    def with_residents(self, plan: Plan) -> int:
        """Peak of all that a plan's step holds, what was asked to be counted besides included."""
        return plan.peak_bytes + plan.resident_bytes + self.optimizer_bytes + self.reserve_bytes

    def step_s(self, plan: Plan) -> float:
        """Predicted time of a plan's step as a user times it: what a call takes besides its kernels included."""
        return plan.schedule.time_s + self.call_s

    def tried(self) -> Iterator[tuple[Plan, Trial]]:
        """The plans with their real steps, if they ran."""
        return zip(self.plans, self.trials, strict=True) if self.trials else iter(())

    def predicted(self) -> list[FrontierPoint]:
        """The plans as points of a drawing."""
        return [FrontierPoint(plan.budget_bytes, plan.peak_bytes, plan.overhead) for plan in self.plans]

    def measured(self) -> list[FrontierPoint]:
        """Their real steps, each over the real step that stores everything: the first plan's."""
        return [
            FrontierPoint(plan.budget_bytes, trial.peak_bytes, trial.ratio / self.trials[0].ratio - 1)
            for plan, trial in self.tried()
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-ready data; bytes are ints."""
        return {
            "target": self.target,
            "costs": self.costs,
            "optimizer_bytes": self.optimizer_bytes,
            "reserve_bytes": self.reserve_bytes,
            "points": [{**plan.figures(), "with_residents_bytes": self.with_residents(plan)} for plan in self.plans],
            "measured": [
                {
                    "peak_bytes": trial.peak_bytes,
                    "predicted_step_s": self.step_s(plan),
                    "step_s": trial.step_s,
                    "of_eager": trial.ratio,
                }
                for plan, trial in self.tried()
            ],
        }

    def to_csv(self) -> str:
        """A row per plan: what the table shows, exact; an empty cell where nothing is proven."""
        names = ["budget_bytes", "peak_bytes", "store_all_peak_bytes", "resident_bytes", "with_residents_bytes"]
        names += ["overhead", "gap", "recomputed_ops", "step_s"]
        more = ["measured_peak_bytes", "predicted_step_s", "measured_step_s", "of_eager"] if self.trials else []
        data = self.to_dict()
        lines = [",".join(names + more)]
        for at, point in enumerate(data["points"]):
            real = list(data["measured"][at].values()) if self.trials else []
            values = [*(point.get(name) for name in names), *real]
            lines.append(",".join("" if value is None else repr(value) for value in values))
        return "\n".join(lines)

    def table(self, size: Callable[[int], str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headers and rows; measured figures follow the predicted ones, with how far the prediction is off."""
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
                size(plan.peak_bytes),
                format_percent(plan.peak_bytes / max(plan.store_all_peak_bytes, 1)),
                size(self.with_residents(plan)),
                format_percent(plan.overhead),
                "-" if plan.gap is None else format_percent(plan.gap),
                str(plan.recomputed),
            )
            for plan in self.plans
        ]
        if not self.trials:
            return headers, rows
        headers += ("measured peak", "off", "predicted step", "measured step", "off", "of eager's")
        return headers, [
            (
                *row,
                size(trial.peak_bytes),
                _off(plan.peak_bytes, trial.peak_bytes),
                format_seconds(self.step_s(plan)),
                format_seconds(trial.step_s),
                _off(self.step_s(plan), trial.step_s),
                f"{trial.ratio:.2f}",
            )
            for row, (plan, trial) in zip(rows, self.tried(), strict=True)
        ]


def _off(predicted: float, real: float) -> str:
    """By how much a prediction is above what was measured."""
    return f"{100 * (predicted / real - 1):+.1f}%" if real else "-"


def _shown(plans: tuple[Plan, ...]) -> int:
    """Which plan a page is about."""
    return len(plans) // 2


def _write(console: Console, output: Path, curve: _Curve) -> None:
    plans, points = curve.plans, curve.predicted()
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
            resident_bytes=plan.resident_bytes + curve.optimizer_bytes + curve.reserve_bytes,
            minimum_bytes=plan.minimum_bytes,
            stored=plan.stored_timeline(),
            frontier=points,
            chosen=chosen,
            measured=curve.measured(),
            title=f"Memory and overhead of {curve.target}",
            origin=plan.origin,
            about=f"This page shows {which}. For another: rematerialize plan {curve.target} --activation-budget SIZE "
            "-o plan.json, then rematerialize export plan.json -o page.html.",
        )
        console.write(output, page)
        return
    if suffix in (".csv", ".json"):
        console.write(output, curve.to_csv() if suffix == ".csv" else console.json("frontier", curve.to_dict()))
        return
    from rematerialize.report.plot import frontier_figure, save_figure

    figure = frontier_figure(points, measured=curve.measured(), title=plans[0].origin.title("Memory and overhead"))
    save_figure(figure, output)
    console.progress(f"wrote {output}")
