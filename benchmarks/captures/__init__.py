"""Which architectures the package captures: small cases by family, run with ``python -m benchmarks.captures``.

A case is one line here or in one of the files by family; the test, the record and the page then cover it unasked.
"""

from __future__ import annotations

from benchmarks.captures import attention, functional, numerics, recurrent, routing, zoo
from benchmarks.captures.case import Case

CASES: tuple[Case, ...] = (
    *recurrent.CASES,
    *attention.CASES,
    *routing.CASES,
    *numerics.CASES,
    *functional.CASES,
)
ZOO = zoo.CASES

__all__ = ["CASES", "ZOO", "Case"]
