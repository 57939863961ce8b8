"""Plain-text and markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def plan_table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a title and aligned "name  value" lines, values flush right.

    Examples
    --------
    >>> print(plan_table("Plan", [("budget", "8.00 GiB"), ("overhead", "4.1%")]))
    Plan
      budget    8.00 GiB
      overhead      4.1%
    """
    names = max((len(name) for name, _ in rows), default=0)
    values = max((len(value) for _, value in rows), default=0)
    return "\n".join([title, *(f"  {name:<{names}}  {value:>{values}}" for name, value in rows)])


def aligned_table(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Return a plain-text table, columns two spaces apart, headers underlined.

    Parameters
    ----------
    headers : sequence of str
    rows : sequence of sequence of str
        Each as long as `headers`.
    align : str
        One of "<", ">" or "^" per column; by default the first column is flush left, others right.

    Examples
    --------
    >>> print(aligned_table(["model", "peak"], [["gpt", "33.0%"], ["u-net", "8.1%"]]))
    model   peak
    -----  -----
    gpt    33.0%
    u-net   8.1%
    """
    align = _alignment(headers, rows, align)
    widths = _widths(headers, rows)
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(_cells(line, widths, align)).rstrip() for line in lines)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Return the same table in markdown, padded so that its source reads as well as its rendering.

    Examples
    --------
    >>> print(markdown_table(["model", "peak"], [["gpt", "33.0%"]]))
    | model |  peak |
    | :---- | ----: |
    | gpt   | 33.0% |
    """
    align = _alignment(headers, rows, align)
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (headers, *rows)]
    widths = [max(width, 3) for width in _widths(escaped[0], escaped[1:])]
    rules = [_rule(width, side) for width, side in zip(widths, align, strict=True)]
    lines = [escaped[0], rules, *escaped[1:]]
    return "\n".join("| " + " | ".join(_cells(line, widths, align)) + " |" for line in lines)


def _alignment(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    align = align or "<" + ">" * (len(headers) - 1)
    for line in (align, *rows):
        if len(line) != len(headers):
            raise ValueError(f"{len(line)} cells for the {len(headers)} columns {list(headers)}: {line!r}")
    return align


def _widths(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(headers, *rows, strict=True)]


def _cells(line: Sequence[str], widths: Sequence[int], align: str) -> list[str]:
    return [f"{cell:{side}{width}}" for cell, width, side in zip(line, widths, align, strict=True)]


def _rule(width: int, side: str) -> str:
    return (":" if side in "<^" else "-") + "-" * (width - 2) + (":" if side in ">^" else "-")
