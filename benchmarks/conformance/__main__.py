"""The command: run suites or names, print what didn't pass by reason, and write the record of a full run."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.conformance.cases import SAMPLES, SUITES, names
from benchmarks.conformance.records import Record, Verdict, counts, groups
from benchmarks.conformance.run import run
from benchmarks.provenance import provenance
from rematerialize.report.table import aligned_table

RESULT = Path(__file__).resolve().parents[1] / "results" / "conformance.json"


def main(arguments: Sequence[str]) -> int:
    """Return 1 when a result is wrong or an error isn't ours."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance", description=__doc__)
    parser.add_argument("suite", nargs="?", choices=SUITES)
    parser.add_argument("names", nargs="*", help="modules or operators; all of them unless given")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="per operator")
    parser.add_argument("--json", type=Path, help="where to write; unless given, only a full run writes")
    options = parser.parse_args(arguments)
    progress = Console(stderr=True)
    # Now, not at the end: the worker holds the code of this moment, whatever is committed while it runs.
    begun, start = provenance("benchmarks.conformance", arguments, ("torch", "numpy")), time.perf_counter()
    found: dict[str, tuple[Verdict, ...]] = {}
    for suite in (options.suite,) if options.suite else SUITES:
        wanted = options.names or names(suite)
        unknown = set(wanted) - set(names(suite))
        if unknown:
            parser.error(f"torch has no {suite} case for {', '.join(sorted(unknown))}")
        verdicts = []
        for verdict in run(suite, wanted, options.samples):
            verdicts.append(verdict)
            if verdict.status == "failed":
                progress.print(
                    f"{verdict.name} {verdict.index}: {verdict.reason}: {verdict.detail}", markup=False, highlight=False
                )
        found[suite] = tuple(verdicts)
        print(table(suite, verdicts))
    record = Record(begun, time.perf_counter() - start, found)
    path = options.json or (None if options.suite else RESULT)
    if path:
        record.save(path)
    return int(any(verdict.status == "failed" for verdicts in found.values() for verdict in verdicts))


def table(suite: str, verdicts: Sequence[Verdict]) -> str:
    """Return the counts and a row per reason."""
    head = ", ".join(f"{number} {status}" for status, number in counts(verdicts).items())
    rows = [(status, reason, str(number), _some(names)) for status, reason, number, names in groups(verdicts)]
    body = aligned_table(("", "reason", "cases", "for example"), rows) if rows else ""
    return f"{suite}: {len(verdicts)} cases, {head}\n{body}\n"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown}, and {len(names) - 4} more" if len(names) > 4 else shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
