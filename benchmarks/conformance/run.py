"""Running names through a worker process that may hang or crash: the case at fault is recorded, the rest goes on."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.conformance.cases import SAMPLES
from benchmarks.conformance.records import Verdict

ROOT = Path(__file__).resolve().parents[2]
CASE_LIMIT_S = 60.0
START_LIMIT_S = 120.0


class _Silent(Exception):
    """The worker hung or died; the message says which."""


class _Worker:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.conformance.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.pending = b""

    def ask(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead worker tells on reading
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self, limit_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.pending:
                if not selector.select(limit_s):
                    raise _Silent(f"no answer after {limit_s:.0f} s")
                read = os.read(self.process.stdout.fileno(), 1 << 16)
                if not read:
                    raise _Silent(f"the process ended with {self.process.wait()}")
                self.pending += read
        line, self.pending = self.pending.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def run(suite: str, names: Sequence[str], samples: int = SAMPLES) -> Iterator[Verdict]:
    """Return the verdicts of all cases of some names, as they come."""
    worker = _Worker()
    fresh = True
    try:
        for name in names:
            skip = 0
            while True:
                started, dtype = -1, ""
                worker.ask({"suite": suite, "name": name, "skip": skip, "samples": samples})
                try:
                    while "done" not in (answer := worker.answer(START_LIMIT_S if fresh else CASE_LIMIT_S)):
                        fresh = False
                        if "started" in answer:
                            started, dtype = answer["started"], answer["dtype"]
                        elif "broken" in answer:
                            yield Verdict(name, started + 1, "", "skipped", "torch makes no sample", answer["broken"])
                        else:
                            yield Verdict(**answer["verdict"])
                    break
                except _Silent as silent:
                    yield Verdict(name, max(started, 0), dtype, "failed", "the process hangs or dies", str(silent))
                    worker.close()
                    worker, fresh = _Worker(), True
                    if started < 0:
                        break
                    skip = started + 1
    finally:
        worker.close()
