"""The plot of planning time over the number of ops: PNG to look at, SVG for the page."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import Record
from benchmarks.solver.records import Speed

SIZES = (("1k", 1_000, 1.0), ("10k", 10_000, 10.0), ("100k", 100_000, 120.0))  # label, ops, limit in seconds
COLOURS = ("#1f5fa8", "#c4501b", "#2a7d4f", "#7a3e9d")
LIMIT = "#b00020"
MARKERS = ("o", "s", "^", "D")


def fingerprint(record: Path) -> str:
    """Return what the SVG holds of the record that it was drawn from."""
    return f"drawn from {hashlib.sha256(record.read_bytes()).hexdigest()[:16]}"


def is_fresh(record: Path) -> bool:
    """Whether the SVG beside a record was drawn from it."""
    page = record.with_suffix(".svg")
    return page.exists() and fingerprint(record) in page.read_text(encoding="utf-8")


def draw(record: Path) -> None:
    """Write the plot of a record beside it."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "rematerialize", "font.size": 11})
    from matplotlib import pyplot

    rows = Record.load(record, Speed).rows
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained", facecolor="white")
    _shapes(axes, rows)
    _captured(axes, [row for row in rows if row.ran and not row.shape])
    for _, ops, limit_s in SIZES:
        axes.plot([ops / 2, ops * 2], [limit_s, limit_s], color=LIMIT, linewidth=2.5, solid_capstyle="butt", zorder=1)
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "center", "color": LIMIT}
        axes.annotate(f"limit {limit_s:g} s", (ops / 2, limit_s), (-5, 0), **style)
    axes.set(xscale="log", yscale="log", xlim=(150, 300_000), xlabel="ops of the training step, forward and backward")
    axes.set_ylabel("planning time in seconds")
    axes.set_title("Time to plan a training step within half of its store-all peak", loc="left")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(which="major", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(record.with_suffix(".png"), dpi=120, metadata={"Software": None})
    metadata = {"Date": None, "Description": fingerprint(record)}
    figure.savefig(record.with_suffix(".svg"), metadata=metadata)
    pyplot.close(figure)


def slopes(rows: Sequence[Speed]) -> dict[str, float]:
    """Return the exponent of each shape's growth that ran at two sizes or more."""
    found = {}
    for shape in dict.fromkeys(row.shape for row in rows if row.shape):
        points = [(math.log(row.ops), math.log(row.wall_s)) for row in rows if row.shape == shape and row.ran]
        if len(points) > 1:
            found[shape] = statistics.linear_regression(*zip(*points, strict=True)).slope
    return found


def _shapes(axes: Any, rows: tuple[Speed, ...]) -> None:
    """Draw one line per synthetic shape."""
    slope = slopes(rows)
    names = dict.fromkeys(row.shape for row in rows if row.shape and row.ran)
    for shape, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
        mine = sorted((row for row in rows if row.shape == shape and row.ran), key=lambda row: row.ops)
        label = f"{shape}: grows as ops^{slope[shape]:.2f}" if shape in slope else shape
        axes.plot(
            [r.ops for r in mine], [r.wall_s for r in mine], color=colour, marker=marker, label=label, linewidth=1.6
        )


def _captured(axes: Any, rows: list[Speed]) -> None:
    """Draw one point per captured model."""
    if rows:
        axes.plot(
            [row.ops for row in rows],
            [row.wall_s for row in rows],
            linestyle="",
            marker="x",
            markersize=8,
            markeredgewidth=2,
            color="black",
            label="captured models",
        )
