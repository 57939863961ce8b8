"""Run the cases in turn: ``python -m benchmarks.captures [NAME...]``. A run over all writes the record and the page.

Named cases take their old place in the record if it was made by the same code, and are only told otherwise;
``--render`` makes the page from the record.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.captures import CASES, ZOO
from benchmarks.captures.check import check
from benchmarks.captures.records import PAGE, RECORD, Captures, Result, page
from benchmarks.provenance import provenance

_PACKAGES = ("torch", "transformers", "diffusers", "torch-geometric", "peft")


def main(arguments: list[str]) -> int:
    if arguments == ["--render"]:
        PAGE.write_text(page(Captures.load()), encoding="utf-8")
        return 0
    cases = {case.name: case for case in (*CASES, *ZOO)}
    unknown = [name for name in arguments if name not in cases]
    if unknown:
        print(f"no such case: {', '.join(unknown)}; there are {', '.join(cases)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # sums that threads split have an order of their own
    origin = provenance("benchmarks.captures", arguments, _PACKAGES)
    results = []
    for name in arguments or cases:
        if cases[name].missing():
            print(f"{name}: {cases[name].missing()} isn't installed (extra: models)", file=sys.stderr)
            return 2
        results.append(check(cases[name]))
        print(_line(results[-1]), flush=True)
    known = Captures.load() if arguments and RECORD.exists() else Captures(origin, ())
    if known.provenance.same_code(origin):
        rows = {result.name: result for result in (*known.results, *results)}
        ordered = tuple(rows[name] for name in cases if name in rows)
        Captures(known.provenance, ordered).save()
        PAGE.write_text(page(Captures.load()), encoding="utf-8")
    return any(result.status == "incorrect" for result in results)


def _line(result: Result) -> str:
    share = "" if result.minimum_share is None else f"{result.minimum_share:.0%} of {result.ops} ops "
    return f"{result.name:32} {result.status:10} {share}{result.message}".rstrip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
