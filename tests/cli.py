"""The command line called in this process: what it prints and the code that it exits with."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rematerialize.cli import main

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        found = json.loads(self.stdout)
        assert isinstance(found, dict)
        return found

    def error(self) -> str:
        """The one line that says what was wrong; all others on stderr are progress."""
        *before, last = self.stderr.strip().splitlines()
        assert all(line.startswith("rematerialize: ") for line in before), self.stderr
        assert last.startswith("rematerialize: error: "), self.stderr
        assert "Traceback" not in self.stderr
        return last.removeprefix("rematerialize: error: ")


def call(capfd: pytest.CaptureFixture[str], *args: str, code: int | None = 0) -> Said:
    """Run a command and check its exit code."""
    capfd.readouterr()
    level = logging.getLogger().level
    try:
        with pytest.raises(SystemExit) as left:
            main(args)
    finally:
        logging.getLogger().setLevel(level)
    out, err = capfd.readouterr()
    found = left.value.code
    assert isinstance(found, int)
    assert code is None or found == code, err
    return Said(found, out, err)


def on_terminal(
    *args: str,
    columns: int = 100,
    no_color: bool = False,
    program: Sequence[str] = ("-m", "rematerialize"),
    cwd: Path | None = None,
) -> tuple[int, str]:
    """Run a command in a process of its own whose stdout and stderr are a terminal: its exit code and what it shows."""
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    env |= {"TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONPATH": str(ROOT)}
    env |= {"NO_COLOR": "1"} if no_color else {}
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, *program, *args], cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, env=env
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return running.wait(), shown.decode().replace("\r\n", "\n")
