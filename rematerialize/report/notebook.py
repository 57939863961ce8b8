"""A plan in a notebook: its figures beside its memory over the step. Light and dark come from the notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rematerialize.report.curves import SIDE, edges, frame, line, path
from rematerialize.report.timeline import Timeline
from rematerialize.units import format_bytes, format_seconds

# Middle tones: at least 3:1 on white and on near-black, as nothing tells a cell which of the two it stands on.
_PLAN, _STORED, _BUDGET = "#2f7fd0", "#858c95", "#d0581c"
_SVG = f'viewBox="0 0 {SIDE:g} {SIDE:g}" preserveAspectRatio="none" role="img"'
_COLUMNS = 300  # as wide as it is drawn


def notebook_html(
    title: str,
    rows: Sequence[tuple[str, str]],
    plan: Timeline,
    stored: Timeline,
    *,
    budget_bytes: int,
    about: str = "",
) -> str:
    """Return one element with a table of names and values and a small drawing. No styles leak out of it.

    `about` is a line below the title; `budget_bytes`, of activations, is the line in the drawing.
    """
    below = f'<div style="font-size:.85em;padding-bottom:4px">{escape(about)}</div>' if about else ""
    cells = "".join(
        f'<tr style="background:none"><td style="text-align:left;padding:1px 18px 1px 0">{escape(name)}</td>'
        f'<td style="text-align:right;padding:1px 0;font-variant-numeric:tabular-nums">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return (
        f'<div style="max-width:60rem"><div style="font-weight:bold;padding-bottom:4px">{escape(title)}</div>{below}'
        '<div style="display:flex;flex-wrap:wrap;gap:12px 32px;align-items:flex-start">'
        f'<table style="border:0;margin:0"><tbody>{cells}</tbody></table>'
        f'<div style="flex:1 1 18rem;min-width:16rem">{_drawing(plan, stored, budget_bytes)}</div></div></div>'
    )


def _drawing(plan: Timeline, stored: Timeline, budget_bytes: int) -> str:
    area = frame((plan, stored), budget_bytes=budget_bytes)
    begins = area.x(edges(plan, area)[plan.boundary])
    thin = 'fill="none" vector-effect="non-scaling-stroke"'
    plan_line, stored_line = line(plan, area, columns=_COLUMNS), line(stored, area, columns=_COLUMNS)
    budget = area.y(budget_bytes)
    marks = (
        f'<path d="{path(stored_line, closed=True)}" fill="{_STORED}" fill-opacity=".25"/>',
        f'<path d="{path(plan_line, closed=True)}" fill="{_PLAN}" fill-opacity=".25"/>',
        f'<path d="{path(stored_line)}" stroke="{_STORED}" {thin}/>',
        f'<path d="{path(plan_line)}" stroke="{_PLAN}" stroke-width="2" {thin}/>',
        f'<path d="M{begins:.1f} 0V{SIDE:g}" stroke="currentColor" stroke-dasharray="2 3" {thin}/>',
        f'<path d="M0 {budget:.1f}H{SIDE:g}" stroke="{_BUDGET}" stroke-width="2" stroke-dasharray="7 4" {thin}/>',
        f'<path d="M0 0V{SIDE:g}H{SIDE:g}" stroke="currentColor" stroke-opacity=".6" {thin}/>',
    )
    length = format_seconds(area.span) if area.timed else f"{area.span:,.0f} executions"
    keys = (
        (_PLAN, "&#9644;", f"this plan {format_bytes(plan.peak_bytes)}"),
        (_STORED, "&#9644;", f"store-all {format_bytes(stored.peak_bytes)}"),
        (_BUDGET, "&#9476;", f"activation budget {format_bytes(budget_bytes)}"),
    )
    legend = " ".join(  # a line may break between them
        f'<span style="white-space:nowrap;margin-right:14px"><span style="color:{colour};font-weight:bold" '
        f'aria-hidden="true">{mark}</span> {text}</span>'
        for colour, mark, text in keys
    )
    small = "font-size:.85em;line-height:1.5"
    return (
        f'<div style="{small}">Memory over the step</div>'
        f'<svg {_SVG} aria-label="Memory over the step: this plan, store-all and the activation budget" '
        f'style="display:block;width:100%;height:9rem;overflow:visible">{"".join(marks)}</svg>'
        f'<div style="{small};display:flex;justify-content:space-between"><span>0</span>'
        f"<span>{length}</span></div>"
        f'<div style="{small}">{legend} <span style="white-space:nowrap">&#8942; the backward begins</span></div>'
    )
