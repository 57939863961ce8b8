"""A schedule: which ops to run, in which order, recomputations included.

The JSON form is ``rematerialize.schedule/1``. Frees are implicit: a storage instance dies after the
op that uses it last; computing an op again makes new instances of its outputs, and later uses read
the newest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rematerialize.errors import ScheduleError

FORMAT = "rematerialize.schedule/1"


@dataclass(frozen=True, slots=True)
class Schedule:
    """The op names to run in the forward and in the backward, in order.

    Attributes
    ----------
    forward : tuple of str
        Forward ops, possibly some of them several times.
    backward : tuple of str
        Every backward op once, forward ops again wherever they are recomputed.
    budget_bytes : int
        The budget that it was made for.
    solver : str
        Registry name of the solver that found it, or that local search began with; "search" where that began with
        storing everything.
    peak_bytes : int
        Peak memory by the simulator, in bytes.
    time_s : float
        Makespan: the sum of the times of everything that it runs.
    minimum_bytes : int
        The smallest budget for which the solver found a schedule.
    gap : float, optional
        Makespan over a proven lower bound of every schedule within the budget, minus 1; None if none was made.

    Examples
    --------
    >>> plan = Schedule(("a",), ("a", "da"), 64, "store_all", 48, 3.0, 32)
    >>> Schedule.from_json(plan.to_json()) == plan
    True
    """

    forward: tuple[str, ...]
    backward: tuple[str, ...]
    budget_bytes: int
    solver: str
    peak_bytes: int
    time_s: float
    minimum_bytes: int
    gap: float | None = None

    def verify(self) -> Schedule:
        """Return the schedule itself; raise ScheduleError when a field has a wrong type or range.

        Whether it is a valid schedule *of a graph* is for `rematerialize.simulate` to judge.
        """
        for key in ("forward", "backward"):
            names = getattr(self, key)
            if not isinstance(names, tuple):
                raise ScheduleError(f"schedule: {key} must be a list of op names, got {type(names).__name__}")
            for name in names:
                if not isinstance(name, str):
                    raise ScheduleError(f"schedule: {key} must hold op names, got {name!r}")
        for key in ("budget_bytes", "peak_bytes", "minimum_bytes"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ScheduleError(f"schedule: {key} must be a whole number of bytes >= 0, got {value!r}")
        if not isinstance(self.solver, str):
            raise ScheduleError(f"schedule: solver must be a string, got {self.solver!r}")
        if not isinstance(self.time_s, float) or not math.isfinite(self.time_s) or self.time_s < 0:
            raise ScheduleError(f"schedule: time_s must be a finite number >= 0, got {self.time_s!r}")
        if self.gap is not None and (not isinstance(self.gap, float) or not self.gap >= 0):
            raise ScheduleError(f"schedule: gap must be a number >= 0 or null, got {self.gap!r}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the schedule; JSON has no infinity, and a gap without end is none known."""
        known = self.gap is not None and math.isfinite(self.gap)
        return {"format": FORMAT, **asdict(self), "gap": self.gap if known else None}

    def to_json(self) -> str:
        """Return the text of a ``rematerialize.schedule/1`` file."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, source: str | bytes | Mapping[str, Any]) -> Schedule:
        """Read a schedule from the text of a file, or from the object already parsed.

        Raises
        ------
        ScheduleError
            Not JSON, another format, a missing key or a wrong type.
        """
        data = source if isinstance(source, Mapping) else _parse(source)
        if data.get("format") != FORMAT:
            raise ScheduleError(f"schedule: format is {data.get('format')!r}, need {FORMAT!r}")
        values: dict[str, Any] = {}
        for key in cls.__slots__:
            if key not in data and key == "gap":
                continue
            if key not in data:
                raise ScheduleError(f"schedule: the key {key!r} is missing")
            value = data[key]
            values[key] = tuple(value) if isinstance(value, list) else value
        for key in ("time_s", "gap"):
            if isinstance(values.get(key), int) and not isinstance(values[key], bool):
                try:
                    values[key] = float(values[key])
                except OverflowError:
                    raise ScheduleError(f"schedule: {key} is too large for a float") from None
        return cls(**values).verify()


def _parse(text: str | bytes) -> Mapping[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ScheduleError(f"schedule: not a JSON file ({error})") from None
    if not isinstance(data, dict):
        raise ScheduleError(f"schedule: the file must hold one object, got {type(data).__name__}")
    return data
