"""The command line called in this process: what it prints and the code that it exits with."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import pytest

from rematerialize.cli import main


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
