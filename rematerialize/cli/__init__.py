"""The command line: data on stdout, progress on stderr, one-line errors, distinct exit codes.

Exit codes: 0 done, 1 our own bug, 2 usage or a bad file, 3 nothing fits the budget (JSON on stdout, where that isn't a
terminal, gives ``minimum_bytes``), 4 a verified step is not eager's, 5 the model's step can't be captured, 130
interrupted, 141 the reader went away.

One file per group of commands; none imports torch, and what needs torch is imported by a command only once its
arguments are known to be good.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    try:  # an interrupt may come while the imports of the application run
        from rematerialize.cli.app import run

        code = run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("rematerialize: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
