"""One file per command; importing this registers them all, in the order of the help."""

from __future__ import annotations

from rematerialize.cli.commands import doctor, plan, solve, zoo

__all__ = ["doctor", "plan", "solve", "zoo"]
