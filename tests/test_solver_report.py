"""The solver's benchmarks: pages are what their records render to, and every plan that is called known replays."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.provenance import Provenance
from benchmarks.records import Record, resumed
from benchmarks.solver import known
from benchmarks.solver.known import Known
from benchmarks.solver.plot import draw, is_fresh, slopes
from benchmarks.solver.quality import Effort, measure
from benchmarks.solver.records import (
    RESULTS,
    Contestant,
    GraphQuality,
    GraphScale,
    QualityCell,
    Speed,
    falling,
)
from benchmarks.solver.report import pages, quality_page, scale_page, speed_page, summary
from benchmarks.solver.suite import find, small
from rematerialize.simulate import simulate
from rematerialize.solve import Planner

HERE = Provenance("python -m x", "0", "d", "cpu", {"python": "3"}, 0)
QUALITY = GraphQuality(
    "unet",
    172,
    1000,
    1.0,
    (QualityCell(800, 0.10, 0.08, "long", False, None), QualityCell(300, 0.5, 0.5, "auto", True, 0.25)),
    {"auto": 300, "sweep": 310, "known": 290},
    None,
)
SCALE = GraphScale(
    "big",
    5000,
    1000,
    (800, 300),
    {
        "auto": Contestant("ok", (0.1, 0.4), (None, 0.2), 300, 1.0, 2.0, 2**20),
        "sweep": Contestant("ok", (0.2, None), (), 310, 1.0, 1.0, 2**20),
        "rotor": Contestant("timeout"),
    },
)


def speed(shape: str, ops: int, *seconds: float) -> Speed:
    return Speed(f"{shape}-{ops // 1000}k", shape, ops, "ok", 0.1, seconds, seconds, seconds, seconds, (2**20,))


SPEED = (speed("chain", 1000, 0.5, 0.4, 0.6), speed("chain", 10_000, 5.0), Speed("gpt-10k", "gpt", 10_000, "timeout"))


def test_pages_are_what_their_records_render_to() -> None:
    for page, text in pages(RESULTS):
        assert page.read_text(encoding="utf-8") == text, "run `python -m benchmarks.solver.report`"


def test_the_plot_was_drawn_from_its_record() -> None:
    record = RESULTS / "speed.json"
    assert not record.exists() or is_fresh(record), "run `python -m benchmarks.solver.report`"


def test_a_plot_of_another_record_is_stale(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "speed.json"
    Record(HERE, SPEED).save(path)
    assert not is_fresh(path)
    draw(path)
    assert is_fresh(path)
    Record(HERE, SPEED[:1]).save(path)
    assert not is_fresh(path)


@pytest.mark.parametrize("name", sorted(known.load()))
def test_every_known_plan_replays_to_its_figures(name: str) -> None:
    graph = find(name)
    found = Known(graph, known.load()[name])
    assert found.plans, "the graph has changed since: delete its plans"
    for plan in found.plans:
        result = simulate(graph, *found.names(plan))
        assert (result.peak_bytes, result.time_s) == (plan.peak_bytes, pytest.approx(plan.time_s, rel=1e-12))


def test_no_known_plan_is_dominated() -> None:
    graph = small()["gpt2-block"]
    planner, found = Planner(graph, solver="sweep"), Known(graph)
    for schedule in (planner.store_all(), *planner.frontier(6), planner.store_all()):
        found.add(schedule.forward, schedule.backward, "sweep")
    times = [plan.time_s for plan in found.plans]
    assert [plan.peak_bytes for plan in found.plans] == sorted({plan.peak_bytes for plan in found.plans})
    assert times == sorted(set(times), reverse=True)
    again = Known(graph, found.to_dict())
    assert again.plans == found.plans
    assert again.best(found.plans[0].peak_bytes - 1) is None


def test_a_bound_holds_for_every_lower_budget_and_for_no_higher_one() -> None:
    found = Known(small()["gpt2-block"])
    found.prove(100, 2.0)
    found.prove(50, 3.0)
    found.prove(40, float("inf"))
    found.prove(60, 1.0)
    assert [found.bound_s(budget) for budget in (30, 40, 50, 60, 100, 101)] == [
        float("inf"),
        float("inf"),
        3.0,
        2.0,
        2.0,
        0,
    ]
    assert len(found.bounds) == 3
    assert Known(found.graph, found.to_dict()).bounds == found.bounds


def test_plans_of_another_graph_count_for_nothing() -> None:
    planner, found = Planner(small()["gpt2-block"], solver="sweep"), Known(small()["gpt2-block"])
    full = planner.store_all()
    found.add(full.forward, full.backward, "sweep")
    assert Known(small()["unet"], found.to_dict()).plans == []


def test_the_best_known_is_never_above_auto() -> None:
    row, data = measure("gpt2-block", None, Effort(exact_s=0.5, long=1, seed=0))
    assert all(cell.difference >= 0 for cell in row.cells)
    assert row.least_bytes["known"] <= min(row.least_bytes.values())
    again, _ = measure("gpt2-block", data, Effort(exact_s=0, long=0, seed=0))
    assert [cell.best_overhead for cell in again.cells] == [cell.best_overhead for cell in row.cells]


def test_a_baseline_above_which_auto_stands_is_told() -> None:
    assert SCALE.above() == []
    better = Contestant("ok", (0.2, 0.39), (), 300)
    worse = GraphScale("big", 5000, 1000, (800, 300), {**SCALE.contestants, "sweep": better})
    assert worse.above() == [(300, "sweep")]
    assert "big at 30.0% (sweep)" in scale_page(Record(HERE, (worse,)))


def test_budgets_fall_from_80_percent_to_the_least() -> None:
    assert falling(1000, 100, 8) == [800, 700, 600, 500, 400, 300, 200, 100]
    assert falling(1000, 900, 8) == [900]


@pytest.mark.parametrize(("kind", "row"), [(GraphQuality, QUALITY), (GraphScale, SCALE), (Speed, SPEED[0])])
def test_a_record_survives_its_file_and_resumes_on_the_same_code_only(kind: type, row: object, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    Record(HERE, (row,)).save(path)
    assert Record.load(path, kind) == Record(HERE, (row,))
    assert resumed(path, kind, HERE) == (row,)
    assert resumed(path, kind, Provenance("python -m x", "1", "d", "cpu", {"python": "3"}, 0)) == ()
    with pytest.raises(ValueError, match=r"record\.json isn't a"):
        Record.load(path, Speed if kind is not Speed else GraphScale)


def test_pages_tell_what_was_measured(tmp_path: Path) -> None:
    assert "| unet  | 172 |   30.0% | 10.0 (-2.00) |" in quality_page(Record(HERE, (QUALITY,)))
    assert "never above any of them" in scale_page(Record(HERE, (SCALE,)))
    assert slopes(SPEED) == {"chain": pytest.approx(1.0)}
    assert "timeout" in speed_page(Record(HERE, SPEED))
    for name, rows in (("quality", (QUALITY,)), ("held_out", (QUALITY,)), ("scale", (SCALE,)), ("speed", SPEED)):
        Record(HERE, rows).save(tmp_path / f"{name}.json")
    text = summary(tmp_path)
    assert "1.000 points on average, 2.00 at most" in text
    assert "| never" in text
    assert "500 ms / 5 s" in text or "0.5 s / 5 s" in text
