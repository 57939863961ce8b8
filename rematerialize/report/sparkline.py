"""Memory over a step as one line of text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#%@"


def sparkline(values: Sequence[int], width: int = 60, *, top: int | None = None, unicode: bool = True) -> str:
    """Return at most ``width`` characters; each is the largest value of its share of the sequence.

    Parameters
    ----------
    values : sequence of int
        Not negative.
    width : int
    top : int, optional
        The value of a full block; the largest by default.
    unicode : bool
        Eight-step blocks, or plain ASCII.

    Examples
    --------
    >>> sparkline([0, 1, 2, 4, 8, 4, 2, 1], 8, unicode=False)
    ' :-+@+-:'
    """
    marks = _BLOCKS if unicode else _ASCII
    count = min(width, len(values))
    if not count:
        return ""
    full = top if top is not None else max(values)
    edges = [len(values) * at // count for at in range(count + 1)]
    heights = [max(values[low:high]) for low, high in itertools.pairwise(edges)]
    last = len(marks) - 1
    return "".join(marks[min(last, -(-height * last // full)) if full else 0] for height in heights)
