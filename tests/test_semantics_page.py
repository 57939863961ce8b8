"""docs/semantics.md is backed by tests and quotes what is really said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    line
    for line in (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| what", "| :-"))
]
TESTS = {
    name
    for path in (ROOT / "tests").glob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
}
SAID = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "rematerialize").rglob("*.py"))
SAID = re.sub(r'"\s*\n\s*f?"', "", SAID)  # messages go over several lines


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_a_row_names_tests_that_exist_and_quotes_a_message_that_is_raised(row: str) -> None:
    _, _, how, tests, _ = row.split("|")
    named = re.findall(r"`(\w+)`", tests)
    assert named, "name a test"
    assert set(named) <= TESTS
    quotes = re.findall(r"refused \(`([^`]+)`\)|refused where the backward recomputes \(`([^`]+)`\)", how)
    for quote in (first or second for first, second in quotes):
        assert quote in SAID or quote == "CaptureError"
