"""``profile``, ``plan``, ``frontier``, ``max-batch`` and ``explain``: tables, JSON, files, refusals."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rematerialize.api
from rematerialize.plans import Plan
from tests.cli import call

CODE = """
import torch
from torch import nn

def make():
    layers = [part for _ in range(4) for part in (nn.Linear(32, 32), nn.GELU())]
    return nn.Sequential(*layers), (torch.randn(64, 32),)
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "net.py").write_text(CODE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return "net.py:make"


def test_profile_shows_the_peak_the_tensors_and_the_modules(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    said = call(capfd, "profile", target, "--depth", "1", "--top", "3", "--measure")
    for words in (
        "parameters",
        "reached in the",
        "Memory over the step",
        "Largest tensors",
        "Modules",
        "measured step",
    ):
        assert words in said.stdout
    assert "USDT" not in said.stderr


def test_profile_as_json_has_a_schema_and_exact_bytes(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = call(capfd, "profile", target, "--json", "-q").json()
    assert found["schema"] == "rematerialize.profile/1"
    assert {type(value) for name, value in found.items() if name.endswith("_bytes")} == {int}
    assert found["resident"]["parameters"] == 4 * (32 * 32 + 32) * 4
    assert max(found["timeline"]) == found["activation_peak_bytes"]


def test_quiet_says_nothing_but_data(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(capfd, "profile", target, "-q").stderr == ""


def test_bytes_shows_exact_sizes(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "16,896 B" in call(capfd, "profile", target, "--bytes").stdout


def test_a_plan_is_shown_beside_store_all_and_full_checkpointing(
    target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    said = call(capfd, "plan", target, "--activation-budget", "70%", "-o", "plan.json")
    for words in ("store all", "recompute whole blocks", "this plan", "smallest that works", "measured on"):
        assert words in said.stdout
    explained = call(capfd, "explain", "plan.json", "--ops")
    assert "making it again would cost" in explained.stdout or "runs once more" in explained.stdout
    one = call(capfd, "explain", "plan.json", "--module", "0", "--json").json()
    assert {row["module"] for row in one["ops"]} == {"0"}
    assert one["schema"] == "rematerialize.explain/1"
    blocks = call(capfd, "explain", "plan.json", "--module", "0", "--ops").stdout
    assert blocks.startswith("Forward ops of 0\n")
    assert "(itself)" in blocks
    assert max(map(len, blocks.splitlines())) <= 150
    assert "no module 'nope'" in call(capfd, "explain", "plan.json", "--module", "nope", code=2).error()


def test_a_plan_says_what_was_asked_in_its_scope(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("plan", target, "--bytes", "--optimizer", "adamw", "--reserve", "1MiB", "--budget")
    call(capfd, *asked, "64MiB", "-o", "plan.json")
    state, resident = 2 * 16896 + 8 * 4, 16896 + 64 * 32 * 4  # two moments and a count for each parameter
    rows = dict(
        line.strip().rsplit("  ", 1) for line in call(capfd, *asked, "64MiB").stdout.splitlines() if "in it" in line
    )
    plan = Plan.load("plan.json")
    assert plan.besides_bytes == resident + 2**20 + state
    said = call(capfd, *asked, "64MiB").stdout
    assert re.search(
        rf"^  smallest budget that works +{plan.minimum_bytes + plan.besides_bytes:,} B$", said, re.MULTILINE
    )
    assert {name.strip(): value for name, value in rows.items()} == {
        "resident in it": f"{resident:,} B",
        "reserved in it": f"{2**20 + state:,} B",
    }
    assert re.search(r"^  budget +67,108,864 B$", call(capfd, *asked, "64MiB").stdout, re.MULTILINE)
    assert re.search(r"^  budget +50%: [\d,]+ B$", call(capfd, *asked, "50%").stdout, re.MULTILINE)
    assert re.search(r"^  budget +auto: [\d,]+ B$", call(capfd, *asked, "auto").stdout, re.MULTILINE)
    said = call(capfd, "plan", target, "--activation-budget", "70%").stdout
    assert not re.search(r"^  budget", said, re.MULTILINE)
    assert "resident besides" in said


def test_a_fused_op_is_told_by_all_that_it_does(target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fused.py").write_text(CODE.replace("nn.GELU()", "nn.BatchNorm1d(32), nn.ReLU()"), encoding="utf-8")
    call(capfd, "plan", "fused.py:make", "--activation-budget", "100%", "-o", "plan.json")
    said = call(capfd, "explain", "plan.json", "--ops").stdout
    assert "_native_batch_norm_legit + relu " in said
    assert "forward ops" in said


def test_a_module_is_found_by_the_closest_name_of_those_around_it(
    target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code = CODE.replace("nn.Sequential(*layers)", "nn.ModuleDict({'blocks': nn.Sequential(*layers)})['blocks']")
    Path("named.py").write_text(
        code.replace("return nn.ModuleDict", "return Net(nn.ModuleDict").replace("['blocks'],", "),")
        + "class Net(nn.Module):\n"
        "    def __init__(self, parts):\n        super().__init__()\n        self.parts = parts\n"
        "    def forward(self, x):\n        return self.parts['blocks'](x)\n",
        encoding="utf-8",
    )
    call(capfd, "plan", "named.py:make", "--activation-budget", "100%", "-o", "named.json")
    said = call(capfd, "explain", "named.json", "--module", "parts.blcks", code=2).error()
    assert said.endswith("; did you mean 'parts.blocks'?")


def test_the_page_of_a_frontier_says_which_plan_it_shows(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    said = call(capfd, "frontier", target, "--points", "3", "-o", "f.html")
    which = "plan 2 of 3, the one in the middle"
    assert f"the page shows {which}" in said.stderr
    assert f"This page shows {which}. " in Path("f.html").read_text(encoding="utf-8")


def test_a_batch_that_never_fits_is_exit_code_3_after_its_table(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("max-batch", target, "--budget", "1KiB", "--no-confirm")
    said = call(capfd, *asked, code=3)
    assert re.search(r"^  largest batch, rematerialized +0$", said.stdout, re.MULTILINE)
    assert call(capfd, *asked, "--json", "-o", "batch.json", code=3).stdout == ""
    assert json.loads(Path("batch.json").read_text(encoding="utf-8"))["with_plan"] == 0


def test_a_file_of_the_wrong_kind_says_how_the_right_one_is_made(
    target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    call(capfd, "plan", target, "--activation-budget", "70%", "-o", "plan.json")
    solve = call(capfd, "solve", "plan.json", "--budget", "70%", code=2).error()
    assert solve.startswith("plan.json is a plan, and solve takes a graph")
    assert "--graph graph.json" in solve
    for command in (("explain",), ("export", "-o", "page.html")):
        for given in (target, "net.py", "zoo:gpt"):
            said = call(capfd, command[0], given, *command[1:], code=2).error()
            assert f"{command[0]} takes a plan file, got {given}" in said
            assert "-o plan.json" in said


def test_a_result_is_not_overwritten_without_force(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("plan.json").write_text("mine", encoding="utf-8")
    asked = ("plan", target, "--activation-budget", "70%", "-o", "plan.json")
    assert "--force" in call(capfd, *asked, code=2).error()
    assert Path("plan.json").read_text(encoding="utf-8") == "mine"
    call(capfd, *asked, "--force")
    assert json.loads(Path("plan.json").read_text(encoding="utf-8"))["format"] == "rematerialize.plan/1"


@pytest.mark.parametrize("suffix", [".html", ".csv", ".png"])
def test_a_frontier_is_a_table_and_a_file(suffix: str, target: str, capfd: pytest.CaptureFixture[str]) -> None:
    if suffix == ".png":
        pytest.importorskip("matplotlib")
    said = call(capfd, "frontier", target, "--points", "3", "-o", f"f{suffix}")
    assert "of store-all" in said.stdout
    assert Path(f"f{suffix}").stat().st_size > 50


@pytest.mark.slow
def test_a_measured_frontier_has_predicted_and_real_figures_side_by_side_in_every_form(
    target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ("frontier", target, "--points", "3", "--measure", "-q")
    said = call(capfd, *asked, "-o", "f.csv").stdout
    assert re.search(r"measured peak +off +predicted step +measured step +off +of eager's", said)
    assert re.search(r"[\d.]+ [mu]s +[\d.]+ [mu]s +[+-]\d+\.\d%", said)
    with Path("f.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 2
    measured = ("measured_peak_bytes", "measured_step_s", "predicted_step_s")
    for name in ("gap", "recomputed_ops", "with_residents_bytes", "step_s", *measured):
        assert all(float(row[name]) >= 0 for row in rows), name
    printed = call(capfd, *asked, "--json", "-o", "f.json").json()
    assert json.loads(Path("f.json").read_text(encoding="utf-8")) == printed
    assert len(printed["measured"]) == len(printed["points"])
    for point, trial in zip(printed["points"], printed["measured"], strict=True):
        assert {type(value) for name, value in point.items() if name.endswith("_bytes")} == {int}
        assert trial["predicted_step_s"] > point["step_s"], "a call takes time besides its kernels"
    call(capfd, *asked, "-o", "f.html")
    assert Path("f.html").read_text(encoding="utf-8").count('title="measured: ') >= 2
    pytest.importorskip("matplotlib")
    call(capfd, *asked, "-o", "f.svg")
    drawn = Path("f.svg").read_text(encoding="utf-8")
    assert "<!-- measured -->" in drawn
    assert f"<!-- Memory and overhead of {target} -->" in drawn


def test_a_frontier_falls_and_costs_more(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    points = call(capfd, "frontier", target, "--points", "4", "--json", "--measure").json()
    peaks = [point["peak_bytes"] for point in points["points"]]
    assert peaks == sorted(peaks, reverse=True)
    assert all(trial["peak_bytes"] <= peak for trial, peak in zip(points["measured"], peaks, strict=True))


def test_a_frontier_refuses_a_file_that_it_cannot_write_before_planning(
    target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ".html" in call(capfd, "frontier", target, "-o", "f.docx", code=2).error()
    assert call(capfd, "frontier", target, "-o", "f.htm", code=2).error().endswith("f.htm; did you mean '.html'?")


def test_the_largest_batch(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = call(capfd, "max-batch", target, "--budget", "128KiB", "--json", "--no-confirm").json()
    assert found["schema"] == "rematerialize.max-batch/1"
    assert 0 < found["without"] <= found["with_plan"]


def test_a_named_device_is_computed_not_measured(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    said = call(capfd, "plan", target, "--activation-budget", "70%", "--device", "NVIDIA H100 80GB")
    assert "computed for NVIDIA H100 80GB" in said.stdout
    assert "--measure" in call(capfd, "profile", target, "--measure", "--device", "NVIDIA H100 80GB", code=2).error()


@pytest.mark.parametrize(
    "args",
    [
        ("plan", "net.py:make"),
        ("plan", "net.py:make", "--budget", "1GiB", "--activation-budget", "1GiB"),
        ("plan", "net.py:make", "--budget", "much"),
        ("profile", "net.py:mak"),
        ("profile", "net.py:make", "--device", "NVIDIA H150"),
        ("max-batch", "net.py:make", "--activation-budget", "50%"),
        ("max-batch", "net.py:make", "--budget", "1GiB", "--batch-dim", "7"),
        ("explain", "absent.json"),
    ],
    ids=" ".join,
)
def test_wrong_words_are_one_line(args: tuple[str, ...], target: str, capfd: pytest.CaptureFixture[str]) -> None:
    said = call(capfd, *args, code=2)
    assert said.error()
    assert said.stdout == ""


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("profile", "--optimizer", "admaw"), "unknown optimizer 'admaw': expected one of asgd, "),
        (("profile", "--optimizer", "admaw"), "; did you mean 'adamw'?"),
        (("frontier", "--optimizer", "sdg"), "; did you mean 'sgd'?"),
        (
            ("max-batch", "--budget", "1MiB", "--max-overhead", "lots"),
            "--max-overhead 'lots' can't be read: expected a ",
        ),
        (("profile", "--device", "h100"), "did you mean 'NVIDIA H100 80GB' or 'NVIDIA H100 PCIe 80GB'?"),
        (("profile", "--device", "NVIDIA H100"), "; did you mean 'NVIDIA H100 80GB'"),
        (("plan", "--budget", "1GiB", "--reserve", "x"), "--reserve 'x' can't be read: expected bytes (8589934592) or"),
        (("profile", "--reserve", "0.5"), "--reserve '0.5' has no unit"),
        (("frontier", "--reserve", "x"), "--reserve 'x' can't be read"),
        (("max-batch", "--budget", "1GiB", "--reserve", "-1"), "--reserve '-1' is not positive"),
        (("plan", "--activation-budget", "50%", "--reserve", "1MiB"), "leave --reserve out"),
        (("max-batch", "--activation-budget", "1MiB", "--optimizer", "sgd"), "leave --optimizer out"),
        (("plan", "--activation-budget", "50%", "-o", "."), ". is a folder: name a file in it"),
        (("plan", "--activation-budget", "50%", "-o", ".", "--force"), ". is a folder: name a file in it"),
    ],
)
def test_a_near_miss_is_told_what_is_close_and_in_the_shells_words(
    args: tuple[str, ...], says: str, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    said = call(capfd, args[0], target, *args[1:], code=2)
    assert says in said.error()
    assert said.stdout == ""


def test_a_frontier_counts_the_optimizers_state_and_the_reserve(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("frontier", target, "--points", "2", "--bytes", "-q")
    state = 2 * 16896 + 8 * 4
    alone, more = (
        call(capfd, *asked, *besides).stdout.splitlines()[3:]
        for besides in ((), ("--optimizer", "adamw", "--reserve", "1MiB"))
    )
    for line, other in zip(alone, more, strict=True):
        before, after = (re.findall(r"([\d,]+) B", text) for text in (line, other))
        assert before[0] == after[0]
        assert int(after[1].replace(",", "")) - int(before[1].replace(",", "")) == state + 2**20
    found = call(capfd, *asked, "--optimizer", "adamw", "--json").json()
    assert (found["optimizer_bytes"], found["reserve_bytes"]) == (state, 0)


def test_the_page_of_a_frontier_has_one_overhead_for_its_plan(
    target: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans_of = rematerialize.api.frontier

    def of_another_way(*args: Any, **options: Any) -> tuple[Plan, ...]:
        """Plans whose graphs take longer than the step as it is, when everything is stored."""
        return tuple(replace(plan, store_all_time_s=plan.store_all_time_s * 0.8) for plan in plans_of(*args, **options))

    monkeypatch.setattr(rematerialize.api, "frontier", of_another_way)
    call(capfd, "frontier", target, "--points", "3", "-o", "f.html")
    page = Path("f.html").read_text(encoding="utf-8")
    (headline,) = re.findall(r"for (-?[\d.]+%) more compute time", page)
    (card,) = re.findall(r"<dt>Overhead</dt><dd>(-?[\d.]+%)<", page)
    (chart,) = re.findall(r"this plan: [\d.]+ \w+, (-?[\d.]+%)", page)
    assert headline == card == chart
    assert float(card[:-1]) >= 25


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_lines_and_colour_and_no_color_is_heeded(no_color: bool, target: str) -> None:
    program = "from rematerialize.cli.console import Console; Console().table('T', ('a', 'b'), [('x', '1')])"
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm-256color"}
    env |= {"NO_COLOR": "1"} if no_color else {}
    ours, theirs = pty.openpty()
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", program], stdout=theirs, env=env | {"PYTHONPATH": str(root)}, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "─" in shown
    assert "\x1b[3" not in shown.replace("\x1b[3m", "") or not no_color  # bold and italic stay, colours go
