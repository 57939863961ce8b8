"""The page in a real browser: keys, pointer, phone width, dark scheme, silence on the console and on the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from rematerialize.ir import TrainingGraph
from rematerialize.report.figures import FrontierPoint
from rematerialize.report.html import html_report
from rematerialize.report.modules import top_tensors
from rematerialize.report.timeline import of_schedule
from rematerialize.units import format_bytes
from tests import browser
from tests.reports import a_long_step, a_schedule, a_step, store_all_schedule
from tests.test_report_html import HOSTILE, hostile_step

pytestmark = pytest.mark.skipif(bool(browser.MISSING), reason=browser.MISSING)


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    with ExitStack() as stack:
        try:
            session = stack.enter_context(browser.browser())
        except RuntimeError as error:  # a driver that is older than its browser, for one
            pytest.skip(f"chromium doesn't start: {error}")
        yield session


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    points = (FrontierPoint(6100, 6000, 0.0), FrontierPoint(4600, 4500, 0.5))
    measured = (FrontierPoint(6100, 6000, 0.0), FrontierPoint(4600, 4500, -0.1))
    graph = a_step()
    path = tmp_path_factory.mktemp("page") / "report.html"
    page = html_report(graph, a_schedule(graph), frontier=points, chosen=1, measured=measured)
    path.write_text(page, encoding="utf-8")
    return path


@pytest.fixture
def opened(chromium: browser.Browser, page: Path) -> browser.Browser:
    chromium.emulate()
    chromium.logged()
    chromium.requested()
    chromium.open(page)
    return chromium


def text(session: browser.Browser, name: str) -> str:
    return str(session.run(f"return document.getElementById('{name}').textContent"))


def position(session: browser.Browser) -> int:
    return int(session.run("return document.getElementById('plot').getAttribute('aria-valuenow')")) - 1


def test_nothing_is_logged_and_nothing_is_fetched(opened: browser.Browser, page: Path) -> None:
    opened.run("document.getElementById('plot').focus()")
    opened.keys("Right", "End", "Home")
    assert opened.logged() == []
    assert opened.requested() == [page.resolve().as_uri()]


def test_the_cursor_begins_at_the_peak_and_names_what_is_live_there(opened: browser.Browser) -> None:
    graph = a_step()
    plan = of_schedule(graph, a_schedule(graph))
    assert position(opened) == plan.peak_position
    assert text(opened, "op") == "b0"
    live = top_tensors(plan, plan.peak_position)
    assert text(opened, "live-title") == f"{len(live)} live tensors, {format_bytes(4000)}"
    rows = opened.run("return [...document.querySelectorAll('#live tr')].map(row => row.textContent)")
    assert len(rows) == len(live)
    assert any("net.layers.0 output float32[250]" in row and "f0" in row for row in rows)


def test_arrow_keys_move_the_cursor_and_the_live_region_says_where(opened: browser.Browser) -> None:
    opened.run("document.getElementById('plot').focus()")
    opened.keys("Home")
    assert (position(opened), text(opened, "op")) == (0, "f0")
    left = opened.run("return document.getElementById('cursor').getBoundingClientRect().left")
    opened.keys("Right", "Right")
    assert (position(opened), text(opened, "op")) == (2, "f2")
    assert opened.run("return document.getElementById('cursor').getBoundingClientRect().left") > left
    spoken = text(opened, "spoken")
    assert spoken.startswith("f2, forward, freed, recomputed later; module net.layers.2, model.py:12; 1.96 KiB live")
    opened.keys("Left")
    assert position(opened) == 1
    opened.keys("End")
    last = len(of_schedule(a_step(), a_schedule(a_step())).executions) - 1
    assert position(opened) == last
    opened.keys("Right")
    assert position(opened) == last
    opened.keys("b")
    assert (position(opened), text(opened, "op")) == (4, "b3")


def test_the_pointer_shows_what_runs_under_it(opened: browser.Browser) -> None:
    box = opened.run(
        "const b = document.getElementById('plot').getBoundingClientRect(); return [b.left, b.top, b.width]"
    )
    opened.point(int(box[0] + box[2] * 1.5 / 18), int(box[1] + 50))
    opened.run("return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert text(opened, "op") == "f1"
    assert text(opened, "tip") == "f1 · 1.96 KiB"
    assert opened.run("return getComputedStyle(document.getElementById('tip')).visibility") == "visible"


def test_a_mouse_that_lies_still_leaves_the_keys_their_place(opened: browser.Browser) -> None:
    found = opened.run("""
        const plot = document.getElementById('plot');
        const box = plot.getBoundingClientRect();
        const move = (x) => document.getElementById('stage').dispatchEvent(
            new PointerEvent('pointermove', {clientX: box.left + x, clientY: box.top + 50, pointerType: 'mouse'}));
        const key = (name) => plot.dispatchEvent(new KeyboardEvent('keydown', {key: name}));
        const frame = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
        const at = () => Number(plot.getAttribute('aria-valuenow')) - 1;
        const far = box.width - 2;
        return (async () => {
            move(far); key('Home'); await frame();
            const waited = at();
            move(far); await frame();
            const still = at();
            move(far - 1); await frame();
            return [waited, still, at()];
        })();
    """)
    assert found == [0, 0, 13]


def test_everything_that_acts_is_reached_by_tab_and_shows_the_focus(opened: browser.Browser) -> None:
    reached = []
    for _ in range(12):
        opened.keys("Tab")
        name, outline = opened.run(
            "const e = document.activeElement; return [e.id || e.tagName, getComputedStyle(e).outlineStyle]"
        )
        reached.append(name)
        assert name == "BODY" or outline == "solid"
    assert [name for name in reached if name in ("plot", "to-peak", "back", "on")] == ["plot", "to-peak", "back", "on"]
    assert "SUMMARY" in reached


def test_modules_fold_and_unfold(opened: browser.Browser) -> None:
    count = "return [...document.querySelectorAll('#modules tbody tr')].filter(row => !row.hidden).length"
    assert opened.run(count) == 7
    opened.run("document.querySelectorAll('#modules button')[1].focus()")
    opened.keys("Enter")
    assert opened.run(count) == 2
    assert opened.run("return document.querySelectorAll('#modules button')[1].getAttribute('aria-expanded')") == "false"
    opened.keys("Enter")
    assert opened.run(count) == 7


def test_a_phone_scrolls_down_and_never_sideways(chromium: browser.Browser, page: Path, tmp_path: Path) -> None:
    chromium.emulate(width=360, height=740)
    long = tmp_path / "long.html"
    name = "a_function_with_a_name_" * 4
    graph = a_step(8, f"{name}.layers")
    graph = replace(graph, ops=tuple(replace(op, name=name + op.name, source=f"{name}.py:1") for op in graph.ops))
    long.write_text(html_report(graph, store_all_schedule(graph), title=name * 3), encoding="utf-8")
    for path in (page, long):
        chromium.open(path)
        chromium.run("document.getElementById('plot').focus()")
        for keys in (("Home",), ("b",), ("Left", "Left"), ("End",)):
            chromium.keys(*keys)
            assert chromium.run("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360], keys
    smallest = "return Math.min(...[...document.querySelectorAll('button:not(#modules *)')].map(b => b.offsetHeight))"
    assert chromium.run(smallest) >= 32


def test_a_table_that_is_cut_says_that_it_scrolls_and_its_rows_hold_together(
    chromium: browser.Browser, page: Path
) -> None:
    chromium.emulate(width=390, height=844)
    chromium.open(page)
    hint = "return getComputedStyle(document.querySelector('.edge:has(#modules)'), '::after').content"
    frames = "return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    assert chromium.run(hint) != "none"
    rows = chromium.run(
        "return [...document.querySelectorAll('#modules tr')].map(r => r.getBoundingClientRect().height)"
    )
    assert all(height == int(height) for height in rows)  # else the line of a sticky cell is drawn a pixel off
    chromium.run("document.querySelector('.edge:has(#modules) .scroll').scrollLeft = 9999")
    chromium.run(frames)
    assert chromium.run(hint) == "none"
    chromium.emulate()
    chromium.run(frames)
    assert chromium.run(hint) == "none"


def test_figures_stay_whole_on_a_phone_and_say_where_they_scroll(chromium: browser.Browser, page: Path) -> None:
    chromium.emulate(width=390, height=844)
    chromium.open(page)
    chromium.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    chromium.run("return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    heights = chromium.run(
        "return [...document.querySelectorAll('details tbody th')].map(one => one.getBoundingClientRect().height)"
    )
    assert max(heights) < 100  # a column of letters is higher
    edges = chromium.run("""return [...document.querySelectorAll('details .edge')].map(edge => {
        const inner = edge.firstElementChild;
        return [inner.clientWidth < inner.scrollWidth - 1, edge.classList.contains('more')];
    })""")
    assert edges
    assert all(cut == told for cut, told in edges)


@pytest.mark.parametrize("width", [390, 1280])
def test_store_alls_name_stands_above_its_line_and_marks_of_time_below_their_places(
    chromium: browser.Browser, page: Path, width: int
) -> None:
    chromium.emulate(width=width)
    chromium.open(page)
    edges = "const box = (one) => document.querySelector(one).getBoundingClientRect();"
    assert chromium.run(f"{edges} return box('#plot .mark.most').bottom <= box('#plot .store-all-line').top + 1")
    assert chromium.run(f"{edges} return box('#plot .mark.most').top >= box('#plot .mark.top').bottom - 1")
    middle = "const first = box('#plot .tick.moment'); return (first.left + first.right) / 2 - box('#plot').left"
    assert abs(chromium.run(f"{edges} {middle}")) < 1


def test_the_cursor_passes_behind_figures(opened: browser.Browser) -> None:
    page_colour = colour(opened, "body", "backgroundColor")
    for selector in (".lane-name > span:last-child", ".tick.moment"):
        assert opened.run(f"return getComputedStyle(document.querySelector('{selector}')).zIndex") == "1"
        assert colour(opened, selector, "backgroundColor") == page_colour
    assert opened.run("return getComputedStyle(document.getElementById('cursor')).zIndex") == "auto"


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out_in_light_and_dark(chromium: browser.Browser, page: Path, dark: bool) -> None:
    chromium.emulate(dark=dark)
    chromium.open(page)
    background = colour(chromium, "body", "backgroundColor")
    assert (sum(background) < 200) == dark
    for selector in ("body", ".note", ".mark.budget", ".tick", "thead th", ".lane-name span"):
        assert contrast(colour(chromium, selector, "color"), background) >= 4.5, selector
    for selector in (".plan-line", ".store-all-line", ".budget-line", ".measured-line", ".cross"):
        assert contrast(colour(chromium, selector, "stroke"), background) >= 3, selector
    raised = colour(chromium, ".panel", "backgroundColor")
    for selector in (".panel .where", ".panel small", ".figures small"):
        assert contrast(colour(chromium, selector, "color"), raised) >= 4.5, selector


def test_names_from_the_user_run_no_script(chromium: browser.Browser, tmp_path: Path) -> None:
    graph = hostile_step()
    path = tmp_path / "hostile.html"
    path.write_text(html_report(graph, store_all_schedule(graph), title=HOSTILE), encoding="utf-8")
    chromium.emulate()
    chromium.logged()
    chromium.open(path)
    assert chromium.run("return document.title") == HOSTILE
    assert HOSTILE in text(chromium, "op")
    assert HOSTILE in text(chromium, "facts")
    assert chromium.run("return document.querySelectorAll('img').length") == 0
    assert chromium.logged() == []


def test_an_empty_step_is_a_quiet_page(chromium: browser.Browser, tmp_path: Path) -> None:
    graph = TrainingGraph((), {}, frozenset(), (), (), ())
    path = tmp_path / "empty.html"
    path.write_text(html_report(graph, store_all_schedule(graph)), encoding="utf-8")
    chromium.logged()
    chromium.open(path)
    assert chromium.run("return document.getElementById('panel').hidden") is True
    assert chromium.logged() == []


def test_20000_executions_stay_quick(chromium: browser.Browser, tmp_path: Path) -> None:
    graph = a_long_step(20_000)
    path = tmp_path / "long.html"
    path.write_text(html_report(graph, store_all_schedule(graph)), encoding="utf-8")
    chromium.emulate()
    chromium.point(0, 0)  # at rest on the step, it would move the cursor
    chromium.open(path)
    spent_ms, begun, ended = chromium.run("""
        const plot = document.getElementById('plot');
        const position = () => Number(plot.getAttribute('aria-valuenow')) - 1;
        const start = position();
        const begin = performance.now();
        for (let i = 0; i < 50; i += 1) plot.dispatchEvent(new KeyboardEvent('keydown', {key: 'PageDown'}));
        document.body.offsetHeight;
        return [performance.now() - begin, start, position()];
    """)
    assert spent_ms < 50 * 50
    assert begun > 9_000  # the peak, in the middle
    assert ended == 0


def test_sizes_read_as_the_packages(chromium: browser.Browser, tmp_path: Path) -> None:
    for size in (1, 1023, 1025, 8357888, 1073741824 - 1, 3 * 2**40 + 5):
        graph = a_step()
        graph.storages["a0"] = size  # type: ignore[index]
        path = tmp_path / "size.html"
        path.write_text(html_report(graph, store_all_schedule(graph)), encoding="utf-8")
        chromium.open(path)
        chromium.run("document.getElementById('plot').focus()")
        chromium.keys("Home")
        assert text(chromium, "live-title") == f"1 live tensor, {format_bytes(size)}"


def colour(session: browser.Browser, selector: str, property_name: str) -> tuple[int, ...]:
    found = session.run(f"return getComputedStyle(document.querySelector('{selector}')).{property_name}")
    return tuple(int(part) for part in found[found.index("(") + 1 : found.index(")")].split(",")[:3])


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """The contrast ratio of WCAG 2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(rgb: tuple[int, ...]) -> float:
    linear = [c / 255 / 12.92 if c <= 10.31 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
