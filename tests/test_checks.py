"""What a forward checks of values is checked in every step, and its message may format tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rematerialize import wrap
from rematerialize.errors import CaptureError
from tests.twins import assert_same_step, at_minimum, step_of, twins

pytestmark = pytest.mark.usefixtures("quick_plans")


def check(condition: Any, text: str) -> None:
    """As libraries have it: a message that is there already."""
    torch._check_tensor_all_with(ValueError, condition, lambda: text)


def by_lines(n: Tensor) -> None:
    check(
        n == 3,
        f"{n} of them, not {n + 1:>{4}}",
    )


CHECKS: dict[str, Callable[[Tensor], None]] = {
    "assert": lambda n: torch._assert_async(n == 3, "three of them"),
    "text": lambda n: check(n == 3, f"{n} of them"),
    "lines": by_lines,
    "function": lambda n: torch._check_tensor_all(n == 3, lambda: f"{n} of them"),
    "no text": lambda n: torch._check_tensor_all(n == 3),
}


class Checked(nn.Module):
    def __init__(self, look: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.look = look
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        self.look((x > 0).sum())
        return self.second(h).square().mean()


def three(count: int = 3) -> Tensor:
    x = -torch.rand(4, 8)
    x[0, :count] = 1
    return x


@pytest.mark.parametrize("kind", CHECKS)
def test_a_check_is_made_in_every_step(kind: str) -> None:
    eager, ours = twins(lambda: Checked(CHECKS[kind]))
    at_minimum(ours, three())
    for _ in range(2):
        x = three()
        assert_same_step(step_of(eager, x), step_of(ours, x))
        for model in (eager, ours):
            with pytest.raises(
                (RuntimeError, ValueError), match=r"three of them|\d of them|\(a tensor\)|Expected cond"
            ):
                model(three(4))


def kept_text(n: Tensor) -> None:
    text = f"{n}"
    check(n == 3, text)


READ: dict[str, Callable[[Tensor], object]] = {
    "printed": lambda n: print(f"{n}"),
    "kept": kept_text,
    "asked": lambda n: check((n == 3) & ("3" in f"{n}"), f"{n}"),
    "read by the condition's function": lambda n: check((n == 3) & ("3" in format(n)), f"{n}"),
    "no check": lambda n: str.upper(f"{n}"),
    "another check": lambda n: str.upper(f"{n}") and check(n == 3, ""),
}


@pytest.mark.parametrize("how", READ)
def test_a_text_that_more_than_a_check_may_read_is_refused(how: str) -> None:
    model = wrap(Checked(READ[how]), activation_budget="100%")
    with pytest.raises(CaptureError, match="the forward formats a tensor at test_checks"):
        model(three())
