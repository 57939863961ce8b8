"""Memory over the step as drawn lines: coordinates, few enough points for any length, and round ticks.

Drawings are 1000 wide and 1000 high, y down, whatever size they get on a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rematerialize.report.timeline import Timeline
from rematerialize.units import format_bytes, format_seconds

SIDE = 1000.0
COLUMNS = 1000  # more points than pixels can't be told apart
_SHORTEST_S = 1e-12  # a step without times is drawn over its executions


@dataclass(frozen=True, slots=True)
class Frame:
    """What the two axes of a drawing span.

    Attributes
    ----------
    span : float
        Of the x axis, from 0: seconds, or executions where an op's time is of no use.
    top_bytes : float
        Of the y axis, from 0.
    timed : bool
        Whether x is time.
    """

    span: float
    top_bytes: float
    timed: bool

    def x(self, value: float) -> float:
        """Where a position of the x axis is drawn."""
        return SIDE * value / self.span

    def y(self, size_bytes: float) -> float:
        """Where a size is drawn."""
        return SIDE * (1 - size_bytes / self.top_bytes)


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark of an axis: where it is drawn, from 0 to 1000, and its text with the unit."""

    at: float
    text: str


def frame(timelines: Sequence[Timeline], *, budget_bytes: int = 0) -> Frame:
    """The smallest frame that holds some timelines and a budget, with a little air above."""
    time_s = max((one.time_s for one in timelines), default=0.0)
    count = max((len(one.executions) for one in timelines), default=0)
    top = max((budget_bytes, *(one.peak_bytes for one in timelines)), default=0)
    timed = time_s >= _SHORTEST_S
    return Frame(time_s if timed else float(max(count, 1)), max(top, 1) * 1.1, timed=timed)


def edges(timeline: Timeline, area: Frame) -> list[float]:
    """Where executions begin on the x axis, and where the last one ends: one more number than executions."""
    if not area.timed:
        return [float(at) for at in range(len(timeline.executions) + 1)]
    return [*(run.start_s for run in timeline.executions), timeline.time_s]


def corners(timeline: Timeline, area: Frame, *, columns: int = COLUMNS) -> list[tuple[float, int]]:
    """The corners of the line of memory over the step, as (position on the x axis, bytes).

    Of the executions that begin within one of `columns` equal parts of the axis, the first, the least, the largest and
    the last remain, so that no peak is lost. At most 8 corners per column.
    """
    starts = edges(timeline, area)
    values = [run.live_bytes for run in timeline.executions]
    found: list[tuple[float, int]] = []
    for first, last in _columns(starts, area, columns):
        if last - first <= 4:
            kept = list(range(first, last))
        else:
            inside = range(first, last)
            low, high = min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)
            kept = sorted({first, low, high, last - 1})
        for at in kept:
            before = [(starts[at], found[-1][1])] if found else []
            found += [*before, (starts[at], values[at])]
    if found:
        found.append((starts[-1], found[-1][1]))
    return found


def line(timeline: Timeline, area: Frame, *, columns: int = COLUMNS) -> list[tuple[float, float]]:
    """The same corners as they are drawn."""
    return [(round(area.x(x), 2), round(area.y(size), 1)) for x, size in corners(timeline, area, columns=columns)]


def path(points: Sequence[tuple[float, float]], *, closed: bool = False) -> str:
    """A line of corners as the path of an SVG; closed, with the area down to the axis."""
    if not points:
        return ""
    steps = [f"M{points[0][0]:g} {points[0][1]:g}"]
    for (x, y), (_, before) in zip(points[1:], points, strict=False):
        steps.append(f"V{y:g}" if y != before else f"H{x:g}")
    if closed:
        steps.append(f"V{SIDE:g}H{points[0][0]:g}Z")
    return "".join(steps)


def spans(timeline: Timeline, area: Frame, positions: Sequence[int]) -> list[tuple[float, float]]:
    """Where some executions stand on the x axis, as intervals that don't touch, each at least one column wide."""
    starts = edges(timeline, area)
    least = SIDE / COLUMNS
    found: list[tuple[float, float]] = []
    for at in positions:
        left, right = area.x(starts[at]), area.x(starts[at + 1])
        left, right = (left, right) if right - left >= least else (min(left, SIDE - least), left + least)
        if found and left <= found[-1][1] + least / 2:
            found[-1] = (found[-1][0], max(right, found[-1][1]))
        else:
            found.append((left, right))
    return [(round(left, 2), round(min(right, SIDE), 2)) for left, right in found]


def size_ticks(area: Frame, *, most: int = 5) -> list[Tick]:
    """Marks of the y axis, at multiples of a power of two; 0 is one of them."""
    step = 1
    while area.top_bytes / step > most:
        step *= 2
    return [Tick(area.y(at), _short(at)) for at in range(0, int(area.top_bytes) + 1, step)]


def x_ticks(area: Frame, *, most: int = 6) -> list[Tick]:
    """Marks of the x axis, at multiples of 1, 2 or 5 times a power of ten; 0 is one of them."""
    power = 10.0 ** math.floor(math.log10(area.span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if area.span / (power * factor) <= most)
    marks = [step * at for at in range(int(area.span / step + 1e-9) + 1)]
    return [Tick(area.x(at), "0" if not at else format_seconds(at) if area.timed else f"{at:,.0f}") for at in marks]


def _short(size_bytes: int) -> str:
    return format_bytes(size_bytes).replace(".00 ", " ") if size_bytes else "0"


def _columns(starts: Sequence[float], area: Frame, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of executions that begin within the same column."""
    first, column = 0, -1
    for at in range(len(starts) - 1):
        own = int(area.x(starts[at]) * columns / SIDE)
        if own != column and at > first:
            yield first, at
            first = at
        column = own
    if len(starts) > 1:
        yield first, len(starts) - 1
