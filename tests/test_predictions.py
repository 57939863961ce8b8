"""The record of predictions: it is what the commands said, and its pages are what it renders to."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import predictions
from benchmarks.predictions import FILE, ModelPredictions, PlannedStep, measure, page, summary
from benchmarks.provenance import Provenance
from benchmarks.records import Record
from rematerialize.zoo import MODELS

HERE = Provenance("python -m x", "0", "d", "cpu", {"python": "3"}, 0)
STORED = PlannedStep((100, 100, 100), (100, 100, 100), (1.0, 1.1, 1.2), (1.0, 1.0, 1.0))
LEAST = PlannedStep((30, 30, 30), (30, 30, 29), (2.0, 2.0, 2.4), (2.0, 4.0, 2.0))
ROW = ModelPredictions("net", 9, (STORED, LEAST), (5.0, 7.0, 6.0), (4.0, 4.0, 4.0), (1.0, 1.0, 1.0))


def test_errors_are_told_run_by_run_and_by_the_median_of_a_plan() -> None:
    said = summary([ROW])
    assert said.startswith("6 steps of 2 plans of 1 models. Peaks: 5 of 6 within 1.0%, at most 3.45% off.")
    assert "Step times: 3 of 6 within 15.0%, median 15.0% off, at most 50%" in said  # 0 10 20, 0 -50 20
    assert "by plan, median of its runs, 2 of 2 within 15.0%" in said
    assert "1.25 times as long as its work, at most 1.25; with all imports 1.50 times, at most 1.50." in said


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    Record(HERE, (ROW,)).save(path := tmp_path / "record.json")
    assert Record.load(path, ModelPredictions).rows == (ROW,)


def test_a_model_of_fewer_plans_has_no_half_way() -> None:
    (line,) = [line for line in page(Record(HERE, (ROW,))).splitlines() if line.startswith("| net")]
    assert [cell.strip() for cell in line.split("|")[5:8]] == ["+10% (+0 to +20)", "-", "+0% (-50 to +20)"]


def test_the_page_is_what_the_record_renders_to() -> None:
    assert predictions.render(check=True), "run python -m benchmarks.predictions --render"


def test_the_record_has_every_model_and_its_peaks_are_within_what_is_promised() -> None:
    rows = Record.load(FILE, ModelPredictions).rows
    assert {row.model for row in rows} == {name for name, spec in MODELS.items() if spec.group != "large"}
    assert max(abs(off) for row in rows for plan in row.plans for off in plan.peaks_off()) <= 0.01


@pytest.mark.slow
def test_a_run_records_what_the_commands_say() -> None:
    row = measure("actor_critic", 1)
    assert (row.model, len(row.plans)) == ("actor_critic", 3)
    peaks = [plan.peak_bytes[0] for plan in row.plans]
    assert peaks == sorted(peaks, reverse=True)
    assert all(abs(off) <= 0.01 for plan in row.plans for off in plan.peaks_off())
    assert row.command_s[0] > row.target_s[0] > 0
    assert row.work_s[0] > 0
