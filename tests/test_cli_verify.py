"""``verify``: every promise of a plan is looked at, and a broken one is exit code 4."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rematerialize.verify
from rematerialize.budget import read_budget
from rematerialize.plans import Plan
from rematerialize.prepare import prepare_example
from rematerialize.targets.load import load
from rematerialize.trial import planned_forward
from tests.cli import call

CODE = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layers = nn.Sequential(*[
                part for _ in range(3) for part in (nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.1))
            ])
        def forward(self, x):
            print("rematerialize: a model that prints")
            return self.layers(x)

    def make():
        return Net(32), (torch.ones(64, 32).cumsum(0),)

    def wider():
        return Net(48), (torch.ones(64, 48),)

    def lstm():
        return nn.LSTM(16, 16), (torch.randn(40, 8, 16),)

    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
        def forward(self, x):
            torch._assert_async((x > 99).all(), "not in this mood")
            return self.layer(x).relu()

    class Undefined(Moody):
        def forward(self, x):
            return self.layer(x).sub(99).log().sum()

    def undefined():
        return Undefined(), (torch.ones(4, 4),)

    def moody():
        return Moody(), (torch.ones(4, 4),)

    def raises():
        class Broken(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)
            def forward(self, x):
                raise ValueError("no such table")
        return Broken(), (torch.ones(4, 4),)
"""
BUDGET = ("--activation-budget", "80%")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_plans: None) -> Path:
    (tmp_path / "verified_net.py").write_text(textwrap.dedent(CODE), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "verified_net", raising=False)
    return tmp_path


def test_a_good_plan_passes_line_by_line(capfd: pytest.CaptureFixture[str]) -> None:
    said = call(capfd, "verify", "verified_net:make", *BUDGET, "--steps", "3")
    lines = [line.split("  ")[0] for line in said.stdout.splitlines()]
    assert lines[-6:] == ["loss", "gradients", "buffers", "generator", "peak and budget", "peak and prediction"]
    assert said.stdout.count("bit for bit, 3 steps") == 2
    assert "prints" not in said.stdout


def test_a_plan_from_a_file_passes_and_its_figures_are_data(capfd: pytest.CaptureFixture[str]) -> None:
    call(capfd, "plan", "verified_net:make", *BUDGET, "-o", "plan.json")
    found = call(capfd, "verify", "verified_net:make", "--plan", "plan.json", "--json").json()
    assert found["schema"] == "rematerialize.verification/1"
    assert found["passed"] is True
    assert found["planned_peak_bytes"] <= found["budget_bytes"] < found["eager_peak_bytes"]
    assert {finding["verdict"] for finding in found["findings"]} <= {"equal", "kept", "close"}


class Spoiled(nn.Module):
    """A plan's forward that does one thing more than it should."""

    def __init__(self, forward: Callable[..., Any], model: nn.Module, what: str) -> None:
        super().__init__()
        self.wrapped, self.what = forward, what
        self.kept: list[torch.Tensor] = []
        self.norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))

    def forward(self, *args: Any) -> Any:
        if self.what == "generator":
            torch.rand(1)
        outputs = self.wrapped(*args)
        if self.what == "gradients":
            outputs.register_hook(lambda gradient: gradient * 1.001)
        elif self.what == "rounding":
            self.norm.weight.register_hook(lambda gradient: gradient * (1 + 2**-22))
        elif self.what == "loss":
            outputs = outputs + 1
        elif self.what == "buffers":
            self.norm.num_batches_tracked += 1  # type: ignore[operator]
        elif self.what == "peak":
            self.kept.append(torch.empty(2**20))
        return outputs


def spoiled_by(what: str) -> Callable[[nn.Module, Plan, Any], Callable[..., Any]]:
    def forward_of(model: nn.Module, plan: Plan, inputs: Any) -> Callable[..., Any]:
        return Spoiled(planned_forward(model, plan, inputs), model, what)

    return forward_of


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("gradients", "gradients"),
        ("loss", "loss"),
        ("buffers", "buffers"),
        ("generator", "generator"),
        ("peak", "peak and budget"),
    ],
)
def test_a_step_that_is_not_eagers_is_exit_code_4(
    what: str, line: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rematerialize.verify, "planned_forward", spoiled_by(what))
    found = call(capfd, "verify", "verified_net:make", *BUDGET, "--json", code=4).json()
    broken = [finding["what"] for finding in found["findings"] if not finding["passed"]]
    assert line in broken
    assert found["passed"] is False


def test_loss_and_gradients_are_each_told_by_their_own_distance(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    details = {}
    for what in ("gradients", "loss"):
        monkeypatch.setattr(rematerialize.verify, "planned_forward", spoiled_by(what))
        found = call(capfd, "verify", "verified_net:make", *BUDGET, "--json", code=4).json()
        details[what] = {one["what"]: one["detail"] for one in found["findings"]}
    assert details["gradients"]["loss"] == "bit for bit, 1 step"
    assert re.fullmatch(
        r"in 1 of 1 step, up to \d\.\de[+-]\d\d apart \(layers\.[\w.]+\)", details["gradients"]["gradients"]
    )
    assert re.fullmatch(r"in 1 of 1 step, up to \d\.\de[+-]\d\d apart, relative to eager's", details["loss"]["loss"])
    assert details["loss"]["gradients"] == "bit for bit, 1 step"


def test_values_that_differ_can_not_be_excused_as_rounding(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rematerialize.verify, "planned_forward", spoiled_by("gradients"))
    call(capfd, "verify", "verified_net:make", *BUDGET, "--up-to-rounding", code=4)


def test_differences_of_rounding_are_a_mismatch_unless_they_are_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rematerialize.verify, "planned_forward", spoiled_by("rounding"))
    said = call(capfd, "verify", "verified_net:make", *BUDGET, code=4).stdout
    assert "that is rounding: --up-to-rounding accepts it" in said
    said = call(capfd, "verify", "verified_net:make", *BUDGET, "--up-to-rounding").stdout
    assert "2e-06 allowed, of the largest magnitude" in said


@pytest.mark.parametrize("masks_as_bytes", [False, True])
def test_no_way_to_run_a_step_but_a_split_recurrence_is_excused(
    masks_as_bytes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = load("verified_net:make")
    prepared = prepare_example(target.model, target.inputs)
    variant = prepared.masked if masks_as_bytes else prepared
    assert variant is not None
    schedule = variant.planner.store_all()
    peak = schedule.peak_bytes
    plan = Plan(variant.graph, schedule, peak, peak, schedule.time_s, peak, prepared.resident_bytes)
    assert rematerialize.verify.verify(target, plan).passed
    monkeypatch.setattr(rematerialize.verify, "planned_forward", spoiled_by("rounding"))
    found = {one.what: one.verdict for one in rematerialize.verify.verify(target, plan).findings}
    assert found["gradients"] == "DIFFERENT"


def test_a_recurrence_that_runs_split_is_equal_up_to_rounding_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    said = call(capfd, "verify", "verified_net:lstm", "--activation-budget", "40%")
    assert "2e-06 allowed, since this plan's recurrences run split over time" in said.stdout
    assert "equal up to rounding" in said.stdout
    assert "splits a fused recurrence" in " ".join(call(capfd, "verify", "--help").stdout.split())


def test_a_step_that_gives_nan_is_repeated_by_one_that_does_and_noted(capfd: pytest.CaptureFixture[str]) -> None:
    said = call(capfd, "verify", "verified_net:undefined", "--activation-budget", "100%")
    assert "its loss isn't a finite number" in said.stdout


def test_the_target_is_left_as_it_was() -> None:
    target = load("verified_net:make")
    before = {name: value.clone() for name, value in target.model.state_dict().items()}
    state = torch.get_rng_state()
    rematerialize.verify.verify(target, read_budget(None, "70%"))
    assert all(torch.equal(value, before[name]) for name, value in target.model.state_dict().items())
    assert all(parameter.grad is None for parameter in target.model.parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("verified_net:make",), "expected one of --budget and --activation-budget, got none"),
        (("verified_net:make",), "or a plan file by --plan"),
        (("verified_net:make", *BUDGET, "--plan", "plan.json"), "expected a --plan or a budget, got both"),
        (("verified_net:make", "--plan", "plam.json"), "there is no file plam.json; did you mean 'plan.json'?"),
        (("verified_net:make", "--plan", "."), "that is a folder"),
        (("verified_net:make", "--plan", "junk.json"), "junk.json is not a plan"),
        (("verified_net:wider", "--plan", "plan.json"), "this plan belongs to another model"),
        (("zoo:gcn", "--plan", "plan.json"), "this plan belongs to another model"),
        (("zoo:gtp", *BUDGET), "got 'gtp'; did you mean 'gpt'?"),
        (("verified_net:make", *BUDGET, "--device", "NVIDIA H100 80GB"), "verify runs steps"),
        (("verified_net:make", *BUDGET, "--device", "cpuu"), "did you mean 'cpu'?"),
        (("verified_net:make", *BUDGET, "--dtype", "bfloat15"), "did you mean 'bfloat16'?"),
        (("verified_net:make", *BUDGET, "--input", "x=flaot[2,2]"), "did you mean 'float'?"),
        (("verified_net:make", *BUDGET, "--steps", "0"), "--steps"),
        (("verified_net:make", *BUDGET, "--stepps", "2"), "--stepps"),
    ],
)
def test_what_can_not_be_verified_is_one_line(
    args: tuple[str, ...], says: str, capfd: pytest.CaptureFixture[str], here: Path
) -> None:
    (here / "plan.json").write_text(saved_plan(capfd), encoding="utf-8")
    (here / "junk.json").write_text("{}", encoding="utf-8")
    said = call(capfd, "verify", *args, code=2)
    assert says in said.error()
    assert said.stdout == ""


_SAVED: list[str] = []


def saved_plan(capfd: pytest.CaptureFixture[str]) -> str:
    """The text of a plan for the target, made once."""
    if not _SAVED:
        call(capfd, "plan", "verified_net:make", *BUDGET, "-o", "once.json")
        _SAVED.append(Path("once.json").read_text(encoding="utf-8"))
    return _SAVED[0]


def test_what_does_not_fit_is_exit_code_3(capfd: pytest.CaptureFixture[str]) -> None:
    said = call(capfd, "verify", "verified_net:make", "--activation-budget", "1B", code=3)
    assert said.json()["minimum_bytes"] > 1


def test_a_targets_own_exception_is_shown_as_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    said = call(capfd, "verify", "verified_net:raises", *BUDGET, code=5)
    assert "no such table" in said.error()


@pytest.mark.parametrize(
    "command", [("verify", "--activation-budget", "100%"), ("compare",)], ids=["verify", "compare"]
)
def test_a_step_that_raises_in_eager_is_the_targets_own_failure(
    command: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    said = call(capfd, command[0], "verified_net:moody", *command[1:], code=2)
    assert "a step of verified_net:moody raised RuntimeError: not in this mood" in said.error()
    assert "verified_net.py, line" in said.error()


def test_a_whole_budget_is_held_in_its_own_scope_with_what_is_reserved(capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("verify", "verified_net:make", "--budget", "4MiB", "--optimizer", "sgd", "--reserve", "3MiB")
    said = call(capfd, *asked)
    (line,) = [line for line in said.stdout.splitlines() if line.startswith("peak and budget")]
    assert re.search(r"measured, 4\.00 MiB allowed, 3\.\d\d MiB of both resident or reserved$", line)
    found = call(capfd, *asked, "--json").json()
    assert found["budget_bytes"] + found["besides_bytes"] == 4 * 2**20
    assert found["besides_bytes"] > 3 * 2**20
    call(capfd, "verify", "verified_net:make", "--budget", "4MiB", "--reserve", "3.99MiB", code=3)
    said = call(capfd, "verify", "verified_net:make", *BUDGET, "--reserve", "1MiB", code=2)
    assert "--reserve belongs to --budget" in said.error()
    Path("plan.json").write_text("{}", encoding="utf-8")
    said = call(capfd, "verify", "verified_net:make", "--plan", "plan.json", "--reserve", "1MiB", code=2)
    assert "expected a --plan, or --optimizer and --reserve with a --budget" in said.error()
