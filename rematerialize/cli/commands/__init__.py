"""One file per command; importing this registers them all, in the order of the help."""

from __future__ import annotations

from rematerialize.cli.commands import profile, plan, frontier, max_batch, explain, verify, compare  # isort: skip
from rematerialize.cli.commands import export, solve, zoo, devices, doctor  # isort: skip

__all__ = [
    "compare",
    "devices",
    "doctor",
    "explain",
    "export",
    "frontier",
    "max_batch",
    "plan",
    "profile",
    "solve",
    "verify",
    "zoo",
]
