"""What a run records, as frozen data that goes to JSON and back, and the reasons of refusals by group."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.provenance import Provenance

FORMAT = "rematerialize.conformance/1"
Status = Literal["pass", "refused", "failed", "skipped"]

# The first that is found in a refusal's message names its group; "other" is a gap in this list.
REASONS: tuple[tuple[str, str], ...] = (
    (r"depends on the values of its tensors", "a shape or a branch depends on values"),
    (r"data is not allocated yet", "a shape or a branch depends on values"),
    (r"sparse tensor", "a sparse tensor"),
    (r"no output of the forward requires grad", "no output requires grad"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one case; `detail` is the message or what differs."""

    name: str
    index: int
    dtype: str
    status: Status
    reason: str = ""
    detail: str = ""

    @property
    def group(self) -> str:
        """The reason, refusals by what their message says."""
        if self.status != "refused":
            return self.reason
        return next((label for pattern, label in REASONS if re.search(pattern, self.detail)), "other")


@dataclass(frozen=True, slots=True)
class Record:
    """A run over the suites, and everything that is needed to repeat it."""

    provenance: Provenance
    seconds: float
    suites: dict[str, tuple[Verdict, ...]]

    def save(self, path: Path) -> None:
        """Write counts by group, and every case that didn't pass; passes by name only, to keep the file readable."""
        suites = {suite: _told(verdicts) for suite, verdicts in self.suites.items()}
        data = {
            "format": FORMAT,
            **dataclasses.asdict(self.provenance),
            "seconds": round(self.seconds, 1),
            "suites": suites,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _told(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    passed = Counter(verdict.name for verdict in verdicts if verdict.status == "pass")
    return {
        "counts": counts(verdicts),
        "groups": [dict(zip(("status", "reason", "cases", "names"), row, strict=True)) for row in groups(verdicts)],
        "passed": dict(passed),
        "others": [
            {**dataclasses.asdict(verdict), "group": verdict.group} for verdict in verdicts if verdict.status != "pass"
        ],
    }


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Return the number of cases by status."""
    found = Counter(verdict.status for verdict in verdicts)
    return {status: found[status] for status in ("pass", "refused", "failed", "skipped")}


def groups(verdicts: Sequence[Verdict]) -> list[tuple[str, str, int, list[str]]]:
    """Return (status, reason, number of cases, names) of all that didn't pass: failures first, then by number."""
    found: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        if verdict.status != "pass":
            found.setdefault((verdict.status, verdict.group), []).append(verdict.name)
    order = {"failed": 0, "refused": 1, "skipped": 2}
    rows = [(status, reason, len(names), sorted(set(names))) for (status, reason), names in found.items()]
    return sorted(rows, key=lambda row: (order[row[0]], -row[2], row[1]))
