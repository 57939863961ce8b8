"""Verdicts and pages: figures are compared at equal peaks, and no table is typed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.comparison import Cell, Comparison, ModelResult
from benchmarks.render import markdown

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def cell(name: str, peak: int, *times: float, status: str = "ok") -> Cell:
    return Cell(name, status, peak_bytes=peak, peak_ratio=peak / 100, time_ratio=times[0], step_s=times)


def result(*cells: Cell) -> ModelResult:
    return ModelResult("model", 100, 1.0, 10, 3, (cell("eager", 100, 1.0, 1.0, 1.0), *cells))


def test_a_peer_is_answered_by_our_fastest_plan_that_needs_no_more_memory() -> None:
    ours = [cell("ours 70%", 70, 1.0, 1.0, 1.0), cell("ours 50%", 50, 1.1, 1.1, 1.1)]
    peer = cell("per block", 60, 1.3, 1.3, 1.3)
    verdict = result(*ours, peer).verdicts()[0]
    assert (verdict.ours, verdict.verdict) == ("ours 50%", "faster")
    assert verdict.ratio == pytest.approx(1.1 / 1.3)


def test_a_difference_within_the_noise_is_none() -> None:
    peer = cell("per block", 60, 1.0, 2.0, 3.0)
    verdict = result(cell("ours 50%", 50, 1.2, 1.9, 3.1), peer).verdicts()[0]
    assert verdict.verdict == "equal"


def test_being_slower_shows() -> None:
    peer = cell("per block", 60, 1.0, 1.0, 1.0)
    assert result(cell("ours 50%", 50, 1.2, 1.2, 1.2), peer).verdicts()[0].verdict == "slower"


def test_an_incorrect_plan_of_ours_answers_nobody() -> None:
    wrong = cell("ours 50%", 50, 0.5, 0.5, 0.5, status="incorrect")
    compared = result(wrong, cell("per block", 60, 1.0, 1.0, 1.0))
    assert compared.verdicts()[0].verdict == "nothing fits"
    assert compared.lowest_peak() is None


def test_our_lowest_peak_is_compared_with_every_peers() -> None:
    ours = cell("ours minimum", 20, 2.0, 2.0, 2.0)
    assert result(ours, cell("torch 0", 30, 1.0, 1.0, 1.0)).lowest_peak() is True
    assert result(ours, cell("torch 0", 20, 1.0, 1.0, 1.0)).lowest_peak() is False


def test_a_comparison_survives_its_file(tmp_path: Path) -> None:
    before = Comparison("c", "0", "d", "cpu", 1, {"torch": "2"}, 1, "test", (result(cell("ours 50%", 50, 1.5)),))
    before.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == before


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"c\.json isn't a"):
        Comparison.load(tmp_path / "c.json")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("bench*.json")), ids=lambda path: path.stem)
def test_pages_are_what_their_json_renders_to(path: Path) -> None:
    assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(Comparison.load(path))
