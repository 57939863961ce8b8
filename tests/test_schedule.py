"""The schedule file."""

from __future__ import annotations

from typing import Any

import pytest

from rematerialize.errors import ScheduleError
from rematerialize.schedule import Schedule

PLAN = Schedule(("a",), ("a", "da"), 64, "chain", 48, 3.25, 32)


def test_json_round_trip_is_exact() -> None:
    assert Schedule.from_json(PLAN.to_json()) == PLAN
    assert Schedule.from_json(PLAN.to_dict() | {"extra": 1}) == PLAN


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "x"),
        ("forward", "a"),
        ("forward", [1]),
        ("backward", None),
        ("budget_bytes", -1),
        ("budget_bytes", True),
        ("peak_bytes", 1.5),
        ("minimum_bytes", "3"),
        ("time_s", float("nan")),
        ("time_s", False),
        ("solver", 3),
    ],
)
def test_every_fault_is_one_error_that_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(ScheduleError, match=key):
        Schedule.from_json(PLAN.to_dict() | {key: value})


@pytest.mark.parametrize("key", ["forward", "backward", "budget_bytes", "solver", "time_s"])
def test_missing_keys_are_named(key: str) -> None:
    data = PLAN.to_dict()
    del data[key]
    with pytest.raises(ScheduleError, match=key):
        Schedule.from_json(data)


@pytest.mark.parametrize("text", ["", "[]", "{", PLAN.to_json()[:-9]])
def test_text_that_is_not_a_schedule_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        Schedule.from_json(text)
