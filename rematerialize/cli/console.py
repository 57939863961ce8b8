"""What commands print: data on stdout as plain text, as rich tables on a terminal, or as JSON; progress on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from rematerialize.cli.errors import UsageError
from rematerialize.report.table import aligned_table, plan_table
from rematerialize.units import format_bytes

_STAGES = {
    "capture": "capturing the step",
    "costs": "measuring what ops cost",
    "solve": "planning",
    "measure": "running steps",
}
_BAR = 30


@dataclass(frozen=True, slots=True)
class Console:
    """How the caller wants to be talked to.

    Attributes
    ----------
    as_json : bool
        Data as JSON instead of tables.
    exact : bool
        Sizes in exact bytes.
    quiet, verbose : bool
        No progress; or also torch's and our own log.
    debug : bool
        Tracebacks instead of one line.
    """

    as_json: bool = False
    exact: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False

    def progress(self, message: str) -> None:
        """One line on stderr."""
        if not self.quiet:
            print(f"rematerialize: {message}", file=sys.stderr, flush=True)

    def size(self, size_bytes: int) -> str:
        """A size as the caller asked: three digits and a unit, or exact bytes."""
        return f"{size_bytes:,} B" if self.exact else format_bytes(size_bytes)

    def data(self, kind: str, content: dict[str, Any]) -> None:
        """Print one JSON object; ``schema`` names its shape and version."""
        print(json.dumps({"schema": f"rematerialize.{kind}/1", **content}))

    def pairs(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and values under a title."""
        if not on_terminal():
            print(plan_table(title, rows))
            return
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(style="dim")
        table.add_column(justify="right")
        for name, value in rows:
            table.add_row(name, value)
        _rich_print(table)

    def table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> None:
        """Print a table with headers under a title ("" for none)."""
        if not on_terminal():
            print("\n".join(filter(None, (title, aligned_table(headers, rows, align)))))
            return
        from rich import box
        from rich.table import Table

        sides = align or "<" + ">" * (len(headers) - 1)
        table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for header, side in zip(headers, sides, strict=True):
            table.add_column(header, justify="right" if side == ">" else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        _rich_print(table)

    def check_output(self, path: Path | None, *, force: bool) -> None:
        """Refuse to overwrite, before any work is done.

        Raises
        ------
        UsageError
            If the file is there and ``force`` is not set, or its folder isn't there.
        """
        if path is None:
            return
        if path.exists() and not force:
            raise UsageError(f"{path} exists already: give --force to overwrite it, or another -o")
        if not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}")

    def write(self, path: Path, text: str) -> None:
        """Write a result and say so."""
        path.write_text(text if text.endswith("\n") else f"{text}\n", encoding="utf-8")
        self.progress(f"wrote {path}")

    @contextlib.contextmanager
    def printing_to(self, path: Path | None, force: bool) -> Iterator[None]:
        """Write to a file what is printed meanwhile, if a path is given and no error comes between.

        Raises
        ------
        UsageError
            As `check_output`.
        """
        if path is None:
            yield
            return
        self.check_output(path, force=force)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                yield
            except typer.Exit:  # a result, too: of `verify`, for one
                self.write(path, printed.getvalue())
                raise
        self.write(path, printed.getvalue())

    def stages(self) -> Callable[[str, int, int], None]:
        """A callback ``(stage, done, total)``: a line per stage, and a bar for the long ones on a terminal."""
        told: set[str] = set()
        bars = sys.stderr.isatty()

        def show(stage: str, done: int, total: int) -> None:
            if self.quiet:
                return
            if total <= 1 or not bars:
                if stage not in told:
                    told.add(stage)
                    self.progress(_STAGES[stage])
                return
            filled = _BAR * done // total
            end = "\n" if done >= total else ""
            bar = "━" * filled + "╺" * (_BAR - filled)
            print(
                f"\rrematerialize: {_STAGES[stage]} {bar} {done:,} of {total:,}", end=end, file=sys.stderr, flush=True
            )

        return show


def on_terminal() -> bool:
    """Whether stdout is a terminal, where tables get colour and lines."""
    return sys.stdout.isatty()


def _rich_print(renderable: Any) -> None:
    from rich.console import Console as RichConsole

    RichConsole(highlight=False).print(renderable)  # it heeds NO_COLOR
