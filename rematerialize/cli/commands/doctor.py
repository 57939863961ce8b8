"""``doctor``: is this environment fit to plan and train in?"""

from __future__ import annotations

from pathlib import Path

import typer

from rematerialize.cli.app import command
from rematerialize.cli.console import Console
from rematerialize.doctor import Check, examine
from rematerialize.version import __version__


@command
def doctor(console: Console) -> None:
    """Look at torch, the compiled kernel, extras, devices and the cost cache, and try a step.

    Exits with 1 when something essential is broken.
    """
    checks = [Check("rematerialize", "ok", __version__), kernel()]
    console.progress("trying a step")
    checks += examine()
    broken = [check.name for check in checks if check.state == "broken"]
    if console.as_json:
        found = [{"name": check.name, "state": check.state, "found": check.found} for check in checks]
        console.data("doctor", {"checks": found, "fit": not broken})
    else:
        rows = [[check.name, check.state, check.found] for check in checks]
        styles = [{"broken": "red", "note": "yellow"}.get(check.state, "") for check in checks]
        console.table("", ["part", "state", "found"], rows, "<<<", styles=styles)
    if broken:
        raise typer.Exit(1)


def kernel() -> Check:
    """Is the compiled kernel there, and no older than its sources?"""
    from rematerialize.solve import native

    again = "pip install again, with a C compiler"
    if not native.available:
        return Check("compiled kernel", "note", f"missing: plans are slower and weaker; {again}")
    folder = Path(native.__file__).parent
    built = max(path.stat().st_mtime for path in folder.glob("_kernel*"))
    newer = sorted(path.name for path in folder.glob("*.[ch]") if path.stat().st_mtime > built)
    if newer:
        return Check("compiled kernel", "note", f"older than {', '.join(newer)}; {again}")
    return Check("compiled kernel", "ok", "present")
