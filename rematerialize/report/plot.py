"""Memory over the step, and the frontier, as matplotlib figures. matplotlib is an extra: ``rematerialize[plot]``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rematerialize.errors import RematerializeError
from rematerialize.report.curves import corners, edges, frame, size_ticks, x_ticks
from rematerialize.report.figures import FrontierPoint
from rematerialize.report.timeline import Timeline
from rematerialize.units import format_bytes, format_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
_PLAN, _STORED, _BUDGET, _QUIET = "#0b5cad", "#7d858f", "#b3370a", "#535a63"


def memory_figure(plan: Timeline, stored: Timeline, *, budget_bytes: int, title: str = "") -> Figure:
    """Return a figure of memory over the step: the plan, store-all, the activation budget, where the backward begins.

    Raises
    ------
    RematerializeError
        If matplotlib isn't installed.
    """
    figure, axes = _canvas(title)
    area = frame((plan, stored), budget_bytes=budget_bytes)
    for timeline, colour, shade, width, name in (
        (stored, _STORED, 0.18, 1.0, f"store-all, {format_bytes(stored.peak_bytes)}"),
        (plan, _PLAN, 0.18, 1.6, f"this plan, {format_bytes(plan.peak_bytes)}"),
    ):
        points = corners(timeline, area)
        x, y = [at for at, _ in points], [size for _, size in points]
        axes.fill_between(x, y, color=colour, alpha=shade, linewidth=0)
        axes.plot(x, y, color=colour, linewidth=width, label=name)
    allowed = f"activation budget, {format_bytes(budget_bytes)}"
    axes.axhline(budget_bytes, color=_BUDGET, linestyle="--", linewidth=1.4, label=allowed)
    begins = edges(plan, area)[plan.boundary]
    axes.axvline(begins, color="black", linestyle=":", linewidth=1)
    for text, side, offset in (("forward", "right", -4), ("backward", "left", 4)):
        axes.annotate(
            text,
            (begins, 1),
            (offset, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha=side,
            color=_QUIET,
            fontsize=9,
        )
    axes.set_xlim(0, area.span)
    axes.set_ylim(0, area.top_bytes)
    x_marks, y_marks = x_ticks(area), size_ticks(area)
    axes.set_xticks([tick.at * area.span / 1000 for tick in x_marks], [tick.text for tick in x_marks])
    axes.set_yticks([area.top_bytes * (1 - tick.at / 1000) for tick in y_marks], [tick.text for tick in y_marks])
    axes.set_xlabel("predicted time" if area.timed else "execution")
    axes.set_ylabel("memory of the step")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=3, frameon=False, fontsize=9, borderaxespad=0)
    return figure


def frontier_figure(
    points: Sequence[FrontierPoint],
    *,
    chosen: int | None = None,
    measured: Sequence[FrontierPoint] = (),
    title: str = "",
) -> Figure:
    """Return a figure of peak against overhead, the chosen plan named, measured points beside the predicted ones.

    Raises
    ------
    RematerializeError
        If there are no points, `chosen` isn't a position among them, or matplotlib isn't installed.
    """
    if not points:
        raise RematerializeError("a frontier needs at least one point to be drawn, got none")
    if chosen is not None and not 0 <= chosen < len(points):
        raise RematerializeError(f"chosen must be a position in the frontier of {len(points)} points, got {chosen!r}")
    figure, axes = _canvas(title)
    sizes, overheads = _coordinates(points)
    axes.plot(
        sizes,
        overheads,
        color=_PLAN,
        marker="o",
        markerfacecolor="white",
        linewidth=1.6,
        clip_on=False,
        label="predicted",
    )
    real_sizes, real_overheads = _coordinates(measured)
    if measured:
        axes.plot(
            real_sizes,
            real_overheads,
            color=_BUDGET,
            marker="x",
            linestyle=":",
            linewidth=1.2,
            clip_on=False,
            label="measured",
        )
        axes.legend(loc="upper right", frameon=False, fontsize=9)
    area = frame((), budget_bytes=max(*sizes, *real_sizes, 0))
    axes.set_xlim(0, area.top_bytes)
    axes.set_ylim(min(*real_overheads, 0, 0) * 1.08, max(*overheads, *real_overheads, 0.5) * 1.08)
    marks = size_ticks(area)
    axes.set_xticks([area.top_bytes * (1 - tick.at / 1000) for tick in marks], [tick.text for tick in marks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.set_xlabel("peak memory of the step")
    axes.set_ylabel("overhead: compute time added")
    if chosen is not None:
        one = points[chosen]
        axes.plot([one.peak_bytes], [100 * one.overhead], "o", color=_BUDGET, markersize=9, clip_on=False)
        late = one.peak_bytes > area.top_bytes * 0.66  # written to the right of the point, it would leave the figure
        axes.annotate(
            f"this plan: {format_bytes(one.peak_bytes)}, {format_percent(one.overhead)}",
            (area.top_bytes if late else one.peak_bytes, 100 * one.overhead),
            (0 if late else 9, 12),
            textcoords="offset points",
            ha="right" if late else "left",
            color=_BUDGET,
            fontweight="bold",
        )
    return figure


def _coordinates(points: Sequence[FrontierPoint]) -> tuple[list[int], list[float]]:
    line = sorted(points, key=lambda point: point.peak_bytes)
    return [point.peak_bytes for point in line], [100 * point.overhead for point in line]


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the suffix of the path.

    Raises
    ------
    RematerializeError
        Another suffix, or a path that can't be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise RematerializeError(f"can't draw {str(path)!r}: the suffix must be one of {', '.join(SUFFIXES)}")
    content = figure_bytes(figure, suffix[1:])
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise RematerializeError(f"can't write the figure {path}: {error.strerror}") from error


def figure_bytes(figure: Figure, suffix: str) -> bytes:
    """A figure as the content of a file; `suffix` is "png", "svg" or "pdf"."""
    content = io.BytesIO()
    figure.savefig(content, dpi=160, format=suffix)
    return content.getvalue()


def _canvas(title: str) -> tuple[Figure, Axes]:
    """One pair of axes without pyplot, which would keep state and choose a window system."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RematerializeError(
            "drawing needs matplotlib, which isn't installed; pip install 'rematerialize[plot]'"
        ) from None
    figure = Figure(figsize=(8, 4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", color="#16191d", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#d5d9de", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes
