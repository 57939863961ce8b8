"""Exceptions to one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator

import typer

from rematerialize.errors import BudgetError, CaptureError, RematerializeError, ran_out_of_memory

NOTHING_FITS = 3
MISMATCH = 4


class UsageError(Exception):
    """What the caller typed, or the target that it names, is wrong."""


@contextlib.contextmanager
def one_line_errors(debug: bool, as_json: bool = False) -> Iterator[None]:
    """Print the one line that an error deserves and exit with its code; with ``debug``, let it pass.

    Where nothing fits the budget, a program that reads stdout gets JSON besides; a terminal only with ``as_json``.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        raise typer.Exit(reader_went_away()) from None
    except KeyboardInterrupt:
        raise typer.Exit(interrupted()) from None
    except Exception as error:
        if debug:
            raise
        if isinstance(error, BudgetError) and (as_json or not sys.stdout.isatty()):
            print(json.dumps({"error": "budget", "message": str(error), "minimum_bytes": error.minimum_bytes}))
        raise typer.Exit(_explain(error)) from None


def _explain(error: Exception) -> int:
    code = 2
    message = str(error)
    if isinstance(error, BudgetError):
        code = NOTHING_FITS
    elif isinstance(error, CaptureError):
        code = 5
    elif isinstance(error, OSError):
        full = error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
        )  # nor does the system say what of
        where = error.filename or ("can't write the output" if full else "")
        message = f"{where}: {error.strerror}" if where else message
    elif ran_out_of_memory(error):
        message = (
            f"memory ran out ({message.splitlines()[0] if message else type(error).__name__}): make the inputs "
            "smaller, or name a --device that isn't here (rematerialize devices), for which nothing is allocated"
        )
    elif not isinstance(error, (RematerializeError, UsageError)):
        code = 1
        message = f"internal error, please report it: {type(error).__name__}: {error} (--debug shows where)"
    print(f"rematerialize: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def reader_went_away() -> int:
    """The exit code for a closed pipe."""
    # What is still buffered can't be written; without this, Python complains at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def interrupted() -> int:
    """The exit code for Ctrl-C."""
    print("rematerialize: interrupted", file=sys.stderr)
    return 130
