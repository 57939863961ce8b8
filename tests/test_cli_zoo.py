"""``zoo``, ``devices`` and ``doctor``: what is here, said at once and in order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rematerialize.cli.commands.doctor
import rematerialize.doctor
from rematerialize.device_table import DEVICES
from rematerialize.doctor import Check, check_extra, check_torch, examine
from rematerialize.harness import Comparison
from rematerialize.zoo import ENTRIES
from rematerialize.zoo.figures import figures
from rematerialize.zoo.spec import SCALES
from tests.cli import call

ROOT = Path(__file__).resolve().parents[1]


def test_the_zoo_is_listed_whole(capfd: pytest.CaptureFixture[str]) -> None:
    said = call(capfd, "zoo")
    assert all(f"zoo:{name} " in said.stdout for name in ENTRIES)
    assert "tokens=int64[4,64]" in said.stdout
    assert said.stderr == ""


def test_the_zoo_as_data_gives_inputs_that_are_specs(capfd: pytest.CaptureFixture[str]) -> None:
    found = call(capfd, "zoo", "--json", "--scale", "bench").json()
    by_target = {model["target"]: model for model in found["models"]}
    assert by_target["zoo:gpt"]["inputs"] == ["tokens=int64[2,256]", "targets=int64[2,256]"]
    assert by_target["zoo:gpt-8.3b"]["fake_only"]
    assert by_target["zoo:gpt-8.3b"]["parameters"] == 8_317_040_640


def test_a_wrong_scale_names_the_closest(capfd: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'bench'?" in call(capfd, "zoo", "--scale", "bensch", code=2).error()


def test_the_zoos_figures_cover_it() -> None:
    assert figures().keys() == ENTRIES.keys()
    assert all(set(found) == set(SCALES) for found in figures().values())


def test_the_zoos_figures_are_fresh() -> None:
    from benchmarks.zoo import counted

    known = figures()
    for name, spec in ENTRIES.items():
        if spec.group != "models":
            found = counted(name, "test")
            assert (found["parameters"], found["inputs"]) == (
                known[name]["test"].parameters,
                known[name]["test"].inputs,
            )


@pytest.mark.parametrize("args", [["zoo"], ["devices"], ["plan", "zoo:gtp", "--budget", "1GiB"]], ids=" ".join)
def test_tables_and_wrong_names_are_answered_without_loading_torch(args: list[str]) -> None:
    program = (
        "import sys\nfrom rematerialize.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'torch_geometric'} & set(sys.modules)\n"
        "sys.exit(bool(heavy))"
    )
    subprocess.run([sys.executable, "-c", program, *args], cwd=ROOT, check=True, capture_output=True)


def test_the_device_table_is_listed_with_sources(capfd: pytest.CaptureFixture[str]) -> None:
    said = call(capfd, "devices")
    assert all(name in said.stdout for name in DEVICES)
    assert "data sheet" in said.stdout
    found = call(capfd, "devices", "--json").json()["devices"]
    assert [device["name"] for device in found] == list(DEVICES)
    assert found[0]["peak_flops"]["float32"] > 0


def test_what_a_command_prints_goes_to_a_file_that_is_not_overwritten(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "devices.txt"
    printed = call(capfd, "devices").stdout
    said = call(capfd, "devices", "-o", str(path))
    assert (said.stdout, said.stderr) == ("", f"rematerialize: wrote {path}\n")
    assert path.read_text(encoding="utf-8") == printed
    refused = call(capfd, "devices", "--json", "-o", str(path), code=2)
    assert "exists already" in refused.error()
    assert path.read_text(encoding="utf-8") == printed
    call(capfd, "devices", "--json", "-q", "-o", str(path), "--force")
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == "rematerialize.devices/1"


def test_every_command_is_summed_up_in_a_whole_sentence_and_writes_to_a_file(
    capfd: pytest.CaptureFixture[str],
) -> None:
    commands = call(capfd, "--help").stdout.partition("Commands:")[2]
    assert "..." not in commands
    for line in commands.splitlines():
        if name := line[:12].strip():
            options = call(capfd, name, "--help").stdout
            assert "-o, --output" in options, name
            assert "--force" in options, name


def test_the_doctor_finds_this_environment_fit(capfd: pytest.CaptureFixture[str]) -> None:
    found = call(capfd, "doctor", "--json").json()
    assert found["fit"]
    by_name = {check["name"]: check for check in found["checks"]}
    assert by_name["torch"]["found"].startswith(torch.__version__)
    assert "bit for bit" in by_name["self-test"]["found"]
    assert {"python", "compiled kernel", "devices", "cost cache", "extra models"} <= by_name.keys()


def test_a_step_that_is_not_eagers_is_exit_code_1(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Comparison, "exact", property(lambda self: False))
    said = call(capfd, "doctor", code=1)
    assert "self-test" in said.stdout
    assert "broken" in said.stdout


def test_without_torch_the_doctor_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    checks = {check.name: check for check in examine()}
    assert checks["torch"].state == "broken"
    assert "pip install torch" in checks["torch"].found
    assert "self-test" not in checks


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.10.1", "broken"), ("2.11.0", "ok"), ("2.13.0+cpu", "ok"), ("2.14.0.dev20260101", "note"), ("3.0.0", "note")],
)
def test_a_torch_outside_the_tested_range_is_noted(version: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert check_torch().state == state


def test_an_extra_names_what_is_missing() -> None:
    found = check_extra("models", ["torch", "no-such-package"])
    assert found.state == "note"
    assert "without no-such-package; pip install rematerialize[models]" in found.found


def test_what_a_check_raises_is_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Check:
        raise OSError("disk on fire")

    monkeypatch.setattr(rematerialize.doctor, "check_step", failing)
    assert list(examine())[-1] == Check("self-test", "broken", "OSError: disk on fire")


def test_a_stale_kernel_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rematerialize.solve.native.available", False)
    assert rematerialize.cli.commands.doctor.kernel().state == "note"
