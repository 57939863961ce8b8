"""The tables of a page: the moments of the step in figures, the frontier's plans, the folding table of modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from rematerialize.report.figures import FrontierPoint, frontier_legend, frontier_plot
from rematerialize.report.modules import ModuleNode, module_tree
from rematerialize.report.timeline import Timeline
from rematerialize.units import format_bytes, format_percent, format_seconds

_NUMBER = ' class="number"'
_OPEN_ROWS = 32  # as many as a reader still takes in at once


def moments_table(plan: Timeline, stored: Timeline) -> str:
    """The memory drawing in figures, for readers who can't see it."""
    if not plan.executions:
        return ""
    rows = [(name, read(plan), read(stored)) for name, read in _MOMENTS]
    return _in_figures(("Moment", "This plan", "Store-all"), rows)


def frontier_section(
    points: Sequence[FrontierPoint], chosen: int | None, measured: Sequence[FrontierPoint] = ()
) -> str:
    """The frontier as a section with a drawing and a table; nothing if there are no points."""
    if not points:
        return ""
    headers = ["Budget", "Peak", "Overhead"]
    rows = [
        [format_bytes(point.budget_bytes), format_bytes(point.peak_bytes), format_percent(point.overhead)]
        for point in points
    ]
    note = "Each mark is a plan of the same step: the memory that it needs, the compute time that it adds."
    legend = ""
    if measured:
        headers += ["Measured peak", "Measured overhead"]
        rows = [
            [*row, format_bytes(real.peak_bytes), format_percent(real.overhead)]
            for row, real in zip(rows, measured, strict=True)
        ]
        note = (
            "Each circle is a plan of the same step: the memory that it needs, the compute time that it adds. Crosses "
            "are real steps of these plans, as measured, their overhead over the real step of the first."
        )
        legend = frontier_legend()
    return (
        '<section aria-labelledby="frontier-title"><h2 id="frontier-title">What other budgets cost</h2>'
        f'<p class="note">{note}</p>{legend}{frontier_plot(points, chosen, measured)}'
        f"{_in_figures(headers, rows, chosen)}</section>"
    )


def modules_table(plan: Timeline, stored: Timeline) -> str:
    """Every module with what it costs; folded by the page's script to about as many rows as fit a screen."""
    tree = module_tree(plan)
    kept_by_store_all = {node.total.module: node.total.stored_bytes for node in module_tree(stored)}
    opened = _opened_depth(tree)
    rows = []
    for node in tree:
        row = node.total
        kept = kept_by_store_all.get(row.module, 0)
        cells = [
            _number(_seconds(row.forward_s)),
            _number(_seconds(row.backward_s)),
            _number(_seconds(row.recompute_s), row.recompute_s / (row.forward_s or 1), "time"),
            _number(_bytes(row.stored_bytes), row.stored_bytes / (kept or 1)),
            _number(_bytes(kept)),
            _number(_bytes(row.peak_bytes)),
        ]
        rows.append(
            f'<tr data-parent="{node.parent}"><th scope="row" style="--depth:{node.depth}" title="{escape(row.title)}">'
            f"{_name(node, opened)}</th>{''.join(cells)}</tr>"
        )
    heads = ("Forward", "Backward", "Recomputed", "Stored", "Stored by store-all", "Live at the peak")
    head = "".join(f'<th scope="col"{_NUMBER}>{name}</th>' for name in heads)
    return (
        '<div class="edge"><div class="scroll" tabindex="0" role="region" aria-labelledby="modules-title">'
        f'<table class="modules" id="modules"><thead><tr><th scope="col">Module</th>{head}</tr></thead>'
        f"<tbody>{chr(10).join(rows)}</tbody></table></div></div>"
    )


def _in_figures(headers: Sequence[str], rows: Sequence[Sequence[str]], chosen: int | None = None) -> str:
    """A folded table that says what a drawing shows."""
    head = "".join(f'<th scope="col"{_NUMBER if at else ""}>{name}</th>' for at, name in enumerate(headers))
    lines = []
    for at, (name, *cells) in enumerate(rows):
        mark, more = (' class="chosen-row"', " (this plan)") if at == chosen else ("", "")
        values = "".join(f"<td{_NUMBER}>{cell}</td>" for cell in cells)
        lines.append(f'<tr{mark}><th scope="row">{name}{more}</th>{values}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{", ".join(headers)}">{table}</div>'
    return f'<details><summary>The same in figures</summary><div class="edge">{region}</div></details>'


def _name(node: ModuleNode, opened: int) -> str:
    last = node.total.module.split(".")[-1]
    if last.isdigit():  # a bare number says little
        last = ".".join(node.total.module.split(".")[-2:])
    text = escape(last or node.total.title)
    if not node.has_children:
        return f'<span class="leaf">{text}</span>'
    expanded = "true" if node.depth < opened else "false"
    return f'<button type="button" disabled aria-expanded="{expanded}">{text}</button>'


def _opened_depth(tree: Sequence[ModuleNode]) -> int:
    deepest = max(node.depth for node in tree)
    fits = (depth for depth in range(deepest, 1, -1) if sum(node.depth <= depth for node in tree) <= _OPEN_ROWS)
    return next(fits, 1)


def _number(text: str, share: float = 0.0, kind: str = "") -> str:
    width = f"width:{100 * min(share, 1):.1f}%"
    bar = f'<span class="track"><span class="bar {kind}" style="{width}"></span></span>' if share > 0 else ""
    return f'<td class="number{" zero" if text == "0" else ""}">{text}{bar}</td>'


def _seconds(time_s: float) -> str:
    return format_seconds(time_s) if time_s else "0"


def _bytes(size_bytes: int) -> str:
    return format_bytes(size_bytes) if size_bytes else "0"


def _live_when_the_backward_begins(timeline: Timeline) -> str:
    sizes = timeline.graph.storages
    kept = (one for one in timeline.instances if one.birth < timeline.boundary <= one.death)
    return format_bytes(sum(sizes[one.storage] for one in kept))


def _peak_within(first: int | None, last: int | None, timeline: Timeline) -> str:
    runs = timeline.executions[:last] if last is not None else timeline.executions[first:]
    return format_bytes(max((run.live_bytes for run in runs), default=0))


_MOMENTS: tuple[tuple[str, Callable[[Timeline], str]], ...] = (
    ("Peak of the forward", lambda one: _peak_within(None, one.boundary, one)),
    ("Kept from the forward for the backward", _live_when_the_backward_begins),
    ("Peak of the backward", lambda one: _peak_within(one.boundary, None, one)),
    ("Peak of the step", lambda one: format_bytes(one.peak_bytes)),
    ("Executions", lambda one: f"{len(one.executions):,}"),
    ("Executions in the forward", lambda one: f"{one.boundary:,}"),
    ("Compute time", lambda one: format_seconds(one.time_s)),
)
