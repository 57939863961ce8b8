"""One file per command; importing this registers them all, in the order of the help."""

from __future__ import annotations

from rematerialize.cli.commands import export, plan, solve

__all__ = ["export", "plan", "solve"]
