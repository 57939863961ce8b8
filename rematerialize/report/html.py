"""A plan as one HTML file for people to show to others: no network, light and dark, usable with keys and on a phone."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from rematerialize.errors import RematerializeError
from rematerialize.ir import TrainingGraph
from rematerialize.report.curves import frame
from rematerialize.report.figures import FrontierPoint, legend, memory_plot, strip
from rematerialize.report.lanes import lanes
from rematerialize.report.origin import Origin
from rematerialize.report.page_tables import frontier_section, modules_table, moments_table
from rematerialize.report.payload import embedded_json, page_data
from rematerialize.report.timeline import Timeline, of_schedule, store_all
from rematerialize.schedule import Schedule
from rematerialize.units import format_bytes, format_percent, format_seconds
from rematerialize.version import __version__


def html_report(
    graph: TrainingGraph,
    schedule: Schedule,
    *,
    budget_bytes: int | None = None,
    resident_bytes: int | None = None,
    minimum_bytes: int | None = None,
    stored: Timeline | None = None,
    frontier: Sequence[FrontierPoint] = (),
    chosen: int | None = None,
    measured: Sequence[FrontierPoint] = (),
    title: str = "Memory plan of a training step",
    about: str = "",
    origin: Origin | None = None,
) -> str:
    """Return a page about a plan: its memory over time, its schedule, its modules, and the frontier if there is one.

    Parameters
    ----------
    graph : TrainingGraph
    schedule : Schedule
    budget_bytes : int, optional
        The line in the drawing; by default the schedule's budget.
    resident_bytes : int, optional
        What was in memory before the step, parameters and inputs among it: only to be mentioned.
    minimum_bytes : int, optional
        The smallest budget that works; by default the schedule's.
    stored : Timeline, optional
        The step that stores everything; by default the graph's own. Overheads are over its time.
    frontier : sequence of FrontierPoint
        Other plans of the same step, in any order.
    chosen : int, optional
        Position in `frontier` of the plan that the page is about.
    measured : sequence of FrontierPoint
        A real step of each plan of `frontier`, in its order, overheads over the first; none if they didn't run.
    title : str
    origin : Origin, optional
        What the plan was made for: told below the title, and the scope in which the page shows budgets.
    about : str
        A sentence below the page's first, where something is to be said about which plan it shows.

    Returns
    -------
    str
        HTML that refers to nothing outside itself, with whatever comes from the user escaped. Some 100 bytes per
        execution.

    Raises
    ------
    ScheduleError
        If the schedule isn't a valid one of the graph.
    RematerializeError
        If `chosen` isn't a position in `frontier`, or `measured` isn't of as many points.
    """
    if chosen is not None and not 0 <= chosen < len(frontier):
        raise RematerializeError(f"chosen must be a position in the frontier of {len(frontier)} points, got {chosen!r}")
    if measured and len(measured) != len(frontier):
        raise RematerializeError(f"measured must have one point for each of {len(frontier)}, got {len(measured)}")
    budget = schedule.budget_bytes if budget_bytes is None else budget_bytes
    origin = Origin() if origin is None else origin
    besides = (resident_bytes or 0) + origin.reserve_bytes if origin.whole else None
    plan = of_schedule(graph, schedule)
    stored = store_all(graph) if stored is None else stored
    minimum = schedule.minimum_bytes if minimum_bytes is None else minimum_bytes
    area = frame((plan, stored), budget_bytes=budget)
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = Template(_asset("page.html")).substitute(
        title=escape(title),
        origin=f'<p class="note">{escape(made_for)}</p>' if (made_for := origin.line()) else "",
        claim=_claim(plan, stored),
        about=f'<p class="note">{escape(about)}</p>' if about else "",
        figures=_figures(plan, stored, schedule, _budget(budget, minimum, besides)),
        keys_note="Point at the step, or move through it with the arrow keys."
        if plan.executions
        else "The step is empty.",
        above=_above(resident_bytes),
        legend=legend(),
        timeline=memory_plot(plan, stored, area, budget),
        strip=strip(plan, area),
        moments=moments_table(plan, stored),
        frontier=frontier_section(frontier, chosen, measured),
        modules=modules_table(plan, stored),
        footer=f"Made by rematerialize {__version__}. Memory and times are what the plan predicts"
        + (", but for those that are called measured." if measured else "."),
        data=embedded_json(page_data(plan, stored, area, budget)),
        style=_asset("page.css"),
        script=script,
        script_hash=digest,
    )
    return page.encode(errors="replace").decode()  # a name may hold half of a surrogate pair, a file can't


def _asset(name: str) -> str:
    return resources.files("rematerialize.report").joinpath("assets", name).read_text(encoding="utf-8")


def _above(resident_bytes: int | None) -> str:
    if resident_bytes is None:
        return "above what was resident when it began"
    return f"above the {format_bytes(resident_bytes)} of parameters, inputs and so on that were there when it began"


def _claim(plan: Timeline, stored: Timeline) -> str:
    """The page in one sentence."""
    share = format_percent(plan.peak_bytes / max(stored.peak_bytes, 1))
    again = sum(run.recomputes for run in plan.executions)
    if not again:
        return f"The step peaks at {format_bytes(plan.peak_bytes)} and recomputes nothing."
    cost = format_percent(plan.time_s / stored.time_s - 1) if stored.time_s else "an unknown amount of"
    return (
        f"The step peaks at {format_bytes(plan.peak_bytes)} instead of {format_bytes(stored.peak_bytes)}, "
        f"{share} of what storing everything takes, for {cost} more compute time."
    )


def _budget(budget_bytes: int, minimum_bytes: int, besides_bytes: int | None) -> tuple[tuple[str, str, str], ...]:
    """The budget in the scope in which it was asked for, and what of it is for activations."""
    allowed, least = format_bytes(budget_bytes), format_bytes(minimum_bytes)
    if besides_bytes is None:
        return (("Activation budget", allowed, f"smallest that works: {least}"),)
    whole, least_whole = format_bytes(budget_bytes + besides_bytes), format_bytes(minimum_bytes + besides_bytes)
    return (
        ("Budget", whole, f"smallest that works: {least_whole}"),
        ("Activation budget", allowed, f"what residents leave of it; at least {least}"),
    )


def _figures(plan: Timeline, stored: Timeline, schedule: Schedule, budget: tuple[tuple[str, str, str], ...]) -> str:
    by_key = {lane.key: lane for lane in lanes(plan)}
    again = by_key["recomputed"]
    share = format_percent(plan.peak_bytes / max(stored.peak_bytes, 1))
    overhead = format_percent(plan.time_s / stored.time_s - 1) if stored.time_s else "unknown"
    gap = schedule.to_dict()["gap"]
    proven = "" if gap is None else f"at most {format_percent(gap)} above the least possible"
    rows = (
        *budget,
        ("Peak", format_bytes(plan.peak_bytes), f"{share} of store-all"),
        ("Store-all peak", format_bytes(stored.peak_bytes), "without recomputation"),
        ("Overhead", overhead, "more compute time"),
        ("Step", format_seconds(plan.time_s), proven or f"store-all {format_seconds(stored.time_s)}"),
        (
            "Recomputed",
            f"{(count := len(again.positions)):,} {'op' if count == 1 else 'ops'}",
            f"of {len(plan.graph.ops):,}, {format_seconds(again.time_s)}",
        ),
    )
    return "\n".join(f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in rows)
