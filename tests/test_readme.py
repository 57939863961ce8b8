"""The README says what is: its code runs, its output is real, its files exist, its figures are generated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.demo import HEADERS
from benchmarks.readme import FENCE, PAGES, rewritten, with_outputs

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shape(output: str) -> list[str]:
    """Mask quantities, which differ between machines, and the padding that follows from them."""
    masked = re.sub(r"-?\d[\d.]*( ?(B|KiB|MiB|GiB|us|ms|s|%)(?![a-z]))?", "#", output)
    masked = re.sub(r"^( *solver +)\w+$", r"\1#", masked, flags=re.MULTILINE)  # measured times decide who wins
    masked = re.sub(r"(?<= )-(?= |$)|#x", "#", masked, flags=re.MULTILINE)  # nothing recomputed here, something there
    masked = re.sub(r"(?<=measured on ).+$", "#", masked, flags=re.MULTILINE)
    return [re.sub(r"[ -]{2,}", " ", line).strip() for line in masked.strip().splitlines()]


def test_the_blocks_run_in_order_and_print_what_is_shown(tmp_path: Path) -> None:
    assert re.search(r"^```text\n.+", README, flags=re.MULTILINE), "make the output: benchmarks.readme --run"
    assert shape(with_outputs(README, tmp_path)) == shape(README)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "docs/architecture.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    text = FENCE.sub("", text)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    names = re.findall(r"`([\w./]+\.(?:py|md|toml|txt)|[\w./]+/)`", text)
    places = (ROOT, ROOT / "rematerialize", (ROOT / page).parent)
    missing = [name for name in links + names if not any((place / name).exists() for place in places)]
    assert not missing


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_that_a_page_names_exists(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"\bmake (\w+)", (ROOT / page).read_text(encoding="utf-8")))
    assert {name for name in named if name not in targets} <= {"sure"}


def test_the_demo_prints_the_columns_that_the_page_shows() -> None:
    table = README.split("<!-- BEGIN generated: demo -->\n")[1]
    header = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    assert header == ["model", *HEADERS]


def test_the_generated_parts_are_fresh() -> None:
    assert rewritten(README) == README, "run `make readme`"
