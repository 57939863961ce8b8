"""What commands print: data on stdout as plain text, as rich tables on a terminal, or as JSON; progress on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from rematerialize.cli.errors import UsageError
from rematerialize.report.table import aligned_table, plan_table
from rematerialize.units import format_bytes

if TYPE_CHECKING:
    from rematerialize.plans import Plan

_STAGES = {
    "capture": "capturing the step",
    "costs": "measuring what ops cost",
    "solve": "planning",
    "measure": "running steps",
}
_BAR = 30
_GUTTER, _TIGHT = 3, 1  # between the columns of a table with lines, as a rule and on narrow terminals
_WORD = re.compile(r"(?:\[[^\]]*\]|\([^)]*\)|\S)+")  # "float32[4, 8]" and "(no line of yours)" are one


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

    def load_plan(self, path: Path) -> Plan:
        """A plan file, what it warns of in one line on stderr, progress wanted or not.

        Raises
        ------
        ScheduleError, GraphError
            As `Plan.load`.
        """
        from rematerialize.plans import Plan

        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            plan = Plan.load(path)
        for one in found:
            print(f"rematerialize: warning: {one.message}", file=sys.stderr)
        return plan

    def size(self, size_bytes: int) -> str:
        """A size as the caller asked: three digits and a unit, or exact bytes."""
        return f"{size_bytes:,} B" if self.exact else format_bytes(size_bytes)

    def json(self, kind: str, content: dict[str, Any]) -> str:
        """One JSON object; ``schema`` names its shape and version."""
        return json.dumps({"schema": f"rematerialize.{kind}/1", **content})

    def data(self, kind: str, content: dict[str, Any]) -> None:
        """Print one JSON object."""
        print(self.json(kind, content))

    def pairs(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and values under a title."""
        if not on_terminal():
            print(plan_table(title, rows))
            return
        from rich.table import Table

        names, values = (max((len(row[at]) for row in rows), default=0) for at in range(2))
        room = terminal_width()
        if names + values + _GUTTER > room:
            _stacked(title, rows, room)
            return
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(style="dim")
        table.add_column(justify="right")
        for name, value in rows:
            table.add_row(name, value)
        _rich_print(table)

    def table(
        self,
        title: str,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        align: str = "",
        *,
        styles: Sequence[str] = (),
    ) -> None:
        """Print a table with headers under a title ("" for none).

        Parameters
        ----------
        title, headers, rows, align
            As `aligned_table`.
        styles : sequence of str
            On a terminal, a style of rich's for each row: colour, where it means something.

        No value is ever broken: cells flush right stay on one line, others wrap between their words. On a terminal too
        narrow for that, rows become paragraphs.
        """
        if not on_terminal():
            print("\n".join(filter(None, (title, aligned_table(headers, rows, align)))))
            return
        from rich import box
        from rich.table import Table

        sides = align or "<" + ">" * (len(headers) - 1)
        room, tight = terminal_width(), False
        widths = _widths(headers, rows, sides, room, _GUTTER)
        if widths is None:
            widths, tight = _widths(headers, rows, sides, room, _TIGHT), True
        if widths is None:
            _paragraphs(title, headers, rows, styles)
            return
        table = Table(
            title=title or None,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 0 if tight else 1),
        )
        for at, (header, side) in enumerate(zip(headers, sides, strict=True)):
            justify: Literal["left", "right"] = "right" if side == ">" else "left"
            table.add_column(header, justify=justify, overflow="fold", width=widths[at])
        for row, style in zip(rows, styles or [""] * len(rows), strict=True):
            table.add_row(*row, style=style or None)
        _rich_print(table)

    def check_output(self, path: Path | None, *, force: bool) -> None:
        """Refuse to overwrite, before any work is done.

        Raises
        ------
        UsageError
            If the file is there and ``force`` is not set, it is a folder, or its folder isn't there.
        """
        if path is None:
            return
        if path.is_dir():
            raise UsageError(f"{path} is a folder: name a file in it")
        if path.exists() and not force:
            raise UsageError(f"{path} exists already: give --force to overwrite it, or another -o")
        if not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}")

    def write(self, path: Path, content: str | bytes) -> None:
        """Write a result and say so.

        Raises
        ------
        UsageError
            Names the file: where a disk is full, the system's own error doesn't.
        """
        if isinstance(content, str):
            content = (content if content.endswith("\n") else f"{content}\n").encode()
        try:
            path.write_bytes(content)
        except OSError as error:
            raise UsageError(f"can't write {path}: {error.strerror}") from error
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


def terminal_width() -> int:
    """Columns of the terminal."""
    from rich.console import Console as RichConsole

    return RichConsole().width


def _widths(
    headers: Sequence[str], rows: Sequence[Sequence[str]], sides: str, room: int, gutter: int
) -> list[int] | None:
    """Widths of columns that fit a terminal and break no word, and no cell flush right; None where there is no room."""
    columns = list(zip(headers, *rows, strict=True))
    wanted = [max(map(len, column)) for column in columns]
    widths = []
    for (header, *cells), side in zip(columns, sides, strict=True):
        parts = cells if side == ">" else [word for cell in cells for word in _WORD.findall(cell)]
        widths.append(max(map(len, [*header.split(), *parts]), default=0))
    spare = room - sum(widths) - gutter * len(widths) - 1
    if spare < 0:
        return None
    for _ in range(spare):
        worst = max(range(len(widths)), key=lambda at: wanted[at] - widths[at])
        widths[worst] += widths[worst] < wanted[worst]
    return widths


def _stacked(title: str, rows: Sequence[tuple[str, str]], room: int) -> None:
    """Names and values where a terminal is too narrow for some pair of them: a long value is below its name."""
    from rich.text import Text

    _rich_print(Text(title, "bold"))
    names = max(len(name) for name, _ in rows)
    beside = [len(value) for _, value in rows if names + len(value) + _GUTTER <= room]
    values = max(beside, default=0)
    for name, value in rows:
        if len(value) <= values:
            _rich_print(Text.assemble((f" {name:<{names}}  ", "dim"), f"{value:>{values}}"))
            continue
        _rich_print(Text(f" {name}", "dim"))
        for line in textwrap.wrap(value, room - 3, break_long_words=False, break_on_hyphens=False):
            _rich_print(Text(f"   {line}"))


def _paragraphs(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str]) -> None:
    """A paragraph per row: its first cell, and the others below it, whose words the terminal itself may wrap."""
    from rich.text import Text

    if title:
        _rich_print(Text(title, "bold"))
    for row, style in zip(rows, styles or [""] * len(rows), strict=True):
        _rich_print(Text(row[0], style or "bold"))
        for header, cell in zip(headers[1:], row[1:], strict=True):
            if cell:
                _rich_print(Text.assemble((f"  {header}: ", "dim"), (cell, style)))


def _rich_print(renderable: Any) -> None:
    from rich.console import Console as RichConsole

    RichConsole(highlight=False).print(renderable)  # it heeds NO_COLOR
