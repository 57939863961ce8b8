"""Plans and profiles in a notebook: figures beside memory over the step. Light and dark come from the notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rematerialize.report.curves import SIDE, Frame, edges, frame, line, path
from rematerialize.report.timeline import Timeline
from rematerialize.units import format_bytes, format_seconds

# Middle tones: at least 3:1 on white and on near-black, as nothing tells a cell which of the two it stands on.
_PLAN, _STORED, _BUDGET = "#2f7fd0", "#858c95", "#d0581c"
_SVG = f'viewBox="0 0 {SIDE:g} {SIDE:g}" preserveAspectRatio="none" role="img"'
_THIN = 'fill="none" vector-effect="non-scaling-stroke"'
_COLUMNS = 300  # as wide as it is drawn
Table = tuple[str, Sequence[str], Sequence[Sequence[str]], str]


def plan_html(
    title: str,
    rows: Sequence[tuple[str, str]],
    plan: Timeline,
    stored: Timeline,
    *,
    budget_bytes: int,
    about: str = "",
) -> str:
    """Return one element with a plan's table of names and values and a small drawing. No styles leak out of it.

    `about` is a line below the title; `budget_bytes`, of activations, is the line in the drawing.
    """
    area = frame((plan, stored), budget_bytes=budget_bytes)
    budget = area.y(budget_bytes)
    marks = [
        *_lines(stored, area, _STORED, width=1),
        *_lines(plan, area, _PLAN, width=2),
        _boundary(plan, area),
        f'<path d="M0 {budget:.1f}H{SIDE:g}" stroke="{_BUDGET}" stroke-width="2" stroke-dasharray="7 4" {_THIN}/>',
    ]
    keys = (
        (_PLAN, "&#9644;", f"this plan {format_bytes(plan.peak_bytes)}"),
        (_STORED, "&#9644;", f"store-all {format_bytes(stored.peak_bytes)}"),
        (_BUDGET, "&#9476;", f"activation budget {format_bytes(budget_bytes)}"),
    )
    label = "Memory over the step: this plan, store-all and the activation budget"
    return _cell(title, about, rows, _drawing(marks, area, keys, label))


def profile_html(title: str, rows: Sequence[tuple[str, str]], stored: Timeline, tables: Sequence[Table]) -> str:
    """Return one element with a profile's table, a small drawing, and further tables below. No styles leak out of it.

    Each of `tables` has a title, headers, rows, and which columns are numbers (">").
    """
    area = frame((stored,))
    keys = ((_PLAN, "&#9644;", f"everything stored {format_bytes(stored.peak_bytes)}"),)
    marks = [*_lines(stored, area, _PLAN, width=2), _boundary(stored, area)]
    drawing = _drawing(marks, area, keys, "Memory over the step, everything stored")
    return _cell(title, "", rows, drawing, "".join(map(_table, tables)))


def _cell(title: str, about: str, rows: Sequence[tuple[str, str]], drawing: str, below: str = "") -> str:
    about = f'<div style="font-size:.85em;padding-bottom:4px">{escape(about)}</div>' if about else ""
    cells = "".join(
        f'<tr style="background:none"><td style="text-align:left;padding:1px 18px 1px 0">{escape(name)}</td>'
        f'<td style="text-align:right;padding:1px 0;font-variant-numeric:tabular-nums">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return (
        f'<div style="max-width:60rem"><div style="font-weight:bold;padding-bottom:4px">{escape(title)}</div>{about}'
        '<div style="display:flex;flex-wrap:wrap;gap:12px 32px;align-items:flex-start">'
        f'<table style="border:0;margin:0;color:inherit"><tbody>{cells}</tbody></table>'
        f'<div style="flex:1 1 18rem;min-width:16rem">{drawing}</div></div>{below}</div>'
    )


def _table(table: Table) -> str:
    title, headers, rows, sides = table
    styles = [
        f"text-align:{'right' if side == '>' else 'left'};padding:1px 18px 1px 0;font-variant-numeric:tabular-nums"
        for side in sides
    ]

    def row(tag: str, cells: Sequence[str]) -> str:
        inner = (f'<{tag} style="{style}">{escape(cell)}</{tag}>' for style, cell in zip(styles, cells, strict=True))
        return f'<tr style="background:none">{"".join(inner)}</tr>'

    return (
        f'<div style="font-weight:bold;padding:10px 0 4px">{escape(title)}</div><div style="overflow-x:auto">'
        f'<table style="border:0;margin:0;color:inherit"><thead>{row("th", headers)}</thead>'
        f"<tbody>{''.join(row('td', cells) for cells in rows)}</tbody></table></div>"
    )


def _lines(timeline: Timeline, area: Frame, colour: str, *, width: int) -> tuple[str, str]:
    points = line(timeline, area, columns=_COLUMNS)
    return (
        f'<path d="{path(points, closed=True)}" fill="{colour}" fill-opacity=".25"/>',
        f'<path d="{path(points)}" stroke="{colour}" stroke-width="{width}" {_THIN}/>',
    )


def _boundary(timeline: Timeline, area: Frame) -> str:
    begins = area.x(edges(timeline, area)[timeline.boundary])
    return f'<path d="M{begins:.1f} 0V{SIDE:g}" stroke="currentColor" stroke-dasharray="2 3" {_THIN}/>'


def _drawing(marks: Sequence[str], area: Frame, keys: Sequence[tuple[str, str, str]], label: str) -> str:
    axes = f'<path d="M0 0V{SIDE:g}H{SIDE:g}" stroke="currentColor" stroke-opacity=".6" {_THIN}/>'
    length = format_seconds(area.span) if area.timed else f"{area.span:,.0f} executions"
    legend = " ".join(  # a line may break between them
        f'<span style="white-space:nowrap;margin-right:14px"><span style="color:{colour};font-weight:bold" '
        f'aria-hidden="true">{mark}</span> {text}</span>'
        for colour, mark, text in keys
    )
    small = "font-size:.85em;line-height:1.5"
    return (
        f'<div style="{small}">Memory over the step</div>'
        f'<svg {_SVG} aria-label="{label}" '
        f'style="display:block;width:100%;height:9rem;overflow:visible">{"".join(marks)}{axes}</svg>'
        f'<div style="{small};display:flex;justify-content:space-between"><span>0</span>'
        f"<span>{length}</span></div>"
        f'<div style="{small}">{legend} <span style="white-space:nowrap">&#8942; the backward begins</span></div>'
    )
