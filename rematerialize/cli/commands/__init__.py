"""One file per command; importing this registers them all, in the order of the help."""

from __future__ import annotations

from rematerialize.cli.commands import plan, export, solve, zoo, doctor  # isort: skip

__all__ = ["doctor", "export", "plan", "solve", "zoo"]
