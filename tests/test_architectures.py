"""Which architectures train under a budget and which are refused: every case of `benchmarks.captures`."""

from __future__ import annotations

import pytest

from benchmarks.captures import CASES, ZOO, Case
from benchmarks.captures.check import check
from benchmarks.captures.records import PAGE, Captures, page

pytestmark = pytest.mark.usefixtures("quick_plans")


def _params() -> list[object]:
    def marks(case: Case) -> list[pytest.MarkDecorator]:
        absent = case.missing()
        return [pytest.mark.skipif(bool(absent), reason=f"{absent} isn't installed (extra: models)")]

    return [pytest.param(case, marks=marks(case), id=case.name) for case in CASES]


@pytest.mark.parametrize("case", _params())
def test_an_architecture_is_trained_as_eager_does_or_refused_as_expected(case: Case) -> None:
    found = check(case, budgets=("minimum",))
    if case.refused:
        assert found.status in ("refused", "not in eager")
        assert case.refused in found.message
    else:
        assert (found.status, found.name) == ("supported", case.name), found.message


def test_names_are_unique() -> None:
    names = [case.name for case in (*CASES, *ZOO)]
    assert len(set(names)) == len(names)


def test_the_page_is_made_from_the_record_of_all_cases_and_none_is_incorrect() -> None:
    captures = Captures.load()
    assert PAGE.read_text(encoding="utf-8") == page(captures), "run `python -m benchmarks.captures --render`"
    named = [result.name for result in captures.results]
    assert named[: len(CASES)] == [case.name for case in CASES]
    assert set(named[len(CASES) :]) <= {case.name for case in ZOO}  # `tests/test_zoo.py` has all of them
    assert all(result.status != "incorrect" for result in captures.results)
    refused = {result.name for result in captures.results if result.status != "supported"}
    assert refused == {case.name for case in CASES if case.refused}
