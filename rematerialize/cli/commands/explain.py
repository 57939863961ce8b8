"""``explain``: a plan file, module by module and op by op. Without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rematerialize.cli.app import command
from rematerialize.cli.commands.plan import budget_rows
from rematerialize.cli.console import Console
from rematerialize.cli.errors import UsageError
from rematerialize.cli.options import DepthOption, check_plan_file
from rematerialize.errors import did_you_mean
from rematerialize.report.modules import NO_LINE
from rematerialize.report.timeline import kernel_title
from rematerialize.units import format_seconds

if TYPE_CHECKING:
    from rematerialize.plans import Plan
    from rematerialize.report.explain import Explanation


def _modules_of(explained: Explanation) -> set[str]:
    """All modules by name: those that have ops, and those that these are in."""
    parts = [row.module.split(".") for row in explained.ops if row.module]
    return {".".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1)}


def _within(name: str, module: str | None) -> str:
    """A module's name in a column; within the one that was asked for, what its own name has more."""
    if module is None:
        return name or "(model)"
    return name.removeprefix(module).removeprefix(".") or "(itself)"


def _about(console: Console, plan: Plan) -> list[tuple[str, str]]:
    """What a plan was made for, as far as its file says, and what it needs."""
    made_for = [("type", plan.origin.dtype), ("costs", plan.origin.costs)]
    rows = [*made_for, *budget_rows(console.size, plan), ("peak", console.size(plan.peak_bytes))]
    return [(name, value) for name, value in rows if value]


@command
def explain(
    console: Console,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.JSON", help="What `plan -o` wrote.")],
    depth: DepthOption = 2,
    ops: Annotated[bool, typer.Option("--ops", help="A row per op, not only per module.")] = False,
    module: Annotated[
        str | None, typer.Option("--module", metavar="NAME", help="Only this module and those in it, op by op.")
    ] = None,
) -> None:
    """Say per module and op what a plan stores, what it recomputes how often, and why."""
    check_plan_file(plan_file, "explain")
    plan = console.load_plan(plan_file)
    explained = plan.explain(depth)
    rows = explained.ops
    if module is not None:
        rows = tuple(row for row in rows if row.module == module or row.module.startswith(f"{module}."))
        if not rows:
            names = sorted(_modules_of(explained))
            raise UsageError(f"no module {module!r} in {plan_file}{did_you_mean(module, names)}")
    if console.as_json:
        content = {"made_for": plan.origin.to_dict(), **explained.to_dict(), "ops": [row.to_dict() for row in rows]}
        console.data("explain", content)
        return
    if module is None:
        console.pairs(f"Plan of {plan.origin.target or plan_file.name}", _about(console, plan))
        print()
        console.table("Modules", explained.headers, explained.rows(console.size))
    if module is None and not ops:
        return
    if module is None:
        print()
    console.table(
        f"Forward ops of {module}" if module else "Forward ops",
        ("op", "module", "line", "decision", "runs", "stored", "extra time", "why"),
        [
            (
                kernel_title(row.target),
                _within(row.module, module),
                row.source or NO_LINE,
                row.decision,
                str(row.runs),
                console.size(row.stored_bytes) if row.stored_bytes else "-",
                format_seconds(row.extra_s) if row.extra_s else "-",
                row.why,
            )
            for row in rows
        ],
        "<<<<>>><",
    )
