"""``compare``: every way of stepping a target, judged before it is measured."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rematerialize.compare
from rematerialize.budget import read_budget
from rematerialize.compare import Cell, Contest
from rematerialize.harness import Stepper
from rematerialize.plans import Plan
from rematerialize.targets.load import load
from rematerialize.torch_budget import PeerError
from tests.cli import call

CODE = """
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(32, 32), nn.BatchNorm1d(32)
        def forward(self, x):
            return x + torch.tanh(self.norm(self.linear(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def make():
        return Net(), (torch.randn(64, 32),)

    def plain():
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), (torch.randn(4, 8),)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_plans: None) -> None:
    (tmp_path / "compared_net.py").write_text(textwrap.dedent(CODE), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "compared_net", raising=False)


def contest_of(target: str, say: Callable[[Cell], None] | None = None) -> Contest:
    return Contest(load(target), lambda per_block: load(target, per_block=per_block), say)


def without_torchs(make: Callable[[], Stepper], budget: float) -> Stepper:
    """Stands in for torch's budget: compiling takes most of a test's time."""
    raise PeerError("no compiler here")


def test_every_contestant_has_a_line_and_wrong_results_are_marked(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rematerialize.compare, "compiled_under", without_torchs)
    said = call(capfd, "compare", "compared_net:make", "--rounds", "2", "-q")
    lines = {line.split("  ")[0]: line for line in said.stdout.splitlines()}
    assert list(lines)[3:] == [
        "store-all",
        "per block",
        "torch 0.5",
        "torch 0.2",
        "torch 0.1",
        "torch 0",
        "ours 50%",
        "ours at per block's peak",
        "ours minimum",
    ]
    # A checkpointed BatchNorm is updated twice
    assert "buffers differ" in lines["per block"]
    assert " !" in lines["per block"]
    assert "3 blocks in layers" in lines["per block"]
    assert "failed" in lines["torch 0.5"]
    assert "no compiler here" in lines["torch 0.5"]
    assert " ok" in lines["store-all"]


def test_the_comparison_as_data(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rematerialize.compare, "compiled_under", without_torchs)
    args = ("compare", "compared_net:make", "--activation-budget", "80%", "--rounds", "1", "--json")
    found = call(capfd, *args).json()
    assert found["schema"] == "rematerialize.comparison/1"
    cells = {cell["name"]: cell for cell in found["cells"]}
    assert set(cells) == {"store-all", "per block", "torch 0.5", "torch 0.2", "torch 0.1", "torch 0", "ours 80%"}
    ours, eager = cells["ours 80%"], cells["store-all"]
    assert ours["status"] == "ok"
    assert ours["peak_bytes"] < eager["peak_bytes"]
    assert eager["ratio"] == 1.0
    assert ours["step_s"] > 0


def test_torchs_own_budget_is_compiled_and_judged() -> None:
    contest = contest_of("compared_net:plain")
    cell = contest.enter("torch 0.5", lambda: contest.torch_budget(0.5))
    assert cell.status == "ok", cell.detail
    assert "forward ops recomputed" in cell.detail


def test_wrong_gradients_are_not_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rematerialize.compare.planned_forward

    def spoiled(model: nn.Module, plan: Plan, inputs: Any) -> Callable[..., Any]:
        return lambda x: real(model, plan, inputs)(x) * 1.01

    monkeypatch.setattr(rematerialize.compare, "planned_forward", spoiled)
    seen: list[Cell] = []
    contest = contest_of("compared_net:make", seen.append)
    cell = contest.enter("ours", lambda: contest.ours("minimum"))
    assert cell.status == "wrong gradients"
    assert [cell.name for cell in seen] == ["store-all", "ours"]


def test_what_does_not_fit_says_the_least_that_does() -> None:
    contest = contest_of("compared_net:make")
    cell = contest.enter("ours", lambda: contest.ours(read_budget(None, 1)))
    assert cell.status == "doesn't fit"
    assert "the smallest that works is" in cell.detail
    assert cell.peak_bytes is None


def test_a_whole_budget_says_what_is_held_of_it() -> None:
    contest = contest_of("compared_net:make")
    request = read_budget("16MiB", None, "1MiB", "adamw", contest.target.model)
    cell = contest.enter("ours", lambda: contest.ours(request))
    assert cell.status == "ok"
    assert re.fullmatch(r"1\.\d\d MiB of 16\.00 MiB with what is resident or reserved", cell.detail), cell.detail


def test_a_step_that_is_off_by_more_than_rounding_is_named_by_what_differs() -> None:
    contest = contest_of("compared_net:make")

    def drawing(x: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        result: torch.Tensor = contest.target.model(x)
        return result

    cell = contest.enter("drawing", lambda: replace(contest.eager, call=drawing))
    assert cell.status == "buffers differ"
    assert "generator state differs" in cell.detail


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("zoo:gtp",), "did you mean 'gpt'?"),
        (("compared_net:make", "--budget", "1GiB", "--activation-budget", "1GiB"), "got both"),
        (("compared_net:make", "--activation-budget", "0.5"), "--activation-budget"),
        (("compared_net:make", "--device", "NVIDIA H100 80GB"), "compare runs steps"),
        (("compared_net:make", "--rounds", "0"), "--rounds"),
        (("compared_net:make", "--reserve", "1MiB"), "--optimizer and --reserve count in a --budget, got none"),
        (("compared_net:make", "--activation-budget", "1MiB", "--reserve", "1MiB"), "--reserve belongs to --budget"),
        (("compared_net:mke",), "did you mean 'make'?"),
    ],
)
def test_what_can_not_be_compared_is_one_line(
    args: tuple[str, ...], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert says in call(capfd, "compare", *args, code=2).error()
