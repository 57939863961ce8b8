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
    from rematerialize.api import Plan, frontier, plan, plans_of, unwrap, wrap
    from rematerialize.batches import max_batch
    from rematerialize.profiling import Profile, profile
    from rematerialize.report.batches import MaxBatch

__all__ = [
    "BudgetError",
    "CaptureError",
    "EmitError",
    "GraphError",
    "MaxBatch",
    "Plan",
    "PlanMismatchError",
    "Profile",
    "RematerializeError",
    "ScheduleError",
    "UnitError",
    "__version__",
    "frontier",
    "max_batch",
    "plan",
    "plans_of",
    "profile",
    "unwrap",
    "wrap",
]

_HOMES = {
    "Plan": "api",
    "frontier": "api",
    "plan": "api",
    "plans_of": "api",
    "unwrap": "api",
    "wrap": "api",
    "MaxBatch": "report.batches",
    "max_batch": "batches",
    "Profile": "profiling",
    "profile": "profiling",
}


def __getattr__(name: str) -> object:
    """Import what needs torch at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rematerialize' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"rematerialize.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
