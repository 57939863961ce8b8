"""Train PyTorch models under a memory budget.

``wrap`` does, ``plan`` explains, ``frontier`` draws the budget / overhead curve. Everything that needs
torch is imported at first use, so ``import rematerialize`` and ``rematerialize solve`` stay free of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rematerialize.errors import (
    BudgetError,
    CaptureError,
    EmitError,
    GraphError,
    PlanMismatchError,
    RematerializeError,
    ScheduleError,
    UnitError,
)
from rematerialize.version import __version__

if TYPE_CHECKING:
    from rematerialize.api import Plan, frontier, plan, unwrap, wrap

__all__ = [
    "BudgetError",
    "CaptureError",
    "EmitError",
    "GraphError",
    "Plan",
    "PlanMismatchError",
    "RematerializeError",
    "ScheduleError",
    "UnitError",
    "__version__",
    "frontier",
    "plan",
    "unwrap",
    "wrap",
]

_FROM_API = frozenset({"Plan", "frontier", "plan", "unwrap", "wrap"})


def __getattr__(name: str) -> object:
    """Import the API at its first use (PEP 562)."""
    if name not in _FROM_API:
        raise AttributeError(f"module 'rematerialize' has no attribute {name!r}")
    value: object = getattr(importlib.import_module("rematerialize.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
