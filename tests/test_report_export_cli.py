"""``rematerialize export``: which file for which tool, and what it refuses. Plans plot and show themselves."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from rematerialize.errors import RematerializeError, ScheduleError, UncheckedPlanWarning
from rematerialize.plans import Plan
from rematerialize.report.figures import FrontierPoint
from rematerialize.report.notebook import plan_html
from rematerialize.report.origin import Origin
from rematerialize.report.plot import frontier_figure, memory_figure, save_figure
from rematerialize.report.timeline import of_schedule, store_all
from rematerialize.units import format_bytes, format_percent
from tests.cli import on_terminal
from tests.reports import a_long_step, a_schedule, a_step, store_all_schedule
from tests.test_cli import run_cli
from tests.test_report_html import HOSTILE, Elements, hostile_step

ROOT = Path(__file__).resolve().parents[1]


def a_plan(layers: int = 4, *, stores_all: bool = False) -> Plan:
    graph = a_step(layers)
    schedule = store_all_schedule(graph) if stores_all else a_schedule(graph)
    stored = store_all(graph)
    return Plan(graph, schedule, schedule.budget_bytes, stored.peak_bytes, stored.time_s, 4000, 1000, 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    a_plan().save(tmp_path / "plan.json")
    a_plan(stores_all=True).save(tmp_path / "stored.json")
    a_plan(5).save(tmp_path / "another.json")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("html", "page.html"),
        ("perfetto", "trace.json"),
        ("memory_viz", "snapshot.pickle"),
        ("csv", "rows.csv"),
        ("svg", "figure.svg"),
    ],
)
def test_each_format_is_written_by_name_and_by_suffix(folder: Path, name: str, file: str) -> None:
    done = run_cli("export", "plan.json", "--format", name, "-o", file, cwd=folder)
    assert (done.stdout, done.stderr) == ("", f"rematerialize: wrote {file}\n")
    first = (folder / file).read_bytes()
    done = run_cli("export", "plan.json", "-o", file, "--force", "--json", "-q", cwd=folder)
    said = json.loads(done.stdout)
    assert said == {"schema": "rematerialize.export/1", "format": name, "path": file, "size_bytes": said["size_bytes"]}
    check = {
        "html": lambda data: data.startswith(b"<!doctype html>") and b"What other budgets cost" not in data,
        "perfetto": lambda data: "traceEvents" in json.loads(data),
        "memory_viz": lambda data: set(pickle.loads(data)) >= {"segments", "device_traces"},
        "csv": lambda data: len(list(csv.reader(io.StringIO(data.decode())))) == 15,
        "svg": lambda data: b"<svg" in data,
    }[name]
    assert check(first)


def test_a_page_is_headed_by_its_plans_file(folder: Path) -> None:
    run_cli("export", "plan.json", "-o", "page.html", cwd=folder)
    assert "<h1>Memory plan of a training step: plan.json</h1>" in (folder / "page.html").read_text(encoding="utf-8")


def test_text_goes_to_stdout_without_an_output(folder: Path) -> None:
    done = run_cli("export", "plan.json", "--format", "csv", cwd=folder)
    assert done.stdout.splitlines()[0].startswith("position,phase,op")
    assert done.stderr == ""


@pytest.mark.parametrize(("name", "start"), [("png", b"\x89PNG"), ("memory_viz", b"\x80")])
def test_a_pipe_takes_what_is_not_text_too(folder: Path, name: str, start: bytes) -> None:
    if name == "png":
        pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "rematerialize", "export", "plan.json", "--format", name]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    assert done.stdout.startswith(start)


def test_a_terminal_is_told_where_else_it_could_go(folder: Path) -> None:
    code, shown = on_terminal("export", str(folder / "plan.json"), "--format", "memory_viz")
    assert code == 2
    assert "memory_viz is not for a terminal: say where to write it, for example -o plan.pickle" in shown


@pytest.mark.parametrize(
    ("key", "value"),
    [("peak_bytes", "x"), ("peak_bytes", 4000), ("peak_bytes", None), ("overhead", 0.01), ("gap", 0.5)],
)
def test_a_plan_file_whose_figures_do_not_go_together_is_refused(folder: Path, key: str, value: object) -> None:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    (folder / "odd.json").write_text(json.dumps({**plan, key: value}), encoding="utf-8")
    for command in (("explain", "odd.json"), ("export", "odd.json", "-o", "page.html")):
        done = run_cli(*command, cwd=folder, code=2)
        assert f"odd.json: {key} is {value!r}, its schedule gives" in done.stderr
        assert done.stdout == ""


def test_what_is_wrong_inside_a_plan_names_the_file(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    (folder / "odd.json").write_text(json.dumps({**plan, "graph": {}}), encoding="utf-8")
    assert (
        "odd.json is not a good plan: graph: format is None"
        in run_cli("explain", "odd.json", cwd=folder, code=2).stderr
    )


def test_the_librarys_files_fail_in_the_packages_own_words(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ScheduleError, match=r"there is no file .*plam\.json; did you mean 'plan\.json'\?"):
        Plan.load(folder / "plam.json")
    with pytest.raises(ScheduleError, match="can't read the plan"):
        Plan.load(folder)
    with pytest.raises(RematerializeError, match=r"can't write the plan .*no/such/plan\.json: No such file"):
        a_plan().save(tmp_path / "no/such/plan.json")


def test_a_figure_that_can_not_be_written_says_so_in_the_packages_own_words(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(RematerializeError, match=r"can't write the figure .*no/such/plan\.png: No such file"):
        a_plan().plot(tmp_path / "no/such/plan.png")


def test_exports_have_the_plans_own_time_of_storing_everything(folder: Path) -> None:
    """Its graph may be of another way to run the step, which takes longer when everything is stored."""
    graph, schedule = a_step(), a_schedule(a_step())
    plan = Plan(graph, schedule, schedule.budget_bytes, 5400, store_all(graph).time_s * 0.8, 4000, 1000, 0.5)
    plan.save(folder / "masked.json")
    run_cli("export", "masked.json", "-o", "page.html", cwd=folder)
    text = "".join(Elements((folder / "page.html").read_text(encoding="utf-8")).text)
    assert f"for {format_percent(plan.overhead)} more compute time" in text
    assert "smallest that works: 3.91 KiB" in text
    run_cli("export", "masked.json", "-o", "trace.json", "--format", "perfetto", cwd=folder)
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    ends = [event["ts"] + event["dur"] for event in events if event["ph"] == "X" and event["pid"] == 2]
    assert max(ends) == pytest.approx(plan.store_all_time_s * 1e6)
    assert f"store-all {format_bytes(5400)}" in plan._repr_html_().replace(", ", " ")


def test_other_plans_make_the_pages_frontier(folder: Path) -> None:
    run_cli("export", "plan.json", "-o", "page.html", "--with", "stored.json", cwd=folder)
    text = "".join(Elements((folder / "page.html").read_text(encoding="utf-8")).text)
    assert "this plan: 4.40 KiB, 50.0%" in text
    assert "5.86 KiB0.0%" in text


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("plan.json", "--format", "htlm"), "unknown --format 'htlm': did you mean html? choose one of html, perfetto"),
        (("plan.json", "--format", "zzz"), "unknown --format 'zzz': choose one of html"),
        (("plan.json",), "expected --format, one of html, perfetto, memory_viz, csv"),
        (("plan.json", "--format", "perfetto", "-o", "a.csv"), "ends like --format csv, got --format perfetto"),
        (("plan.json", "--format", "perfetto", "-o", "plan.json", "--force"), "-o plan.json is the plan itself"),
        (("plan.json", "-o", "page.hmtl"), "got -o page.hmtl; did you mean '.html'?"),
        (("plan.json", "-o", "stored.json"), "stored.json exists already: give --force"),
        (("plan.json", "-o", "no/such/page.html"), "there is no folder no/such"),
        (("missing.json", "-o", "page.html"), "there is no file missing.json"),
        (("plam.json", "-o", "page.html"), "there is no file plam.json; did you mean 'plan.json'?"),
        (("plan.json", "-o", "page.html", "--with", "storde.json"), "no file storde.json; did you mean 'stored.json'?"),
        (("plan.json", "-o", ".", "--format", "html"), "is a folder: name a file in it"),
        (("plan.json", "-o", ".", "--format", "html", "--force"), "is a folder: name a file in it"),
        (("bad.json", "-o", "page.html"), "bad.json is not a plan: it isn't valid JSON"),
        (("plan.json", "-o", "page.html", "--with", "another.json"), "another.json is a plan of another step"),
        (("plan.json", "-o", "rows.csv", "--with", "stored.json"), "--with adds plans to the page"),
    ],
)
def test_what_cannot_be_exported_is_one_line(folder: Path, args: tuple[str, ...], says: str) -> None:
    (folder / "bad.json").write_text("{", encoding="utf-8")
    before = sorted(path.name for path in folder.iterdir())
    done = run_cli("export", *args, cwd=folder, code=2)
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert sorted(path.name for path in folder.iterdir()) == before


def test_exporting_never_imports_torch(folder: Path) -> None:
    program = (
        "import sys\nfrom rematerialize.cli import main\n"
        "try:\n    main(['export', 'plan.json', '-o', 'page.html', '-q'])\n"
        "except SystemExit as done:\n    sys.exit(done.code or ('torch' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, env={"PYTHONPATH": str(ROOT)})


def test_a_plan_draws_itself_to_a_file_or_a_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = a_plan()
    figure = plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    plan.plot(tmp_path / "plan.svg")
    assert b"<svg" in (tmp_path / "plan.svg").read_bytes()
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["store-all, 5.86 KiB", "this plan, 4.40 KiB", "activation budget, 4.50 KiB"]
    stored, planned = axes.lines[0], axes.lines[1]
    assert max(stored.get_ydata()) == 6000
    assert max(planned.get_ydata()) == plan.peak_bytes
    with pytest.raises(RematerializeError, match=r"the suffix must be one of \.png, \.svg, \.pdf"):
        plan.plot(tmp_path / "plan.bmp")


def test_a_frontier_is_drawn_with_the_chosen_plan(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = (FrontierPoint(6000, 6000, 0.0), FrontierPoint(4600, 4500, 0.5))
    for chosen in (None, 0, 1):
        figure = frontier_figure(points, chosen=chosen)
        save_figure(figure, tmp_path / "frontier.svg")
    (text,) = figure.axes[0].texts
    assert text.get_text() == "this plan: 4.40 KiB, 50.0%"
    with pytest.raises(RematerializeError, match="at least one point"):
        frontier_figure(())
    with pytest.raises(RematerializeError, match="chosen must be a position"):
        frontier_figure(points, chosen=2)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RematerializeError, match=r"pip install 'rematerialize\[plot\]'"):
        a_plan().plot()


def test_an_empty_or_untimed_step_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timeline = store_all(a_long_step(10, time_s=0.0))
    save_figure(memory_figure(timeline, timeline, budget_bytes=9), tmp_path / "a.svg")


def test_a_notebook_shows_the_table_beside_the_memory() -> None:
    plan = a_plan()
    shown = plan._repr_html_()
    parsed = Elements(shown)
    assert parsed.open == []
    text = " ".join(parsed.text)
    for name, value in (("budget", "4.50 KiB"), ("overhead", "50.0%"), ("solver", "by hand")):
        assert f"{name} {value}" in text
    assert "this plan 4.40 KiB" in text
    assert not {"script", "style", "link", "img"} & {tag for tag, _ in parsed.found}
    assert "http" not in shown
    assert "Training step under an activation budget" in text  # a plan by hand: nobody knows of what


def test_a_notebook_names_the_model_and_the_budget_that_was_asked_for() -> None:
    origin = Origin("Net<x>", "float32", "AMD EPYC", asked="8.00 KiB", whole=True, reserve_bytes=2048)
    parsed = Elements(replace(a_plan(), origin=origin)._repr_html_())
    assert parsed.open == []
    assert parsed.text[:2] == [
        "Memory plan of Net<x>",
        "float32; costs measured on AMD EPYC; asked for: a budget of 8.00 KiB, 2.00 KiB of it reserved",
    ]
    assert "activation budget 4.50 KiB" in " ".join(parsed.text)  # what of it the drawing and the table are in


def test_a_notebook_shows_names_as_text_and_stays_small() -> None:
    graph = hostile_step()
    timeline = of_schedule(graph, store_all_schedule(graph))
    shown = plan_html(HOSTILE, [(HOSTILE, HOSTILE)], timeline, timeline, budget_bytes=8)
    assert not {"script", "img"} & {tag for tag, _ in Elements(shown).found}
    long = store_all(a_long_step(20_000))
    assert len(plan_html("plan", [], long, long, budget_bytes=1)) < 100_000


@pytest.mark.parametrize("key", ["store_all_peak_bytes", "resident_bytes", "store_all_time_s", "minimum_bytes"])
def test_a_figure_that_no_replay_gives_is_held_by_the_files_digest(folder: Path, key: str) -> None:
    saved = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    odd = folder / "odd.json"
    odd.write_text(json.dumps({**saved, key: saved[key] * 2 + 1, "overhead": saved["overhead"]}), encoding="utf-8")
    with pytest.raises(ScheduleError, match=r"odd\.json: .*make a new plan"):
        Plan.load(odd)
    odd.write_text(json.dumps({**saved, "made_for": {"target": "another"}}), encoding="utf-8")
    with pytest.raises(ScheduleError, match="changed since it was saved"):
        Plan.load(odd)


def test_a_size_that_is_not_live_at_the_peak_is_held_by_the_digest_too(folder: Path) -> None:
    saved = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    saved["graph"]["storages"]["x"] += 1  # resident: no replay counts it
    (folder / "odd.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(ScheduleError, match="changed since it was saved"):
        Plan.load(folder / "odd.json")


def test_a_store_all_peak_far_from_the_graphs_own_is_refused_without_a_digest_too(folder: Path) -> None:
    saved = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    del saved["digest"]
    for factor in (100, 0.01):
        odd = {**saved, "store_all_peak_bytes": int(saved["store_all_peak_bytes"] * factor)}
        (folder / "odd.json").write_text(json.dumps(odd), encoding="utf-8")
        with pytest.raises(ScheduleError, match="storing everything takes 6000 bytes by replay"):
            Plan.load(folder / "odd.json")


def test_files_of_before_and_files_that_tools_wrote_anew_are_read(folder: Path) -> None:
    saved = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    old = {key: value for key, value in saved.items() if key not in ("made_for", "digest")}
    (folder / "old.json").write_text(json.dumps(old), encoding="utf-8")
    with pytest.warns(UncheckedPlanWarning, match="old.json has no digest: what is resident") as warned:
        assert Plan.load(folder / "old.json").origin == Origin()
    assert [one.filename for one in warned] == [__file__]
    done = run_cli("explain", "old.json", "-q", cwd=folder)
    assert done.stdout.startswith("Plan of old.json\n  activation budget")
    assert done.stderr.startswith("rematerialize: warning: old.json has no digest: ")
    assert done.stderr.count("\n") == 1
    whole = dict(sorted(saved.items())) | {"more": [1], "store_all_time_s": int(saved["store_all_time_s"])}
    (folder / "again.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Plan.load(folder / "again.json") == a_plan()


@pytest.mark.parametrize("without", [{}, {"digest": ""}, {"digest": None}])
def test_a_file_whose_digest_was_cut_out_is_not_taken_for_an_old_one(
    folder: Path, without: dict[str, str | None]
) -> None:
    saved = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    del saved["digest"]
    (folder / "cut.json").write_text(json.dumps({**saved, **without, "resident_bytes": 1}), encoding="utf-8")
    with pytest.raises(ScheduleError, match=r"cut\.json: its digest is gone, .*make a new plan"):
        Plan.load(folder / "cut.json")


def test_the_smallest_budget_of_an_old_file_is_at_most_what_its_schedule_needs(folder: Path) -> None:
    saved = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    old = {key: value for key, value in saved.items() if key not in ("made_for", "digest")}
    (folder / "old.json").write_text(json.dumps({**old, "minimum_bytes": 10**9}), encoding="utf-8")
    with pytest.warns(UncheckedPlanWarning):
        assert Plan.load(folder / "old.json").minimum_bytes == a_plan().peak_bytes


def test_a_page_and_a_figure_say_what_the_plan_is_of(folder: Path) -> None:
    origin = Origin("zoo:gpt<x>", "float32", "AMD EPYC", asked="50%", whole=True, reserve_bytes=2048)
    replace(a_plan(), origin=origin).save(folder / "named.json")
    loaded = Plan.load(folder / "named.json")
    assert loaded.origin == origin
    assert loaded.besides_bytes == 1000 + 2048
    run_cli("export", "named.json", "-o", "page.html", cwd=folder)
    text = "".join(Elements((folder / "page.html").read_text(encoding="utf-8")).text)
    assert "Memory plan of zoo:gpt<x>" in text
    assert "float32; costs measured on AMD EPYC; asked for: a budget of 50%, 2.00 KiB of it reserved" in text
    assert f"Budget{format_bytes(loaded.budget_bytes + 3048)}smallest that works: {format_bytes(7048)}" in text
    assert f"activation budget {format_bytes(loaded.budget_bytes)}" in text
    said = run_cli("explain", "named.json", cwd=folder).stdout
    assert said.startswith("Plan of zoo:gpt<x>\n  type ")
    assert "50%: " in said
    assert run_cli("explain", "named.json", "--json", cwd=folder).stdout.count('"target": "zoo:gpt<x>"') == 1
    pytest.importorskip("matplotlib")
    loaded.plot(folder / "figure.svg")
    assert "<!-- Memory plan of zoo:gpt&lt;x&gt; -->" in (folder / "figure.svg").read_text(encoding="utf-8")


def test_what_a_plan_is_said_to_be_for_must_be_of_the_right_kind(folder: Path) -> None:
    saved = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    for odd in ({"target": 3}, {"reserve_bytes": -1}, {"whole": 1}, [1]):
        (folder / "odd.json").write_text(json.dumps({**saved, "made_for": odd}), encoding="utf-8")
        with pytest.raises(ScheduleError, match=r"odd\.json: made_for.* must be"):
            Plan.load(folder / "odd.json")
