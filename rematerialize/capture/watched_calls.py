"""Every function of torch that the forward calls, as a trace sees it: split, drawn from generators, or refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rematerialize import torch_private as private
from rematerialize.capture.checks import Checks
from rematerialize.capture.decompose import split_recurrence
from rematerialize.capture.explain import looks_at_values
from rematerialize.capture.kernel_layouts import DRAWS
from rematerialize.capture.refusals import asking_user, formatted, refuse_before, refuse_other_layouts
from rematerialize.errors import CaptureError

# As torch functions see them: the second calls the first, unseen.
_POOLS_OF_ROWS = (torch.max_pool1d, F.max_pool1d)


class watched_calls(TorchFunctionMode):
    """While active, functions of torch are called as a trace can follow them, and those that it can't are refused.

    ``recurrences`` says whether any could run over chunks of time, as they do with ``split``; ``looked`` is what the
    first look at a value raised, which the forward may have caught. ``drew`` is told of every generator that a
    function was given, ``checks`` is of the checks that it made.
    """

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.split = split
        self.recurrences = False
        self.checks = Checks()
        self.looked: Exception | None = None
        self.drew: Callable[[torch.Generator], None] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        refuse_before(func, args, sys._getframe(1).f_code)
        if func in private.FORMATTING and (frame := asking_user()) is not None:
            refusal = formatted()
            text = self.checks.formats(frame, refusal) if func is Tensor.__format__ else None
            if text is None:
                raise refusal
            return text
        in_chunks = None if kwargs else split_recurrence(func, args)
        if in_chunks is not None:
            self.recurrences = True
            if self.split:
                return in_chunks(*args)
        if func is Tensor.random_:
            args, kwargs = _from_zero(args, kwargs or {})
        generator = kwargs.get("generator") if kwargs else None
        draw = DRAWS.get(func) if generator is not None else None
        try:
            result = (draw or func)(*args, **(kwargs or {}))
        except Exception as error:
            if self.looked is None and looks_at_values(func, error):
                self.looked = error
            raise
        if isinstance(generator, torch.Generator) and self.drew is not None:
            self.drew(generator)
        if func in _POOLS_OF_ROWS and not result.requires_grad and result.device.type == "cpu":
            # Without a gradient eager takes a kernel of its own, in rows; a trace never does.
            result = result.contiguous()
        if func is F.one_hot or (func in (torch.rrelu, F.rrelu) and _is_drawn(*args, **(kwargs or {}))):
            result = result.contiguous()  # eager fills fresh memory, a trace has other ops
        refuse_other_layouts(result)
        # Torch's own trace of the draw in place takes no generator.
        return result if draw is None else args[0].copy_(result)


def _is_drawn(
    _: Tensor, lower: float = 0, upper: float = 0, training: bool = False, inplace: Any = False, **__: Any
) -> bool:
    """Whether a randomized leaky ReLU draws its slopes, into a new tensor."""
    return training and inplace is not True


def _from_zero(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """``random_(0, n)`` as ``random_(n)``, which draws alike: torch can't write the code of a trace with the former,
    whose overload has the name of a keyword of Python.
    """
    rest = dict(kwargs)
    bounds = [*args[1:], *(rest.pop(name) for name in ("from", "to") if name in rest)]
    if len(bounds) < 2:
        return args, kwargs
    if bounds[0] != 0 or bounds[1] is None:
        raise CaptureError(
            "the forward calls random_ with a lower bound other than 0, which torch can't trace: draw random_(n) and "
            "add the bound"
        )
    return (args[0], bounds[1]), rest
