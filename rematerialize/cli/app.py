"""The application: its root, and how a function becomes a command with the options that all have."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from rematerialize.cli.completion import answering_bash
from rematerialize.cli.console import Console
from rematerialize.cli.errors import interrupted, one_line_errors, reader_went_away
from rematerialize.cli.options import ForceOption, PrintedOption
from rematerialize.version import __version__

app = typer.Typer(
    name="rematerialize",
    help="Train PyTorch models under a memory budget.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMON = {
    "as_json": Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")],
    "exact": Annotated[bool, typer.Option("--bytes", help="Show exact bytes.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")],
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="Also show the log.")],
    "debug": Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command. It is called with a `Console` first; the options that all commands have are added here.

    Where a command has no ``-o`` of its own, for a result beside what it prints, ``-o`` takes what it prints.
    """
    given = inspect.signature(function, eval_str=True)
    own = list(given.parameters.values())[1:]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in _COMMON.items()
    ]
    redirects = "output" not in given.parameters
    if redirects:
        common[:0] = [
            inspect.Parameter("output", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=PrintedOption),
            inspect.Parameter("force", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=ForceOption),
        ]

    @functools.wraps(function)
    def run(**kwargs: Any) -> None:
        console = Console(**{name: kwargs.pop(name) for name in _COMMON})
        if console.verbose:
            logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
        printed = (kwargs.pop("output"), kwargs.pop("force")) if redirects else (None, False)
        with one_line_errors(console.debug, console.as_json), console.printing_to(*printed):
            function(console, **kwargs)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + common
    run.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    summary = inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0]
    app.command(name=function.__name__.rstrip("_").replace("_", "-"), short_help=summary)(run)
    return run


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


def run(args: list[str]) -> int:
    """Run a command line and return its exit code."""
    from rematerialize.cli import commands

    assert commands.__all__
    try:
        with answering_bash(os.environ):
            code = app(args, standalone_mode=False, prog_name="rematerialize")
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return reader_went_away()
    except (KeyboardInterrupt, typer.Abort):
        return interrupted()
    except Exception as error:
        # typer's usage errors: their class has moved between its versions, their shape has not
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        with contextlib.suppress(BrokenPipeError):
            print(f"rematerialize: error: {error.format_message()} (rematerialize --help)", file=sys.stderr)
        return 2
