"""One file per command; importing this registers them all, in the order of the help."""

from __future__ import annotations

from rematerialize.cli.commands import plan, verify, compare, export, solve, zoo, doctor  # isort: skip

__all__ = ["compare", "doctor", "export", "plan", "solve", "verify", "zoo"]
