"""The file of a plan: JSON of which nothing is believed unchecked.

Figures that follow from graph and schedule are replayed where a plan is loaded. Others, such as the peak of a step that
stores everything in another way than the plan's graph, can't be: a digest over all of them, which newer files carry,
tells whether they are still those that were saved. Of older files, a warning says which figures are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

from rematerialize.errors import GraphError, ScheduleError, UncheckedPlanWarning, closest_file

FORMAT = "rematerialize.plan/1"
_NUMBERS: dict[str, Any] = {
    "budget_bytes": int,
    "store_all_peak_bytes": int,
    "store_all_time_s": (int, float),
    "minimum_bytes": int,
    "resident_bytes": int,
    "plan_s": (int, float),
}
_SEALED = (*_NUMBERS, "peak_bytes", "overhead", "gap", "made_for", "graph", "schedule")


def digest(data: dict[str, Any]) -> str:
    """SHA-256 of what a plan says, whatever the order of its keys and however its numbers are written.

    >>> digest({"budget_bytes": 8, "gap": 0.0}) == digest({"gap": 0, "budget_bytes": 8.0, "other": 1})
    True
    """
    said = _plain({key: data[key] for key in _SEALED if key in data})
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_plan(path: str | Path) -> dict[str, Any]:
    """The JSON of a plan, by its look.

    Raises
    ------
    ScheduleError, GraphError
        If there is no such file or it isn't a plan.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScheduleError(f"expected a plan file, but there is no file {path}{closest_file(Path(path))}") from None
    except OSError as error:
        raise ScheduleError(f"can't read the plan {path}: {error.strerror}") from error
    except RecursionError:
        raise ScheduleError(f"{path} is not a plan: it is nested too deeply; save the plan again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ScheduleError(f"{path} is not a plan: it isn't valid JSON ({error}); save the plan again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ScheduleError(f"{path} is not a plan: expected format {FORMAT!r}, got {found!r}")
    for key in ("graph", "schedule"):
        if not isinstance(data.get(key), dict):
            raise GraphError(f"{path} is not a complete plan: {key!r} is missing; save the plan again")
    return data


def read_numbers(path: str | Path, data: dict[str, Any]) -> dict[str, Any]:
    """Its own figures.

    Raises
    ------
    ScheduleError
        If one is missing or no number that is not negative.
    """
    numbers = {}
    for key, kind in _NUMBERS.items():
        value = data.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ScheduleError(f"{path}: {key} must be a number that is not negative, got {value!r}")
        numbers[key] = value
    return numbers


def check_said(path: str | Path, data: dict[str, Any], computed: dict[str, float | None]) -> None:
    """Hold figures against those that follow from the rest, and all of the file against its digest.

    A file that has none is of before digests, and a `UncheckedPlanWarning` says so to whoever loads it: `Plan.load`'s
    caller. What else only files with a digest have was cut from one.

    Raises
    ------
    ScheduleError
        If they differ, or a digest is missing that was there.
    """
    for key, value in computed.items():
        if not _agree(data.get(key), value):
            raise ScheduleError(f"{path}: {key} is {data.get(key)!r}, its schedule gives {value!r}; make a new plan")
    if not data.get("digest"):
        if "made_for" in data:
            raise ScheduleError(f"{path}: its digest is gone, without which it can't be trusted; make a new plan")
        warnings.warn(
            f"{path} has no digest: what is resident, the smallest budget, and peak and time of storing everything "
            "can't be checked; make a new plan to be sure of them",
            UncheckedPlanWarning,
            stacklevel=3,
        )
    elif data["digest"] != digest(data):
        raise ScheduleError(
            f"{path}: something in it was changed since it was saved (its digest is another): figures that a replay "
            "doesn't give can't be trusted; make a new plan"
        )


def _agree(said: object, computed: float | None) -> bool:
    """Whether a figure of a file is the one that follows from the rest of it, as far as text holds numbers."""
    if computed is None or not isinstance(said, (int, float)) or isinstance(said, bool):
        return said is computed
    return math.isclose(said, computed, rel_tol=1e-9, abs_tol=1e-12)


def _plain(value: Any) -> Any:
    """The same with one kind of number: tools write 0.0 as 0."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
