"""Measuring in a fresh process: time of both kinds, and a peak that no earlier work has raised."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(slots=True)
class Stopwatch:
    """Seconds by the clock and of CPU, all threads together, since it was made."""

    wall: float
    cpu: float

    @classmethod
    def start(cls) -> Stopwatch:
        return cls(time.perf_counter(), time.process_time())

    def read(self) -> tuple[float, float]:
        """Return (wall, CPU) seconds."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def peak_rss_bytes() -> int:
    """Return the most memory that this process has held.

    Linux carries the parent's peak over into ``ru_maxrss`` of a process that it spawns; VmHWM starts anew.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(module: str, *arguments: str, limit_s: float) -> dict[str, Any]:
    """Return the JSON object that ``python -m module arguments`` prints last, or {"status": "timeout" or "error"}."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"status": "timeout"}
    if done.returncode:
        return {"status": "error"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
