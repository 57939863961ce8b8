"""The command line: data on stdout, progress on stderr, one-line errors, distinct exit codes.

Exit codes: 0 done, 1 our own bug, 2 usage or a bad file, 3 nothing fits the budget (JSON on stdout gives
``minimum_bytes``), 5 the model's step can't be captured, 130 interrupted, 141 the reader went away.

Torch is imported by ``plan`` alone, and only once its arguments are known to be good.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rematerialize.errors import BudgetError, CaptureError, RematerializeError
from rematerialize.units import format_bytes, format_percent, format_seconds, parse_budget
from rematerialize.version import __version__

if TYPE_CHECKING:
    from rematerialize.ir import TrainingGraph
    from rematerialize.schedule import Schedule

app = typer.Typer(
    name="rematerialize",
    help="Train PyTorch models under a memory budget.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

OutputOption = Annotated[Path | None, typer.Option("--output", "-o", metavar="PATH", help="Write the result here.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class UsageError(Exception):
    """What the caller typed, or the factory that it names, is wrong."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    sys.exit(_run(list(sys.argv[1:] if argv is None else argv)))


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Train PyTorch models under a memory budget."""
    if version:
        print(f"rematerialize {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


@app.command()
def plan(
    factory: Annotated[
        str,
        typer.Argument(metavar="PKG.MOD:FACTORY", help="A function that returns (model, example_inputs)."),
    ],
    budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Peak of all that a step holds: 8GiB, 80% of the device, auto."),
    ] = None,
    activation_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Peak of what a step allocates: 512MiB, 30% of store-all's."),
    ] = None,
    output: OutputOption = None,
    graph_file: Annotated[
        Path | None, typer.Option("--graph", metavar="PATH", help="Also write the graph, for `solve`.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Capture a model's training step and say what it needs under a budget."""
    with _one_line_errors(debug):
        _check_budgets(budget, activation_budget)
        model, example_inputs = _call_factory(factory, debug=debug)
        _progress(f"capturing and planning {factory}")
        start_s = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):  # a model that prints must not mix with our data
            from rematerialize import api

            made = api.plan(model, example_inputs, budget=budget, activation_budget=activation_budget)
        _progress(f"planned in {format_seconds(time.perf_counter() - start_s)}")
        if output is not None:
            made.save(output)
        if graph_file is not None:
            graph_file.write_text(made.graph.to_json() + "\n", encoding="utf-8")
        print(json.dumps(made.to_dict()) if as_json else made)


@app.command()
def solve(
    graph_file: Annotated[Path, typer.Argument(metavar="GRAPH.JSON", help="A rematerialize.graph/1 file.")],
    budget: Annotated[str, typer.Option(metavar="SIZE", help="Peak allowed: bytes, 512MiB, 30% of store-all's.")],
    output: OutputOption = None,
    solver: Annotated[str, typer.Option(metavar="NAME", help="A registered solver, or auto.")] = "auto",
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0.0,
            help="Stop looking for better after about so many seconds, and print the best schedule found by then;"
            " with 0, store-all. Without a limit, equal files give equal schedules.",
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Solve a graph file; the schedule goes to -o, or to stdout. Never imports torch."""
    with _one_line_errors(debug):
        wanted = parse_budget(budget, name="--budget")
        from rematerialize import solve as solvers
        from rematerialize.ir import TrainingGraph

        if solver not in (known := ["auto", *solvers.solvers()]):
            raise UsageError(f"unknown --solver {solver!r}; choose one of {', '.join(known)}")
        graph = TrainingGraph.from_json(graph_file.read_bytes())
        planner = solvers.Planner(graph, solver=solver, time_limit_s=time_limit)
        store_all = planner.store_all()
        budget_bytes = wanted.resolve(store_all.peak_bytes)
        _progress(f"solving {len(graph.ops)} ops for {format_bytes(budget_bytes)}")
        start_s = time.perf_counter()
        found = planner.solve(budget_bytes)
        solve_s = time.perf_counter() - start_s
        if output is None:
            print(found.to_json())
            return
        output.write_text(found.to_json() + "\n", encoding="utf-8")
        _print_summary(graph, found, store_all, solve_s, as_json=as_json)


def _print_summary(
    graph: TrainingGraph, found: Schedule, store_all: Schedule, solve_s: float, *, as_json: bool
) -> None:
    overhead = found.time_s / store_all.time_s - 1 if store_all.time_s else 0.0
    gap = found.to_dict()["gap"]
    if as_json:
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
        print(json.dumps(summary))
        return
    from rematerialize.report.table import plan_table

    rows = [
        ("solver", found.solver),
        ("budget", format_bytes(found.budget_bytes)),
        ("peak", format_bytes(found.peak_bytes)),
        ("store-all peak", format_bytes(store_all.peak_bytes)),
        ("minimum", format_bytes(found.minimum_bytes)),
        ("overhead", format_percent(overhead)),
        ("gap to lower bound", "unknown" if gap is None else format_percent(gap)),
        ("solved in", format_seconds(solve_s)),
    ]
    print(plan_table(f"Schedule of {len(graph.ops)} ops", rows))


def _check_budgets(budget: str | None, activation_budget: str | None) -> None:
    """Refuse what can't be a budget before anything slow is imported."""
    if (budget is None) == (activation_budget is None):
        got = "none" if budget is None else "both"
        raise UsageError(f"expected one of --budget and --activation-budget, got {got}; give one of them")
    if budget is not None:
        parse_budget(budget, name="--budget", allow_auto=True)
    if activation_budget is not None:
        parse_budget(activation_budget, name="--activation-budget")


def _call_factory(path: str, *, debug: bool) -> tuple[Any, Any]:
    module_name, _, function_path = path.partition(":")
    if not module_name or not function_path:
        raise UsageError(f"expected a factory as PKG.MOD:FACTORY, got {path!r}; write for example models:make")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    with contextlib.redirect_stdout(sys.stderr):
        with _blame(f"importing {module_name} for the factory", debug=debug):
            try:
                found = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                    raise
                raise UsageError(
                    f"no module named {error.name!r} here ({here}) or installed; check the factory {path!r}"
                ) from None
        for name in function_path.split("."):
            if not hasattr(found, name):
                raise UsageError(f"{module_name} has no {function_path!r}; check the factory {path!r}")
            found = getattr(found, name)
        if not callable(found):
            raise UsageError(f"the factory {path!r} is a {type(found).__name__}; it must be a function")
        with _blame(f"the factory {path}", debug=debug):
            made: object = found()
    if not isinstance(made, tuple) or len(made) != 2:
        what = f"{len(made)} values" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise UsageError(f"the factory {path!r} returned {what}; it must return (model, example_inputs)")
    return made


@contextlib.contextmanager
def _blame(who: str, *, debug: bool) -> Iterator[None]:
    """Turn an exception of the user's code into one line that says whose it is and where it rose."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        if debug:
            raise
        frames = traceback.extract_tb(error.__traceback__)[1:]
        theirs = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename[0] != "<"]
        where = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
        raise UsageError(f"{who} raised {type(error).__name__}: {error}{where}") from error


@contextlib.contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        raise typer.Exit(_reader_went_away()) from None
    except KeyboardInterrupt:
        raise typer.Exit(_interrupted()) from None
    except Exception as error:
        if debug:
            raise
        if isinstance(error, BudgetError):
            print(json.dumps({"error": "budget", "message": str(error), "minimum_bytes": error.minimum_bytes}))
        raise typer.Exit(_explain(error)) from None


def _explain(error: Exception) -> int:
    """Print the one line that an error deserves and return its exit code."""
    code = 2
    message = str(error)
    if isinstance(error, BudgetError):
        code = 3
    elif isinstance(error, CaptureError):
        code = 5
    elif isinstance(error, OSError):
        message = f"{error.filename}: {error.strerror}" if error.filename else message
    elif not isinstance(error, (RematerializeError, UsageError)):
        code = 1
        message = f"internal error, please report it: {type(error).__name__}: {error} (--debug shows where)"
    print(f"rematerialize: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _reader_went_away() -> int:
    # What is still buffered can't be written; without this, Python complains at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _interrupted() -> int:
    print("rematerialize: interrupted", file=sys.stderr)
    return 130


def _progress(message: str) -> None:
    print(f"rematerialize: {message}", file=sys.stderr, flush=True)


def _run(args: list[str]) -> int:
    try:
        code = app(args, standalone_mode=False, prog_name="rematerialize")
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return _reader_went_away()
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Exception as error:
        # typer's usage errors: their class has moved between its versions, their shape has not
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        print(f"rematerialize: error: {error.format_message()} (rematerialize --help)", file=sys.stderr)
        return 2
