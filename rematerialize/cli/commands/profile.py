"""``profile``: where the memory of a step goes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rematerialize.cli.app import command
from rematerialize.cli.console import Console, on_terminal, terminal_width
from rematerialize.cli.options import (
    CostCacheOption,
    DepthOption,
    DeviceOption,
    DtypeOption,
    MeasureOption,
    OptimizerOption,
    ReserveOption,
    SpecOption,
    TargetArgument,
    check_reserve,
)
from rematerialize.cli.session import open_session, user_output
from rematerialize.report.sparkline import sparkline

if TYPE_CHECKING:
    from rematerialize.profiling import Profile

_WIDTH = 64


@command
def profile(
    console: Console,
    target: TargetArgument,
    inputs: SpecOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    optimizer: OptimizerOption = None,
    reserve: ReserveOption = None,
    measure: MeasureOption = False,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="How many tensors to list.")] = 10,
    depth: DepthOption = 2,
    cost_cache: CostCacheOption = None,
) -> None:
    """Show where a step's memory goes: peak, at which op and line, over time, by tensor, by module."""
    check_reserve(reserve)
    session = open_session(
        console, target, inputs, dtype=dtype, device=device, cost_cache=cost_cache, steps="--measure" if measure else ""
    )
    with user_output():
        from rematerialize.profiling import profile as profile_step

        found = profile_step(
            session.target.model,
            session.target.inputs,
            optimizer=optimizer,
            reserve=reserve or 0,
            measure=measure,
            **session.options,
        )
    if console.as_json:
        console.data("profile", {"target": target, **found.to_dict(depth, top)})
        return
    _print(console, target, found, top, depth)


def _print(console: Console, target: str, found: Profile, top: int, depth: int) -> None:
    from rematerialize.profiling import MODULE_HEADERS, TENSOR_HEADERS, TENSOR_SIDES

    console.pairs(f"Training step of {target}, everything stored", found.overview(console.size))
    values = [run.live_bytes for run in found.timeline.executions]
    width = min(_WIDTH, max(terminal_width() - 2, 16)) if on_terminal() else _WIDTH
    at = found.timeline.boundary * min(width, len(values)) // max(len(values), 1)
    print(f"\nMemory over the step\n  {sparkline(values, width, unicode=on_terminal() or _unicode())}")
    print(f"  {'forward':<{min(max(at, 8), width - 8)}}backward\n")
    console.table("Largest tensors at the peak", TENSOR_HEADERS, found.tensor_rows(top, console.size), TENSOR_SIDES)
    print()
    console.table("Modules", MODULE_HEADERS, found.module_table(depth, console.size))


def _unicode() -> bool:
    return (sys.stdout.encoding or "").lower().startswith("utf")
