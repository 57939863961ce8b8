"""Quantities to text and back: the only place where either happens.

GiB = 2**30 and GB = 10**9 (and so on for K, M and T). Rounding is part of the contract: a budget that
is read rounds down to whole bytes, a size that is shown rounds up in its last digit, so that a shown
minimum that is typed back as a budget still fits.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import SupportsIndex

from rematerialize.errors import UnitError

BudgetLike = SupportsIndex | str
"""What a caller may give as a budget: bytes as an int, or text such as "8GiB", "30%" or "auto"."""

_UNIT_BYTES = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_QUANTITY = re.compile(
    r"\s*(?P<number>\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})\s*(?P<unit>[a-z]+|%)?\s*", re.IGNORECASE | re.ASCII
)
_EXAMPLES = "bytes (8589934592) or a size with a unit ('8GiB', '512 MiB', '8GB')"


@dataclass(frozen=True, slots=True)
class Budget:
    """A parsed budget: bytes, or a fraction of something that the caller knows, or "auto".

    Attributes
    ----------
    size_bytes : int or None
        The budget in bytes, when it was given so.
    fraction : Fraction or None
        The exact fraction in (0, 1], when it was given as a percentage.

    Both are None for "auto".
    """

    size_bytes: int | None = None
    fraction: Fraction | None = None

    @property
    def is_auto(self) -> bool:
        """Whether the choice is left to the planner."""
        return self.size_bytes is None and self.fraction is None

    def resolve(self, whole_bytes: int) -> int:
        """Return the budget in bytes: a fraction of `whole_bytes`, rounded down; "auto" is all of it.

        >>> parse_budget("30%").resolve(1001)
        300
        >>> parse_budget("1KiB").resolve(1001)
        1024
        """
        if self.size_bytes is not None:
            return self.size_bytes
        if self.fraction is None:
            return whole_bytes
        return int(self.fraction * whole_bytes)

    def __str__(self) -> str:
        if self.size_bytes is not None:
            return format_bytes(self.size_bytes)
        return "auto" if self.fraction is None else f"{float(self.fraction * 100):.6g}%"


def parse_budget(value: BudgetLike, *, name: str = "budget", allow_auto: bool = False) -> Budget:
    """Read a budget.

    Parameters
    ----------
    value : int or str
        Bytes ("8GiB", 8589934592), a percentage in (0, 100] ("30%"), or "auto" where allowed.
    name : str
        How the error calls it.
    allow_auto : bool
        Whether "auto" has a meaning here.

    Raises
    ------
    UnitError
        With the value got, the values expected and what to write instead.

    Examples
    --------
    >>> parse_budget("8GiB")
    Budget(size_bytes=8589934592, fraction=None)
    >>> parse_budget("30%")
    Budget(size_bytes=None, fraction=Fraction(3, 10))
    >>> parse_budget("auto", allow_auto=True).is_auto
    True
    """
    if isinstance(value, str):
        if allow_auto and value.strip().lower() == "auto":
            return Budget()
        if value.rstrip().endswith("%"):
            return Budget(fraction=percent(value, name=name))
    return Budget(size_bytes=parse_bytes(value, name=name, expected=_expected(allow_auto)))


def parse_bytes(value: BudgetLike, *, name: str = "size", expected: str = _EXAMPLES) -> int:
    """Read a positive number of bytes, rounded down.

    Parameters
    ----------
    value : int or str
        Bytes as an int, or text with a unit; digits alone are bytes.
    name, expected : str
        How the error calls the value, and what it asks for.

    Raises
    ------
    UnitError
        For anything else: floats, bools, zero, negative or malformed values.

    Examples
    --------
    >>> parse_bytes("8GiB"), parse_bytes("8GB"), parse_bytes("0.5 kib"), parse_bytes("4096")
    (8589934592, 8000000000, 512, 4096)
    >>> parse_bytes(0.3)
    Traceback (most recent call last):
    ...
    rematerialize.errors.UnitError: size 0.3 has no unit: expected bytes (8589934592) or a size \
with a unit ('8GiB', '512 MiB', '8GB'); for 0.3 GiB write '0.3GiB'
    """
    if isinstance(value, str):
        size_bytes = _bytes_of_text(value, name, expected)
    else:
        size_bytes = _bytes_of_number(value, name, expected)
    if size_bytes <= 0:
        raise UnitError(f"{name} {value!r} is not positive: expected {expected}; give it at least 1 byte")
    return size_bytes


def percent(text: str, *, name: str = "percentage") -> Fraction:
    """Read a percentage above 0 and at most 100, exactly.

    Raises
    ------
    UnitError
        For anything else.

    Examples
    --------
    >>> percent("30%"), percent("12.5 %")
    (Fraction(3, 10), Fraction(1, 8))
    """
    match = _QUANTITY.fullmatch(text)
    if match is None or match["unit"] != "%":
        raise UnitError(f"{name} {text!r} can't be read: expected a percentage; write for example '30%'")
    fraction = Fraction(match["number"]) / 100
    if not 0 < fraction <= 1:
        raise UnitError(f"{name} {text!r} is out of range: expected above 0% and at most 100%; write for example '30%'")
    return fraction


def parse_overhead(value: float | str, *, name: str = "overhead") -> float:
    """Read a share of time that may be added: a number (0.25) or a percentage, which may be above 100%.

    Raises
    ------
    UnitError
        For anything else, and for negative values.

    Examples
    --------
    >>> parse_overhead("25%"), parse_overhead(0.25), parse_overhead("150 %")
    (0.25, 0.25, 1.5)
    """
    found = float("nan")
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        if match is not None and match["unit"] == "%":
            found = float(Fraction(match["number"]) / 100)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        found = float(value)
    if not 0 <= found < math.inf:
        raise UnitError(f"{name} {value!r} can't be read: expected a percentage of time; write for example '25%'")
    return found


def format_bytes(size_bytes: int) -> str:
    """Show a size in binary units, rounded up in its last digit.

    >>> format_bytes(512), format_bytes(1536), format_bytes(8357888), format_bytes(2**33)
    ('512 B', '1.50 KiB', '7.98 MiB', '8.00 GiB')
    >>> parse_bytes(format_bytes(8357888)) >= 8357888
    True
    """
    if abs(size_bytes) < 1024:
        return f"{size_bytes} B"
    for power, letter in enumerate("KMGT", start=1):
        hundredths = -(-size_bytes * 100 // 1024**power)
        if abs(hundredths) < 102400 or letter == "T":
            break
    sign, hundredths = ("-", -hundredths) if hundredths < 0 else ("", hundredths)
    return f"{sign}{hundredths // 100}.{hundredths % 100:02d} {letter}iB"


def format_ratio(ratio: float) -> str:
    """Show a ratio with three digits after the point.

    >>> format_ratio(1.1666)
    '1.167'
    """
    return f"{ratio:.3f}"


def format_percent(ratio: float) -> str:
    """Show a ratio as a percentage with one digit after the point.

    >>> format_percent(0.1666), format_percent(1)
    ('16.7%', '100.0%')
    """
    return f"{ratio * 100:.1f}%"


def format_seconds(time_s: float) -> str:
    """Show a duration with three significant digits.

    >>> format_seconds(1.59e-4), format_seconds(0.0693), format_seconds(12.34), format_seconds(75)
    ('159 us', '69.3 ms', '12.3 s', '75 s')
    >>> format_seconds(0.99999)
    '1 s'
    """
    if abs(time_s) >= 999.5:
        return f"{time_s:.0f} s"
    rounded = float(f"{time_s:.3g}")  # first, so that what rounds up to a whole unit is written in that unit
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if abs(rounded) * factor >= 1 or unit == "us":
            break
    return f"{rounded * factor:.3g} {unit}"


def _expected(allow_auto: bool) -> str:
    return f"{_EXAMPLES}, a percentage ('30%')" + (" or 'auto'" if allow_auto else "")


def _bytes_of_text(text: str, name: str, expected: str) -> int:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        negative = text.strip().startswith("-")
        problem = "is not positive" if negative else "can't be read"
        raise UnitError(f"{name} {text!r} {problem}: expected {expected}; write for example '8GiB'")
    number, unit = match["number"], match["unit"]
    if unit is None:
        if not number.isdigit():
            raise UnitError(f"{name} {text!r} has no unit: expected {expected}; for {number} GiB write '{number}GiB'")
        return int(number)
    if unit.lower() not in _UNIT_BYTES:
        raise UnitError(
            f"{name} {text!r} has the unknown unit {unit!r}: expected {expected}; "
            "the units are B, kB, MB, GB, TB and KiB, MiB, GiB, TiB"
        )
    size: Fraction = Fraction(number) * _UNIT_BYTES[unit.lower()]
    return int(size)


def _bytes_of_number(value: SupportsIndex, name: str, expected: str) -> int:
    if isinstance(value, bool):
        raise UnitError(f"{name} {value!r} is a bool: expected {expected}; write for example '8GiB'")
    try:
        return operator.index(value)
    except TypeError:
        pass
    if isinstance(value, float) and math.isfinite(value) and value > 0:
        raise UnitError(f"{name} {value!r} has no unit: expected {expected}; for {value:g} GiB write '{value:g}GiB'")
    kind = type(value).__name__
    raise UnitError(f"{name} {value!r} is of type {kind}: expected {expected}; write for example '8GiB'")
