"""Where figures come from: the commit, the machine and the versions that a record names."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Provenance:
    """Everything that is needed to repeat a run, besides the machine."""

    command: str
    commit: str
    date: str
    device: str
    versions: dict[str, str]
    seed: int

    def same_code(self, other: Provenance) -> bool:
        """Whether figures of both may stand in one record."""
        return (self.commit, self.device, self.versions, self.seed) == (
            other.commit,
            other.device,
            other.versions,
            other.seed,
        )

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"`{self.command}` on {self.device}; {versions}; commit {self.commit}, {self.date}, seed {self.seed}."


def provenance(module: str, arguments: Sequence[str], packages: Sequence[str], seed: int = 0) -> Provenance:
    """Describe a run of ``python -m module arguments`` now; paths are told by their last part."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    told = [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]
    return Provenance(shlex.join(["python", "-m", module, *told]), commit(), today(), device(), versions, seed)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def commit() -> str:
    """The commit of the code, "+changes" if it isn't exactly that; results don't count."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../rematerialize", ".", ":(exclude)results")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")


def device() -> str:
    """The model name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
