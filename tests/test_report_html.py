"""The page about a plan: what it says, that it stands alone, and that nothing from the user breaks out of it."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings

from rematerialize.errors import RematerializeError, ScheduleError
from rematerialize.ir import Op, TrainingGraph
from rematerialize.plans import Plan
from rematerialize.report.curves import COLUMNS, edges, frame, line, path, size_ticks, spans, x_ticks
from rematerialize.report.figures import FrontierPoint
from rematerialize.report.html import html_report
from rematerialize.report.lanes import lane_of_each, lanes
from rematerialize.report.payload import embedded_json, page_data
from rematerialize.report.timeline import of_schedule, store_all
from rematerialize.schedule import Schedule
from rematerialize.units import format_bytes, format_percent, format_seconds
from tests.reports import a_long_step, a_schedule, a_step, store_all_schedule
from tests.strategies import training_graphs

VOID = {"meta", "link", "br"}
POINTS = (FrontierPoint(7000, 6500, 0.0), FrontierPoint(4600, 4500, 0.5))
MEASURED = (FrontierPoint(7000, 6400, 0.0), FrontierPoint(4600, 4400, -0.25))


class Elements(HTMLParser):
    """Every element with its attributes; that each is closed in its turn; the texts by the id around them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)


def page_of(graph: TrainingGraph, schedule: Schedule | None = None, **options: object) -> str:
    return html_report(graph, schedule or a_schedule(graph), **options)  # type: ignore[arg-type]


def data_of(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert isinstance(data, dict)
    return data


def text_of(page: str) -> str:
    """What a reader sees, in one line."""
    return " ".join("".join(Elements(page).text).split())


def test_the_page_says_what_the_plan_needs_and_costs() -> None:
    page = page_of(a_step(), frontier=POINTS, chosen=1)
    text = text_of(page)
    assert "The step peaks at 4.40 KiB instead of 5.86 KiB, 75.0% of what storing everything takes" in text
    assert "for 50.0% more compute time" in text
    assert "budget 4.50 KiB" in text
    assert "this plan: 4.40 KiB, 50.0%" in text
    assert "Freed, recomputed later: results are freed within the forward" in text
    assert "net.layers" in page


def test_a_plan_that_recomputes_nothing_says_so() -> None:
    graph = a_step()
    assert "recomputes nothing" in page_of(graph, store_all_schedule(graph))


def test_without_a_frontier_there_is_no_section_for_it() -> None:
    assert "What other budgets cost" not in page_of(a_step())
    with pytest.raises(RematerializeError, match=r"chosen must be a position in the frontier of 2 points, got 2"):
        page_of(a_step(), frontier=POINTS, chosen=2)


def places(page: str, kind: str) -> list[tuple[float, float]]:
    """Where marks of a kind stand in the drawing of the frontier, in percent from the left and from the top."""
    found = [attributes for tag, attributes in Elements(page).found if tag == "span"]
    styles = [str(one["style"]) for one in found if str(one.get("class", "")).split()[:1] == [kind]]
    return [(float(x), float(y)) for x, y in re.findall(r"left:([-\d.]+)%;top:([-\d.]+)%", " ".join(styles))]


def test_measured_points_are_drawn_beside_the_predicted_ones_and_told_in_a_legend() -> None:
    page = page_of(a_step(), frontier=POINTS, chosen=1, measured=MEASURED)
    text = text_of(page)
    assert "predictedmeasured" in text
    assert "Measured peakMeasured overhead" in text
    assert "4.50 KiB (this plan)4.40 KiB50.0%4.30 KiB-25.0%" in text
    assert 'title="measured: 4.30 KiB, -25.0%"' in page
    assert "but for those that are called measured" in text
    predicted, measured = places(page, "point"), places(page, "measured")
    assert len(predicted) == len(measured) == 2
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in predicted + measured)
    assert predicted[0][1] == measured[0][1]  # both 0%
    assert measured[1][1] > measured[0][1] > predicted[1][1]  # -25%, 0%, 50%
    assert measured[1][0] / predicted[1][0] == pytest.approx(4400 / 4500, abs=1e-3)


def test_without_real_steps_a_frontier_has_neither_crosses_nor_a_legend_for_them() -> None:
    page = page_of(a_step(), frontier=POINTS, chosen=1)
    assert places(page, "measured") == []
    assert "measured" not in "".join(Elements(page).text).lower()


def test_measured_points_that_are_not_one_per_plan_are_refused() -> None:
    with pytest.raises(RematerializeError, match="measured must have one point for each of 2, got 1"):
        page_of(a_step(), frontier=POINTS, measured=MEASURED[:1])


def test_an_invalid_schedule_is_refused() -> None:
    graph = a_step()
    wrong = Schedule(("f0",), (), 1, "by hand", 1, 1.0, 1)
    with pytest.raises(ScheduleError):
        page_of(graph, wrong)


def test_the_page_refers_to_nothing_outside_itself() -> None:
    page = page_of(a_step(), frontier=POINTS, chosen=1)
    for tag, attributes in Elements(page).found:
        for name in ("src", "href", "action", "data", "srcset"):
            assert (tag, attributes.get(name)) in {(tag, None), ("link", "data:,")}
    assert not re.search(r"url\(|@import|https?:|//\w", re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL))
    assert "default-src 'none'" in page


def test_every_element_is_closed_and_every_id_stands_once() -> None:
    parsed = Elements(page_of(a_step(), frontier=POINTS, chosen=1))
    assert parsed.open == []
    ids = [attributes["id"] for _, attributes in parsed.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {attributes["aria-labelledby"] for _, attributes in parsed.found if "aria-labelledby" in attributes}
    assert named <= set(ids)


def test_the_page_has_what_people_without_eyes_or_pointers_need() -> None:
    parsed = Elements(page_of(a_step()))
    by_id = {attributes.get("id"): attributes for _, attributes in parsed.found}
    assert by_id["spoken"]["aria-live"] == "polite"
    assert "Arrow keys" in str(by_id["plot"]["aria-label"])
    assert ("html", {"lang": "en"}) in parsed.found
    assert all(attributes["aria-hidden"] == "true" for tag, attributes in parsed.found if tag == "svg")
    assert [tag for tag, _ in parsed.found if tag == "table"]  # the drawing in figures, the modules


HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&\u2028"


def hostile_step() -> TrainingGraph:
    """Return a step in which every text that comes from the user is an attack."""
    where = {"source": HOSTILE, "module": HOSTILE, "target": HOSTILE}
    ops = (
        Op(f"f{HOSTILE}", "forward", 1.0, ("x",), (HOSTILE,), **where),  # type: ignore[arg-type]
        Op(f"b{HOSTILE}", "backward", 1.0, (HOSTILE,), ("dx",), **where),  # type: ignore[arg-type]
    )
    sizes = {"x": 8, HOSTILE: 8, "dx": 8}
    return TrainingGraph(ops, sizes, frozenset({"x"}), (), (), ("dx",), {HOSTILE: HOSTILE}).verify()


def test_names_from_the_user_stay_text() -> None:
    graph = hostile_step()
    page = page_of(graph, store_all_schedule(graph), title=HOSTILE)
    parsed = Elements(page)
    assert [tag for tag, _ in parsed.found].count("script") == 2
    assert not [tag for tag, attributes in parsed.found if tag == "img" or "onerror" in attributes]
    assert HOSTILE in "".join(parsed.text)
    data = data_of(page)
    assert data["tensors"]["label"][1] == HOSTILE  # type: ignore[index]
    assert not re.search("[<>&]", embedded_json({"a": HOSTILE}))


def test_the_data_hold_every_execution_exactly() -> None:
    graph = a_step()
    plan, stored = of_schedule(graph, a_schedule(graph)), store_all(graph)
    data = json.loads(json.dumps(page_data(plan, stored, frame((plan, stored)), 4600)))
    names = [data["ops"]["name"][op] for op in data["plan"]["op"]]
    assert names == [run.op.name for run in plan.executions]
    assert data["plan"]["live"] == [run.live_bytes for run in plan.executions]
    assert max(data["plan"]["live"]) == plan.peak_bytes
    assert data["plan"]["peak"] == plan.peak_position
    assert data["stored"]["live"] == [run.live_bytes for run in stored.executions]
    sources = data["ops"]["source"]
    assert [sources["table"][at] for at in sources["at"]] == [op.source for op in graph.ops]


def test_a_step_of_20000_executions_is_a_page_of_a_few_megabytes() -> None:
    graph = a_long_step(20_000)
    page = page_of(graph, store_all_schedule(graph))
    assert len(page) < 4_000_000
    longest = max(re.findall(r' d="([^"]*)"', page), key=len)
    assert len(longest) < 200_000


@settings(max_examples=60, deadline=None)
@given(training_graphs())
def test_any_step_makes_a_page_and_each_execution_has_one_lane(graph: TrainingGraph) -> None:
    schedule = store_all_schedule(graph)
    assert Elements(html_report(graph, schedule)).open == []
    timeline = of_schedule(graph, schedule)
    found = lanes(timeline)
    assert sorted(at for lane in found for at in lane.positions) == list(range(len(timeline.executions)))
    assert sum(lane.time_s for lane in found) == pytest.approx(timeline.time_s)
    kept = {timeline.executions[i.birth].op.name for i in timeline.instances if i.birth < timeline.boundary <= i.death}
    stored = {timeline.executions[at].op.name for at in found[0].positions}
    assert stored == {op.name for op in graph.ops if op.phase == "forward" and op.name in kept}


def test_lanes_of_a_schedule_by_hand() -> None:
    graph = a_step()
    timeline = of_schedule(graph, a_schedule(graph))
    keys = lane_of_each(timeline)
    assert keys[: timeline.boundary] == ("dropped", "dropped", "dropped", "stored")
    assert [lane.size_bytes for lane in lanes(timeline)] == [1000, 3000, 0, 6000, 4000]
    assert [lane.time_s for lane in lanes(timeline)] == [1.0, 3.0, 0.0, 6.0, 8.0]


def test_a_drawn_line_has_every_corner_of_a_short_step() -> None:
    graph = a_step(2)
    timeline = store_all(graph)
    area = frame((timeline,))
    corners = line(timeline, area)
    values = [round(area.top_bytes * (1 - y / 1000)) for _, y in corners]
    assert values[::2] == [run.live_bytes for run in timeline.executions]
    assert corners[-1][0] == 1000
    assert path(corners).startswith(f"M0 {corners[0][1]:g}")


def test_a_drawn_line_keeps_the_peak_however_long_the_step() -> None:
    timeline = store_all(a_long_step(20_000))
    area = frame((timeline,))
    corners = line(timeline, area)
    assert len(corners) <= 8 * COLUMNS + 1
    assert min(y for _, y in corners) == round(area.y(timeline.peak_bytes), 1)
    boxes = spans(timeline, area, range(0, len(timeline.executions), 2))
    assert all(left < right for left, right in boxes)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(boxes))


def test_ticks_are_round_and_have_units() -> None:
    timeline = store_all(a_step())
    area = frame((timeline,), budget_bytes=5000)
    assert [tick.text for tick in size_ticks(area)] == ["0", "2 KiB", "4 KiB", "6 KiB"]
    assert [tick.text for tick in x_ticks(area)] == ["0", "2 s", "4 s", "6 s", "8 s", "10 s", "12 s"]


def test_a_step_without_times_is_drawn_over_its_executions() -> None:
    graph = a_long_step(10, time_s=0.0)
    timeline = store_all(graph)
    area = frame((timeline,))
    assert not area.timed
    assert edges(timeline, area) == list(range(11))
    assert "executions" in page_of(graph, store_all_schedule(graph))


def test_half_a_surrogate_pair_in_a_name_makes_a_page_that_can_be_written() -> None:
    op = Op("f", "forward", 1.0, (), ("a",), module="half \ud800 pair", source="\udfff.py:1")
    graph = TrainingGraph((op,), {"a": 8}, frozenset(), (), ("a",), ()).verify()
    assert b"half ? pair" in page_of(graph, store_all_schedule(graph)).encode()


@pytest.mark.parametrize("time_s", [5e-324, 1e-15, 1e290])
def test_extreme_times_make_a_page(time_s: float) -> None:
    graph = a_long_step(10, time_s)
    assert Elements(page_of(graph, store_all_schedule(graph))).open == []


def test_an_empty_step_makes_a_page() -> None:
    graph = TrainingGraph((), {}, frozenset(), (), (), ())
    page = html_report(graph, Schedule((), (), 0, "by hand", 0, 0.0, 0))
    assert "The step is empty." in page


def test_a_page_has_the_plans_own_figures_of_the_step_that_stores_everything() -> None:
    """A plan of another way to run the step, masks as bytes or recurrences split, is held against the step as it is."""
    graph, schedule = a_step(), a_schedule(a_step())
    alone = store_all(graph)
    plan = Plan(graph, schedule, schedule.budget_bytes, alone.peak_bytes * 9 // 10, alone.time_s * 0.8, 3000, 1000)
    page = page_of(graph, schedule, minimum_bytes=plan.minimum_bytes, stored=plan.stored_timeline())
    text = "".join(Elements(page).text)
    overhead = format_percent(plan.overhead)
    assert overhead != format_percent(of_schedule(graph, schedule).time_s / alone.time_s - 1)
    for said in (
        f"for {overhead} more compute time",
        f"Overhead{overhead}",
        f"Store-all peak{format_bytes(plan.store_all_peak_bytes)}",
        f"instead of {format_bytes(plan.store_all_peak_bytes)}",
        f"store-all {format_bytes(plan.store_all_peak_bytes)}",
        "smallest that works: 2.93 KiB",
        f"{format_seconds(plan.schedule.time_s)}{format_seconds(plan.store_all_time_s)}",
    ):
        assert said in text, said
    assert format_bytes(alone.peak_bytes) not in text


def test_a_drawn_out_timeline_ends_and_peaks_where_it_is_told_to() -> None:
    graph = a_step()
    alone, drawn = store_all(graph), store_all(graph, time_s=1.5, peak_bytes=7777)
    assert (drawn.time_s, drawn.peak_bytes) == (1.5, 7777)
    assert max(run.live_bytes for run in drawn.executions) == 7777
    last = drawn.executions[-1]
    assert last.start_s + last.op.time_s == pytest.approx(1.5)
    assert store_all(graph, time_s=alone.time_s, peak_bytes=alone.peak_bytes) == alone
    data = page_data(drawn, drawn, frame((drawn, drawn)), 1)
    listed_s = sum(data["ops"]["time"][op] for op in data["stored"]["op"])
    assert listed_s * data["stored"]["pace"] == pytest.approx(1.5)
