"""``solve``: a graph file to a schedule file, without torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rematerialize.cli.app import command
from rematerialize.cli.completion import one_of
from rematerialize.cli.completion import solvers as known_solvers
from rematerialize.cli.console import Console
from rematerialize.cli.errors import UsageError
from rematerialize.cli.options import ForceOption, OutputOption, existing_file
from rematerialize.errors import GraphError, did_you_mean
from rematerialize.units import format_percent, format_seconds, parse_budget

if TYPE_CHECKING:
    from rematerialize.ir import TrainingGraph
    from rematerialize.schedule import Schedule


@command
def solve(
    console: Console,
    graph_file: Annotated[Path, typer.Argument(metavar="GRAPH.JSON", help="A rematerialize.graph/1 file.")],
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="SIZE", help="Peak allowed: bytes, 512MiB, 30% of store-all's.")
    ] = None,
    activation_budget: Annotated[
        str | None,
        typer.Option("--activation-budget", metavar="SIZE", help="The same: peaks of graph files leave residents out."),
    ] = None,
    output: OutputOption = None,
    force: ForceOption = False,
    solver: Annotated[
        str,
        typer.Option(metavar="NAME", help="A registered solver, or auto.", autocompletion=one_of(known_solvers)),
    ] = "auto",
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0.0,
            help="Stop looking for better after about so many seconds, and print the best schedule found by then;"
            " with 0, store-all. Without a limit, equal files give equal schedules.",
        ),
    ] = None,
) -> None:
    """Solve a graph file; the schedule goes to -o, or to stdout. Never imports torch."""
    given = [(name, text) for name, text in (("--budget", budget), ("--activation-budget", activation_budget)) if text]
    if len(given) != 1:
        raise UsageError(f"expected one of --budget and --activation-budget, got {'both' if given else 'none'}")
    wanted = parse_budget(given[0][1], name=given[0][0])
    console.check_output(output, force=force)
    from rematerialize import solve as solvers
    from rematerialize.ir import TrainingGraph

    if solver not in (known := ["auto", *solvers.solvers()]):
        near = did_you_mean(solver, known)
        raise UsageError(f"unknown --solver {solver!r}: expected one of {', '.join(known)}{near}")
    text = existing_file(graph_file, "a graph file").read_bytes()
    try:
        graph = TrainingGraph.from_json(text)
    except GraphError as error:
        if _is_plan(text):
            raise UsageError(
                f"{graph_file} is a plan, and solve takes a graph: `rematerialize plan TARGET --activation-budget 50% "
                "--graph graph.json` writes one"
            ) from None
        raise GraphError(f"{graph_file} can't be solved: {error}") from None
    planner = solvers.Planner(graph, solver=solver, time_limit_s=time_limit)
    store_all = planner.store_all()
    budget_bytes = wanted.resolve(store_all.peak_bytes)
    console.progress(f"solving {len(graph.ops)} ops for {console.size(budget_bytes)}")
    start_s = time.perf_counter()
    found = planner.solve(budget_bytes)
    solve_s = time.perf_counter() - start_s
    if output is None and console.as_json:
        console.data("schedule", found.to_dict())
        return
    if output is None:
        print(found.to_json())
        return
    console.write(output, found.to_json())
    _print_summary(console, graph, found, store_all, solve_s)


def _is_plan(text: bytes) -> bool:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and str(data.get("format")).startswith("rematerialize.plan/")


def _print_summary(
    console: Console, graph: TrainingGraph, found: Schedule, store_all: Schedule, solve_s: float
) -> None:
    overhead = found.time_s / store_all.time_s - 1 if store_all.time_s else 0.0
    gap = found.to_dict()["gap"]
    if console.as_json:
        summary = {
            "solver": found.solver,
            "budget_bytes": found.budget_bytes,
            "peak_bytes": found.peak_bytes,
            "store_all_peak_bytes": store_all.peak_bytes,
            "minimum_bytes": found.minimum_bytes,
            "time_s": found.time_s,
            "overhead": overhead,
            "gap": gap,
            "solve_s": solve_s,
        }
        console.data("solve", summary)
        return
    rows = [
        ("solver", found.solver),
        ("budget", console.size(found.budget_bytes)),
        ("peak", console.size(found.peak_bytes)),
        ("store-all peak", console.size(store_all.peak_bytes)),
        ("minimum", console.size(found.minimum_bytes)),
        ("overhead", format_percent(overhead)),
        ("gap to lower bound", "unknown" if gap is None else format_percent(gap)),
        ("solved in", format_seconds(solve_s)),
    ]
    console.pairs(f"Schedule of {len(graph.ops)} ops", rows)
