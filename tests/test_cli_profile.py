"""``profile``, ``plan``, ``frontier``, ``max-batch`` and ``explain``: tables, JSON, files, refusals."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

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
    for words in ("store all", "checkpoint every block", "this plan", "smallest that works", "measured on"):
        assert words in said.stdout
    explained = call(capfd, "explain", "plan.json", "--ops")
    assert "making it again would cost" in explained.stdout or "runs once more" in explained.stdout
    one = call(capfd, "explain", "plan.json", "--module", "0", "--json").json()
    assert {row["module"] for row in one["ops"]} == {"0"}
    assert one["schema"] == "rematerialize.explain/1"
    assert "no module 'nope'" in call(capfd, "explain", "plan.json", "--module", "nope", code=2).error()


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


def test_a_frontier_falls_and_costs_more(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    points = call(capfd, "frontier", target, "--points", "4", "--json", "--measure").json()
    peaks = [point["peak_bytes"] for point in points["points"]]
    assert peaks == sorted(peaks, reverse=True)
    assert all(trial["peak_bytes"] <= peak for trial, peak in zip(points["measured"], peaks, strict=True))


def test_a_frontier_refuses_a_file_that_it_cannot_write_before_planning(
    target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ".html" in call(capfd, "frontier", target, "-o", "f.docx", code=2).error()


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
        ("profile", "net.py:make", "--optimizer", "adamx"),
        ("profile", "net.py:make", "--device", "NVIDIA H100"),
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
