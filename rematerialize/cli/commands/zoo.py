"""``zoo``: the models that come with the package, by the names that a target may have."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rematerialize.cli.app import command
from rematerialize.cli.completion import one_of
from rematerialize.cli.console import Console, on_terminal, terminal_width
from rematerialize.errors import TargetError, did_you_mean
from rematerialize.zoo import ENTRIES
from rematerialize.zoo.figures import Figures, figures
from rematerialize.zoo.spec import SCALES

_WIDE = 130  # columns of a terminal that has room for groups and parameters beside what is copied


@command
def zoo(
    console: Console,
    scale: Annotated[
        str,
        typer.Option("--scale", metavar="NAME", help="Sizes of test or bench.", autocompletion=one_of(lambda: SCALES)),
    ] = "test",
) -> None:
    """List the built-in models: zoo:NAME is a target, zoo:NAME@bench the larger scale of it."""
    if scale not in SCALES:
        raise TargetError(f"expected --scale as one of {', '.join(SCALES)}, got {scale!r}{did_you_mean(scale, SCALES)}")
    known = figures()
    if console.as_json:
        console.data("zoo", {"scale": scale, "models": [_entry(name, known[name][scale]) for name in ENTRIES]})
        return
    brief = on_terminal() and terminal_width() < _WIDE
    rows = []
    for name, spec in ENTRIES.items():
        size = known[name][scale]
        about = spec.about + (f" (needs {spec.missing()})" if spec.missing() else "")
        group = f"{spec.group}, fake only" if spec.fake_only else spec.group
        more = [] if brief else [group, f"{size.parameters:,}"]
        about += ", fake only" if brief and spec.fake_only else ""
        rows.append([f"zoo:{name}", *more, about, size.inputs])
    if brief:
        console.table("", ["target", "what it is", "default inputs"], rows, "<<<")
        return
    headers = ["target", "group", "parameters", "what it is", "default inputs"]
    console.table("", headers, rows, "<<><<")


def _entry(name: str, size: Figures) -> dict[str, Any]:
    spec = ENTRIES[name]
    return {
        "target": f"zoo:{name}",
        "group": spec.group,
        "about": spec.about,
        "parameters": size.parameters,
        "inputs": size.inputs.split(),
        "fake_only": spec.fake_only,
        "needs": spec.requires,
        "missing": bool(spec.missing()),
    }
