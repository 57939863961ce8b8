"""A process that judges cases: names come in by stdin, verdicts go out, so that a crash costs one case only."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import warnings
from typing import Any

import torch

from benchmarks.conformance.cases import cases, names
from benchmarks.conformance.judge import judge
from benchmarks.conformance.layouts import judge_layouts


def main() -> None:
    """Answer requests until stdin ends.

    A request is {"suite", "name", "skip", "samples"}; answers are {"started": index} and a verdict per case, then
    {"done": true}. Answers have the process's stdout for themselves: torch prints, too.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # sums that threads split have an order of their own

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    for line in sys.stdin:
        request = json.loads(line)
        verdict_of = judge_layouts if request["suite"] == "layouts" else judge
        names(request["suite"])
        gc.freeze()  # a capture looks at all objects, and torch's databases are many
        try:
            for case in cases(request["suite"], request["name"], request["samples"]):
                if case.index < request["skip"]:
                    continue
                say({"started": case.index, "dtype": case.dtype})
                say({"verdict": dataclasses.asdict(verdict_of(case))})
        except Exception as error:
            say({"broken": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
        say({"done": True})


if __name__ == "__main__":
    main()
