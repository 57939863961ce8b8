"""``zoo``: the models that come with the package, by the names that a target may have."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rematerialize.cli.app import command
from rematerialize.cli.console import Console
from rematerialize.errors import TargetError, did_you_mean
from rematerialize.zoo import ENTRIES
from rematerialize.zoo.figures import Figures, figures
from rematerialize.zoo.spec import SCALES


@command
def zoo(
    console: Console,
    scale: Annotated[str, typer.Option("--scale", metavar="NAME", help="Sizes of test or bench.")] = "test",
) -> None:
    """List the built-in models: zoo:NAME is a target, zoo:NAME@bench the larger scale of it."""
    if scale not in SCALES:
        raise TargetError(f"expected --scale as one of {', '.join(SCALES)}, got {scale!r}{did_you_mean(scale, SCALES)}")
    known = figures()
    if console.as_json:
        console.data("zoo", {"scale": scale, "models": [_entry(name, known[name][scale]) for name in ENTRIES]})
        return
    rows = []
    for name, spec in ENTRIES.items():
        size = known[name][scale]
        about = spec.about + (f" (needs {spec.missing()})" if spec.missing() else "")
        group = f"{spec.group}, fake only" if spec.fake_only else spec.group
        rows.append([f"zoo:{name}", group, f"{size.parameters:,}", about, size.inputs])
    console.table("", ["target", "group", "parameters", "what it is", "default inputs"], rows, "<<><<")


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
