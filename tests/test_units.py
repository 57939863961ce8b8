"""Quantities: what is read, what is refused and how it is said."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rematerialize.errors import UnitError
from rematerialize.units import Budget, format_bytes, format_seconds, parse_budget, parse_bytes, percent


@pytest.mark.parametrize(
    ("value", "size_bytes"),
    [
        (1, 1),
        (np.int64(4096), 4096),
        ("8357888", 8357888),
        ("8GiB", 8 * 2**30),
        ("8 GiB", 8 * 2**30),
        (" 8gib ", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("512 MiB", 2**29),
        ("1.5kB", 1500),
        ("2 TiB", 2**41),
        ("100B", 100),
        ("0.3GB", 300_000_000),
    ],
)
def test_bytes_are_read_with_or_without_a_unit(value: int | str, size_bytes: int) -> None:
    assert parse_bytes(value) == size_bytes
    assert parse_budget(value) == Budget(size_bytes=size_bytes)


BAD_BUDGETS = [
    0,
    -1,
    "0",
    "0GiB",
    "0.1B",
    "-1GiB",
    "-30%",
    "0%",
    "101%",
    0.3,
    1.0,
    -0.5,
    float("nan"),
    float("inf"),
    "0.3",
    "nan",
    "inf",
    "nan GiB",
    "",
    " ",
    "%",
    "GiB",
    "8 Gib ibs",
    "8 Gb/s",
    "8GiBs",
    "8,5GiB",
    "1e9",
    "1_000",
    "٣GiB",
    "9" * 5000,
    "auto",
    "automatic",
    True,
    False,
    None,
    b"8GiB",
    [8],
    2 + 0j,
    object(),
]


@pytest.mark.parametrize("value", BAD_BUDGETS, ids=lambda value: repr(value)[:20])
def test_a_budget_that_is_not_a_positive_size_is_refused_in_one_line(value: object) -> None:
    with pytest.raises(UnitError) as caught:
        parse_budget(value, name="activation_budget")  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith("activation_budget ")
    assert "expected" in message
    assert "\n" not in message


def test_a_unitless_float_is_told_which_unit_it_may_have_meant() -> None:
    with pytest.raises(UnitError, match=r"write '0\.3GiB'"):
        parse_budget(0.3)  # type: ignore[arg-type]


def test_auto_is_a_budget_only_where_it_means_something() -> None:
    assert parse_budget("auto", allow_auto=True).is_auto
    with pytest.raises(UnitError, match="'auto'"):
        parse_budget("auto")


@given(st.integers(1, 10**15), st.integers(1, 1000))
def test_a_percentage_is_exact_and_rounds_down(whole_bytes: int, per_mille: int) -> None:
    text = f"{per_mille // 10}.{per_mille % 10}%"
    assert parse_budget(text).resolve(whole_bytes) == whole_bytes * per_mille // 1000
    assert percent(text) == Fraction(per_mille, 1000)


@given(st.integers(1, 2**60))
def test_a_shown_size_read_back_is_never_smaller(size_bytes: int) -> None:
    assert size_bytes <= parse_bytes(format_bytes(size_bytes)) <= size_bytes * 1.011 + 1


@given(st.integers(1, 2**60))
def test_any_integer_is_its_own_budget(size_bytes: int) -> None:
    assert parse_budget(size_bytes).resolve(1) == size_bytes
    assert parse_budget(str(size_bytes)).resolve(1) == size_bytes


@pytest.mark.parametrize("time_s", [0.0, 1e-9, 1e-6, 0.9999, 1.0, 59.9, 3600.0])
def test_a_duration_has_a_unit(time_s: float) -> None:
    assert format_seconds(time_s).split()[1] in ("s", "ms", "us")


@pytest.mark.parametrize(
    ("time_s", "text"),
    [(0.99999, "1 s"), (0.9994e-3, "999 us"), (0.9996e-3, "1 ms"), (999.4, "999 s"), (999.7, "1000 s"), (0.0, "0 us")],
)
def test_a_duration_that_rounds_up_to_a_unit_is_written_in_it(time_s: float, text: str) -> None:
    assert format_seconds(time_s) == text
