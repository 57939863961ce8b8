"""The README says what is: its code runs, its output is real, its files exist, its figures are generated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
BLOCKS = [(match[1], match[2]) for match in FENCE.finditer(README)]


def shape(output: str) -> list[str]:
    """Mask quantities, which differ between machines, and the padding that follows from them."""
    masked = re.sub(r"-?\d[\d.]*( ?(B|KiB|MiB|GiB|us|ms|s|%)(?![a-z]))?", "#", output)
    return [re.sub(r"[ -]{2,}", " ", line).strip() for line in masked.strip().splitlines()]


def run(command: list[str], cwd: Path, stdin: str = "") -> str:
    """Return what the command prints on stdout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=cwd, env=env, input=stdin, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_blocks_run_in_order_and_print_what_is_shown(tmp_path: Path) -> None:
    code = "\n".join(text for language, text in BLOCKS if language == "python")
    shown = "\n".join(text for language, text in BLOCKS if language == "text")
    assert code
    assert shown
    assert shape(run([sys.executable, "-"], tmp_path, code)) == shape(shown)


def test_the_console_blocks_run_in_order_and_print_what_is_shown(tmp_path: Path) -> None:
    console = [text for language, text in BLOCKS if language == "console"]
    assert console
    for text in console:
        commands = [part.partition("\n") for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]
        for command, _, shown in commands:
            runnable = re.sub(r"^rematerialize ", f"{sys.executable} -m rematerialize ", command)
            assert shape(run(["bash", "-c", runnable], tmp_path)) == shape(shown), command


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    text = FENCE.sub("", text)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    names = re.findall(r"`([\w./]+\.(?:py|md|toml|txt)|[\w./]+/)`", text)
    places = (ROOT, ROOT / "rematerialize", (ROOT / page).parent)
    missing = [name for name in links + names if not any((place / name).exists() for place in places)]
    assert not missing


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_that_a_page_names_exists(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"\bmake (\w+)", (ROOT / page).read_text(encoding="utf-8")))
    assert {name for name in named if name not in targets} <= {"sure"}


def test_the_generated_parts_are_fresh() -> None:
    run([sys.executable, "-m", "benchmarks.readme", "--check"], ROOT)
