"""What a forward checks of values (``torch._check_tensor_all``, ``torch._assert_async``): kept, once in every step.

The message of a check may format tensors (transformers counts image tokens in most of its vision-language models):
``check(condition, f"{count} tokens")``. A trace has no values, and no use for the message either. Such a text gets a
word in the place of the value, as long as nothing but a check can read it: it is written as an argument of a call, and
that call reaches a check.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import itertools
import linecache
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

from rematerialize import torch_private as private
from rematerialize.errors import CaptureError

_UNKNOWN = "(a tensor)"
_DEFAULT = "Expected cond to be True, but got False"


_End: TypeAlias = tuple[int | None, int | None]
"""A line and a column in a source file."""


class Checks:
    """The checks that a trace comes across, and the texts that were formatted for one that is still to come."""

    def __init__(self) -> None:
        self._awaited: list[tuple[types.FrameType, _End, CaptureError]] = []
        self._telling = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Record checks of traced tensors as ops, and refuse at the end what was formatted for none."""
        plain: Any = torch._check_with
        of_tensor: Any = torch._check_tensor_all_with

        def check(error: Any, condition: Any, message: Any = None) -> None:
            self._reached()
            plain(error, condition, message)

        def check_all(error: Any, condition: Any, message: Any = None) -> None:
            self._reached()
            if type(condition) not in private.TRACED_KINDS or condition.dtype is not torch.bool:
                of_tensor(error, condition, message)
                return
            torch._assert_async(condition.all(), f"{error.__name__}: {self._text(message)}")

        torch._check_with, torch._check_tensor_all_with = check, check_all  # type: ignore[assignment]
        try:
            yield
            for _, _, refusal in self._awaited:
                raise refusal
        finally:
            torch._check_with, torch._check_tensor_all_with = plain, of_tensor
            self._awaited.clear()

    def formats(self, frame: types.FrameType, refusal: CaptureError) -> str | None:
        """Return what stands for a tensor that a frame formats; None where more than a check may read the text.

        ``refusal`` is raised at the end, should no check come.
        """
        if self._telling:
            return _UNKNOWN
        in_text = dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("FORMAT_")
        call = _call_around(frame.f_code.co_filename, frame.f_lineno) if in_text else None
        if call is None:
            return None
        self._awaited.append((frame, call, refusal))
        return _UNKNOWN

    def _reached(self) -> None:
        calling = []
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            calling.append(frame)
            frame = frame.f_back
        self._awaited = [
            each for each in self._awaited if each[0] not in calling or _end_of_running(each[0]) != each[1]
        ]

    def _text(self, message: Callable[[], Any] | None) -> str:
        if message is None:
            return _DEFAULT
        before, self._telling = self._telling, True
        try:
            return str(message())
        finally:
            self._telling = before


@functools.lru_cache(maxsize=32)
def _texts(source: str) -> list[tuple[ast.JoinedStr, _End | None]]:
    """The f-strings of a file, with the end of the call that each is an argument of."""
    nodes = list(ast.walk(ast.parse(source)))
    specifications = {node.format_spec for node in nodes if isinstance(node, ast.FormattedValue)}
    calls = {
        argument: (call.end_lineno, call.end_col_offset)
        for call in nodes
        if isinstance(call, ast.Call)
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
    }
    return [(n, calls.get(n)) for n in nodes if isinstance(n, ast.JoinedStr) and n not in specifications]


def _call_around(filename: str, line: int) -> _End | None:
    """Where the call ends whose argument the f-string in a line is; None if it isn't one, or of several."""
    try:
        texts = _texts("".join(linecache.getlines(filename)))
    except SyntaxError:
        return None
    near = [end for node, end in texts if node.lineno <= line <= (node.end_lineno or node.lineno)]
    return near[0] if len(near) == 1 else None


def _end_of_running(frame: types.FrameType) -> _End:
    """Where the expression ends that a frame is at."""
    _, end_line, _, end_column = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    return end_line, end_column
