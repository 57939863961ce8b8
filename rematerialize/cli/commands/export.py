"""``export``: a plan file to a page for people, or to a file for another tool. Without torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rematerialize.cli.app import command
from rematerialize.cli.completion import one_of
from rematerialize.cli.console import Console
from rematerialize.cli.errors import UsageError
from rematerialize.cli.options import ForceOption, OutputOption, check_plan_file, existing_file
from rematerialize.errors import did_you_mean

if TYPE_CHECKING:
    from rematerialize.plans import Plan

_SUFFIXES = {
    "html": (".html", ".htm"),
    "perfetto": (".json",),
    "memory_viz": (".pickle", ".pkl"),
    "csv": (".csv",),
    "png": (".png",),
    "svg": (".svg",),
}


@command
def export(
    console: Console,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.JSON", help="What `plan -o` wrote.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            autocompletion=one_of(lambda: _SUFFIXES),
            help="html: a page to show to others; perfetto: a trace for ui.perfetto.dev; memory_viz: a snapshot for "
            "pytorch.org/memory_viz; csv: a row per execution; png, svg: a figure. By default, what -o ends in.",
        ),
    ] = None,
    output: OutputOption = None,
    force: ForceOption = False,
    others: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="PLAN.JSON",
            help="Another plan of the same step, for the frontier of the page. Repeat it.",
        ),
    ] = None,
) -> None:
    """Turn a plan file into a page, or into a file for another tool; it goes to -o, or to stdout."""
    check_plan_file(plan_file, "export")
    wanted = _format(format_, output)
    for path in others or ():
        existing_file(path, "a plan file for --with")
    _check(console, wanted, plan_file, output, force=force, others=others)
    plan = console.load_plan(plan_file)
    compared = [_other(console, plan, path) for path in others or ()]
    content = _html(plan, plan_file.name, compared) if wanted == "html" else _WRITERS[wanted](plan)
    if output is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    console.write(output, content)
    if console.as_json:
        console.data("export", {"format": wanted, "path": str(output), "size_bytes": len(content)})


def _check(
    console: Console, wanted: str, plan_file: Path, output: Path | None, *, force: bool, others: list[Path] | None
) -> None:
    """Refuse what can't be meant, before anything is read."""
    if output is None and wanted != "csv" and sys.stdout.isatty():
        example = f"{plan_file.stem}{_SUFFIXES[wanted][0]}"
        raise UsageError(f"{wanted} is not for a terminal: say where to write it, for example -o {example}")
    if others and wanted != "html":
        raise UsageError(f"--with adds plans to the page of --format html, there is no place for them in {wanted}")
    if output is not None and output.exists() and plan_file.exists() and output.samefile(plan_file):
        raise UsageError(f"-o {output} is the plan itself; write to another file")
    console.check_output(output, force=force)


def _other(console: Console, plan: Plan, path: Path) -> Plan:
    other = console.load_plan(path)
    if other.graph.content_hash() != plan.graph.content_hash():
        raise UsageError(f"{path} is a plan of another step, or was made with other costs; make both from one step")
    return other


def _format(name: str | None, output: Path | None) -> str:
    """The format that is asked for by name, by the suffix of -o, or by both if they agree."""
    if name is None:
        suffix = output.suffix.lower() if output is not None else ""
        by_suffix = [known for known, suffixes in _SUFFIXES.items() if suffix in suffixes]
        if not by_suffix:
            near = did_you_mean(suffix, [known for suffixes in _SUFFIXES.values() for known in suffixes])
            got = f", got -o {output}{near}" if output is not None else ""
            raise UsageError(
                f"expected --format, one of {', '.join(_SUFFIXES)}, or an -o that ends like one of them{got}"
            )
        return by_suffix[0]
    if name not in _SUFFIXES:
        close = difflib.get_close_matches(name.lower(), _SUFFIXES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown --format {name!r}: {hint}choose one of {', '.join(_SUFFIXES)}")
    suffix = output.suffix.lower() if output is not None else ""
    others = [known for known, suffixes in _SUFFIXES.items() if suffix in suffixes and known != name]
    if others:
        raise UsageError(
            f"-o {output} ends like --format {others[0]}, got --format {name}; end it in {' or '.join(_SUFFIXES[name])}"
        )
    return name


def _html(plan: Plan, name: str, others: Sequence[Plan]) -> bytes:
    from rematerialize.report.figures import FrontierPoint
    from rematerialize.report.html import html_report

    points = [FrontierPoint(one.budget_bytes, one.peak_bytes, one.overhead) for one in (plan, *others)]
    points.sort(key=lambda point: -point.peak_bytes)
    own = points.index(FrontierPoint(plan.budget_bytes, plan.peak_bytes, plan.overhead))
    return html_report(
        plan.graph,
        plan.schedule,
        budget_bytes=plan.budget_bytes,
        resident_bytes=plan.resident_bytes,
        minimum_bytes=plan.minimum_bytes,
        stored=plan.stored_timeline(),
        frontier=points if others else (),
        chosen=own if others else None,
        title=f"Memory plan of {plan.origin.target or f'a training step: {name}'}",
        origin=plan.origin,
    ).encode()


def _perfetto(plan: Plan) -> bytes:
    from rematerialize.report.perfetto import chrome_trace
    from rematerialize.report.timeline import of_schedule

    traced = of_schedule(plan.graph, plan.schedule)
    return f"{chrome_trace(traced, plan.stored_timeline(), budget_bytes=plan.budget_bytes)}\n".encode()


def _memory_viz(plan: Plan) -> bytes:
    from rematerialize.report.memory_viz import memory_snapshot
    from rematerialize.report.timeline import of_schedule

    return memory_snapshot(of_schedule(plan.graph, plan.schedule))


def _csv(plan: Plan) -> bytes:
    from rematerialize.report.table_csv import executions_csv
    from rematerialize.report.timeline import of_schedule

    return executions_csv(of_schedule(plan.graph, plan.schedule)).encode(errors="replace")


def _figure(suffix: str) -> Callable[[Plan], bytes]:
    def draw(plan: Plan) -> bytes:
        from rematerialize.report.plot import figure_bytes

        return figure_bytes(plan.plot(), suffix)

    return draw


_WRITERS: dict[str, Callable[[Plan], bytes]] = {
    "perfetto": _perfetto,
    "memory_viz": _memory_viz,
    "csv": _csv,
    "png": _figure("png"),
    "svg": _figure("svg"),
}
