"""The drawings of a page: memory over the step, the strip of the schedule, the frontier. SVG scales, text is HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rematerialize.report.curves import SIDE, Frame, Tick, edges, line, path, size_ticks, spans, x_ticks
from rematerialize.report.lanes import lanes
from rematerialize.report.timeline import Timeline
from rematerialize.units import format_bytes, format_percent, format_seconds

_SVG = f'<svg viewBox="0 0 {SIDE:g} {SIDE:g}" preserveAspectRatio="none" aria-hidden="true" focusable="false">'


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One plan of the budget / overhead curve.

    Attributes
    ----------
    budget_bytes, peak_bytes : int
        What it was made for and what it needs.
    overhead : float
        Makespan / store-all makespan - 1.
    """

    budget_bytes: int
    peak_bytes: int
    overhead: float


def legend() -> str:
    """What the lines of the memory drawing are, told apart by weight and dashes as well as by colour."""
    store_all = '<rect class="store-all-area" y="5" width="30" height="10"/><path class="store-all-line" d="M0 5H30"/>'
    plan = '<rect class="plan-area" y="5" width="30" height="10"/><path class="plan-line" d="M0 5H30"/>'
    marks = (
        (plan, "this plan"),
        (store_all, "store-all: every activation is kept"),
        ('<path class="budget-line" d="M0 8H30"/>', "activation budget"),
        ('<path class="boundary-line" d="M15 0V15"/>', "the backward begins"),
    )
    items = (f'<li><svg viewBox="0 0 30 15" aria-hidden="true">{mark}</svg>{name}</li>' for mark, name in marks)
    return f'<ul class="legend">{"".join(items)}</ul>'


def memory_plot(plan: Timeline, stored: Timeline, area: Frame, budget_bytes: int) -> str:
    """Store-all and the plan over the step, the budget as a line, where the backward begins."""
    plan_line, stored_line = line(plan, area), line(stored, area)
    budget = area.y(budget_bytes)
    begins = area.x(edges(plan, area)[plan.boundary])
    drawing = [
        *(f'<path class="grid" d="M0 {tick.at:.1f}H{SIDE:g}"/>' for tick in size_ticks(area)),
        f'<path class="store-all-area" d="{path(stored_line, closed=True)}"/>',
        f'<path class="plan-area" d="{path(plan_line, closed=True)}"/>',
        f'<path class="store-all-line" d="{path(stored_line)}"/>',
        f'<path class="plan-line" d="{path(plan_line)}"/>',
        f'<path class="boundary-line" d="M{begins:.2f} 0V{SIDE:g}"/>',
        f'<path class="budget-line" d="M0 {budget:.1f}H{SIDE:g}"/>',
        f'<path class="axis" d="M0 0V{SIDE:g}H{SIDE:g}"/>',
    ]
    marks = [
        _mark("top before", "forward", left=begins) if begins > SIDE / 8 else "",
        _mark("top after", "backward", left=begins) if begins < SIDE * 7 / 8 else "",
        _mark("budget", f"activation budget {format_bytes(budget_bytes)}", top=budget),
        _most(stored, area) if abs(area.y(stored.peak_bytes) - budget) > SIDE / 12 else "",
    ]
    label = "Memory over the step. Arrow keys move through its executions, P goes to the peak, B to the backward."
    return (
        f'<div class="plot" id="plot" aria-label="{label}">{_SVG}{"".join(drawing)}</svg>'
        f"{_axes(size_ticks(area), x_ticks(area), area)}{''.join(marks)}</div>"
    )


def strip(plan: Timeline, area: Frame) -> str:
    """One lane for each thing that a schedule does with an op, over the same axis as the memory."""
    items = []
    for lane in lanes(plan):
        count = len(lane.positions)
        boxes = "".join(
            f"M{left:g} 0H{right:g}V{SIDE:g}H{left:g}Z" for left, right in spans(plan, area, lane.positions)
        )
        spent = f"{format_seconds(lane.time_s)}" if lane.key in ("recomputed", "backward") else ""
        amount = spent or format_bytes(lane.size_bytes)
        items.append(
            f'<li title="{escape(lane.title)}: {escape(lane.meaning)}"><p class="lane-name"><span>{escape(lane.title)}'
            f'<span class="spoken">: {escape(lane.meaning)}</span></span>'
            f"<span>{count:,} {'op' if count == 1 else 'ops'}, {amount}</span></p>"
            f'<div class="lane">{_SVG}<path class="{lane.key}" d="{boxes}"/></svg></div></li>'
        )
    return f'<ul class="strip" id="strip">{"".join(items)}</ul>'


def frontier_legend() -> str:
    """What the marks of a frontier are where plans also ran, told apart by shape as well as by colour."""
    circle = '<circle class="predicted-key" cx="15" cy="7.5" r="5"/>'
    cross = '<path class="cross" d="M10 2.5L20 12.5M20 2.5L10 12.5"/>'
    marks = (
        (f'<path class="frontier-line" d="M0 7.5H30"/>{circle}', "predicted"),
        (f'<path class="measured-line" d="M0 7.5H30"/>{cross}', "measured"),
    )
    items = (f'<li><svg viewBox="0 0 30 15" aria-hidden="true">{mark}</svg>{name}</li>' for mark, name in marks)
    return f'<ul class="legend">{"".join(items)}</ul>'


def frontier_plot(points: Sequence[FrontierPoint], chosen: int | None, measured: Sequence[FrontierPoint] = ()) -> str:
    """Peak against overhead, a mark for each plan, the chosen one large and named, real steps as crosses."""
    overheads = [point.overhead for point in (*points, *measured)]
    top = max(overheads, default=0.0) * 1.1
    bottom = min((0.0, *overheads)) * 1.1  # a real step may be faster than the one that stores everything
    top, span = (top, top - bottom) if top > bottom else (0.01, 0.01)
    area = Frame(1.0, max(point.peak_bytes for point in (*points, *measured)) * 1.04, timed=False)

    def place(point: FrontierPoint) -> tuple[float, float]:
        return SIDE * point.peak_bytes / area.top_bytes, SIDE * (top - point.overhead) / span

    def drawn(line: Sequence[FrontierPoint], kind: str) -> str:
        corners = [place(point) for point in sorted(line, key=lambda point: point.peak_bytes)]
        return f'<path class="{kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in corners)}"/>' if line else ""

    x_marks = [Tick(SIDE - tick.at, tick.text) for tick in size_ticks(area)]
    y_marks = _overhead_ticks(top, span)
    grid = "".join(f'<path class="grid" d="M0 {tick.at:.1f}H{SIDE:g}"/>' for tick in y_marks)
    return (
        f'<div class="frontier-plot" aria-hidden="true">{_SVG}{grid}{drawn(measured, "measured-line")}'
        f'{drawn(points, "frontier-line")}<path class="axis" d="M0 0V{SIDE:g}H{SIDE:g}"/></svg>'
        f"{_axes(y_marks, x_marks, None)}"
        f'<span class="axis-name above">overhead</span><span class="axis-name below">peak memory of the step</span>'
        f"{''.join(_point(point, place(point), at == chosen) for at, point in enumerate(points))}"
        f"{''.join(_cross(point, place(point)) for point in measured)}</div>"
    )


def _overhead_ticks(top: float, span: float) -> list[Tick]:
    """Marks of an axis that ends at an overhead and is so long; 0 is one of them."""
    step = next(step for step in (0.0025, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 1e9) if span / step <= 5)
    marks = [step * at for at in range(-int((span - top) / step), int(top / step) + 1)] if step < 1e9 else [0.0, top]
    return [Tick(SIDE * (top - at) / span, f"{100 * at:g}%" if step < 0.01 else f"{100 * at:.0f}%") for at in marks]


def _cross(point: FrontierPoint, place: tuple[float, float]) -> str:
    x, y = place
    words = f"measured: {format_bytes(point.peak_bytes)}, {format_percent(point.overhead)}"
    return f'<span class="measured" style="left:{x / 10:.2f}%;top:{y / 10:.2f}%" title="{words}"></span>'


def _point(point: FrontierPoint, place: tuple[float, float], chosen: bool) -> str:
    x, y = place
    words = f"{format_bytes(point.peak_bytes)}, {format_percent(point.overhead)}"
    at = f"left:{x / 10:.2f}%;top:{y / 10:.2f}%"
    if not chosen:
        return f'<span class="point" style="{at}" title="{words}"></span>'
    late = x > SIDE * 0.66  # written to the right of the point, it would leave the drawing
    beside = f"right:0;top:{y / 10:.2f}%" if late else at
    named = f'<span class="mark chosen-name{" late" if late else ""}" style="{beside}">this plan: {words}</span>'
    return f'<span class="point chosen" style="{at}" title="{words}"></span>{named}'


def _axes(sizes: Sequence[Tick], moments: Sequence[Tick], area: Frame | None) -> str:
    texts = [f'<span class="tick size" style="top:{tick.at / 10:.2f}%">{tick.text}</span>' for tick in sizes]
    for at, tick in enumerate(moments):
        unit = " executions" if area and not area.timed and at == 0 else ""
        edge = " first" if unit else " last" if tick.at > SIDE * 0.96 else ""
        edge += " odd" if at % 2 and len(moments) > 4 else ""
        texts.append(f'<span class="tick moment{edge}" style="left:{tick.at / 10:.2f}%">{tick.text}{unit}</span>')
    return "".join(texts)


def _mark(kind: str, text: str, *, left: float | None = None, top: float | None = None) -> str:
    place = f"left:{left / 10:.2f}%" if left is not None else f"top:{(top or 0.0) / 10:.2f}%"
    return f'<span class="mark {kind}" style="{place}">{text}</span>'


def _most(stored: Timeline, area: Frame) -> str:
    """The name of store-all's peak, beside it."""
    if stored.peak_position < 0:
        return ""
    x = area.x(edges(stored, area)[stored.peak_position])
    side = " late" if x > SIDE * 0.5 else ""
    style = f"left:{x / 10:.2f}%;top:{area.y(stored.peak_bytes) / 10:.2f}%"
    return f'<span class="mark most{side}" style="{style}">store-all {format_bytes(stored.peak_bytes)}</span>'
