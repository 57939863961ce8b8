"""Completion: what a shell is offered, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rematerialize.device_table import DEVICES
from rematerialize.solve import solvers
from rematerialize.zoo import ENTRIES
from tests.cli import ROOT

CODE = "import torch\ndef make(): ...\ndef build(width=3): ...\ndef needs(width): ...\ndef _own(): ...\n"


def offered(folder: Path, *words: str, shell: str = "bash") -> list[str]:
    """What the shell is told behind some words, the last of which is being typed."""
    program = (
        "import sys\nfrom rematerialize.cli import main\n"
        "try:\n    main([])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    asked = {"_REMATERIALIZE_COMPLETE": f"complete_{shell}", "PYTHONPATH": str(ROOT)}
    asked |= {
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": " ".join(words),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stdout.splitlines() if line]


def test_bash_that_splits_at_colons_is_offered_what_stands_behind_them(tmp_path: Path) -> None:
    assert offered(tmp_path, "rematerialize", "plan", "zoo", ":") == list(ENTRIES)
    gpts = [name for name in ENTRIES if name.startswith("gpt")]
    assert offered(tmp_path, "rematerialize", "plan", "zoo", ":", "gpt") == gpts
    assert offered(tmp_path, "rematerialize", "plan", "zo") == [f"zoo:{name}" for name in ENTRIES]
    after = offered(tmp_path, "rematerialize", "plan", "zoo", ":", "gpt", "--dtype", "bf")
    assert after == ["bfloat16"]


def test_a_files_factories_are_read_from_its_text(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def (", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.py").write_text(CODE, encoding="utf-8")
    assert offered(tmp_path, "rematerialize", "profile", "mod") == ["models.py:make", "models.py:build"]
    assert offered(tmp_path, "rematerialize", "profile", "models.py", ":", "b") == ["build"]
    assert offered(tmp_path, "rematerialize", "profile", "sub/m") == ["sub/more.py:make", "sub/more.py:build"]
    assert offered(tmp_path, "rematerialize", "profile", "nowhere/m") == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("plan", "x", "--device", ""), ["cpu", "cuda", *(name.replace(" ", "\\ ") for name in DEVICES)]),
        (("plan", "x", "--optimizer", "adamw"), ["adamw"]),
        (("export", "plan.json", "--format", "p"), ["perfetto", "png"]),
        (("solve", "graph.json", "--solver", ""), ["auto", *solvers()]),
        (("zoo", "--scale", ""), ["test", "bench"]),
    ],
)
def test_values_that_are_known_are_offered(words: tuple[str, ...], says: list[str], tmp_path: Path) -> None:
    assert offered(tmp_path, "rematerialize", *words) == says


def test_another_shell_gets_whole_words(tmp_path: Path) -> None:
    said = "".join(offered(tmp_path, "rematerialize", "plan", "zoo:gcn", "--device", "NVIDIA\\ H2", shell="zsh"))
    assert '"NVIDIA H200 141GB"' in said
