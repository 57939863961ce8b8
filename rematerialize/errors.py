"""The exception tree: every failure that a user can meet has one class here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path


class RematerializeError(Exception):
    """Base class of every error that this package raises on purpose."""


class UnitError(RematerializeError, ValueError):
    """A budget or another quantity that can't be read."""


class GraphError(RematerializeError, ValueError):
    """A training graph (or its file) that breaks a rule of the format."""


class ScheduleError(RematerializeError, ValueError):
    """A schedule (or its file) that the graph or the budget doesn't allow."""


class CaptureError(RematerializeError):
    """The model's training step can't be captured as a graph."""


class TargetError(RematerializeError, ValueError):
    """What should be trained can't be had: a wrong target, input spec, type or device, or an error of the target's."""


class EmitError(RematerializeError):
    """A valid schedule can't be turned into executable code."""


class PlanMismatchError(RematerializeError, ValueError):
    """A saved plan that belongs to another model, input signature or step."""


class UncheckedPlanWarning(UserWarning):
    """A plan file of before digests: figures in it that no replay gives are taken as it says them."""


class BudgetError(RematerializeError):
    """No schedule fits the budget.

    Attributes
    ----------
    minimum_bytes : int
        The smallest budget, in bytes and in the scope in which the budget was given, that works:
        planning with exactly this budget succeeds, with one byte less it raises again.
    """

    def __init__(self, message: str, *, minimum_bytes: int) -> None:
        super().__init__(message)
        self.minimum_bytes = minimum_bytes

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_budget_error, (str(self), self.minimum_bytes))


def _rebuild_budget_error(message: str, minimum_bytes: int) -> BudgetError:
    return BudgetError(message, minimum_bytes=minimum_bytes)


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that memory ran out: torch's CPU allocator has no class for that."""
    while error is not None:
        named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if named or "can't allocate memory" in str(error):
            return True
        error = error.__cause__
    return False


def did_you_mean(given: str, known: Iterable[str], shown: Mapping[str, str] | None = None) -> str:
    """Return ``; did you mean 'x'?`` for the closest of some names, or an empty string when none is close.

    ``shown`` has what to write for a name, where that isn't the name.

    >>> did_you_mean("float23", ["int64", "float32"])
    "; did you mean 'float32'?"
    >>> did_you_mean("modle", ["model"], {"model": "model.py"})
    "; did you mean 'model.py'?"
    """
    by_fold = {name.casefold(): (shown or {}).get(name, name) for name in known}
    close = difflib.get_close_matches(given.casefold(), by_fold, n=1, cutoff=0.6)
    return f"; did you mean {by_fold[close[0]]!r}?" if close else ""


def closest_file(path: Path, pattern: str = "*") -> str:
    """`did_you_mean` for a file that is missing, by those beside it: by their stems, since suffixes are no likeness."""
    beside = path.parent.glob(pattern) if path.parent.is_dir() else ()
    there = {found.stem: found.name for found in beside if found.is_file()}
    return did_you_mean(path.stem, there, there)
