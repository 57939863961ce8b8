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
import linecache
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rematerialize import torch_private as private
from rematerialize.errors import CaptureError

_UNKNOWN = "(a tensor)"
_DEFAULT = "Expected cond to be True, but got False"


class Checks:
    """The checks that a trace comes across, and the texts that were formatted for one that is still to come."""

    def __init__(self) -> None:
        self._awaited: list[tuple[types.FrameType, range, CaptureError]] = []
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
        lines = _calling_lines(frame.f_code.co_filename, frame.f_lineno) if in_text else None
        if lines is None:
            return None
        self._awaited.append((frame, lines, refusal))
        return _UNKNOWN

    def _reached(self) -> None:
        calling = []
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            calling.append(frame)
            frame = frame.f_back
        self._awaited = [each for each in self._awaited if each[0] not in calling or each[0].f_lineno not in each[1]]

    def _text(self, message: Callable[[], Any] | None) -> str:
        if message is None:
            return _DEFAULT
        before, self._telling = self._telling, True
        try:
            return str(message())
        finally:
            self._telling = before


@functools.lru_cache(maxsize=32)
def _parsed(source: str) -> list[tuple[ast.JoinedStr, range | None]]:
    """The f-strings of a file, and the lines of the call that each is an argument of."""
    tree = ast.parse(source)
    called = {
        argument: range(call.lineno, (call.end_lineno or call.lineno) + 1)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
    }
    specifications = {node.format_spec for node in ast.walk(tree) if isinstance(node, ast.FormattedValue)}
    return [
        (node, called.get(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) and node not in specifications
    ]


def _calling_lines(filename: str, line: int) -> range | None:
    """Lines of the call whose argument the f-string in a line is; None if it isn't one, or other f-strings are near."""
    try:
        strings = _parsed("".join(linecache.getlines(filename)))
    except SyntaxError:
        return None
    near = [lines for node, lines in strings if node.lineno <= line <= (node.end_lineno or node.lineno)]
    return near[0] if len(near) == 1 else None
