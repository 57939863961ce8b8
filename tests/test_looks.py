"""Python that asks something of the inputs: answered as in eager, one plan for each answer."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rematerialize import plan, plans_of, unwrap, wrap
from rematerialize.errors import CaptureError, PlanMismatchError
from tests.twins import assert_same_step, step_of, twins

pytestmark = pytest.mark.usefixtures("quick_plans")


class Masked(nn.Module):
    """Two ways for a batch: with padding and without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(16, 16), nn.Linear(16, 16), nn.Dropout(0.2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.drop(self.first(x).tanh())
        if (mask != 0).all():
            return self.second(h).square().mean()
        h = h.masked_fill((mask == 0)[..., None], 0)
        return (self.second(h).relu() * mask[..., None]).sum() / mask.sum()


def padded() -> Tensor:
    return torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def whole() -> Tensor:
    return torch.ones(2, 4, dtype=torch.int64)


def test_both_answers_of_a_condition_on_inputs_are_eagers(caplog: pytest.LogCaptureFixture) -> None:
    eager, ours = twins(Masked)
    x = torch.randn(2, 4, 16)
    wrap(ours, activation_budget="100%")
    with caplog.at_level(logging.WARNING):
        for mask in (whole(), padded(), whole(), padded(), padded(), whole()):
            assert_same_step(step_of(eager, x, mask), step_of(ours, x, mask))
    assert len(plans_of(ours)) == 2
    assert not [record for record in caplog.records if record.name == "rematerialize"]


def test_no_more_plans_are_kept_than_asked_for() -> None:
    eager, made = twins(Masked)
    ours = wrap(made, activation_budget="100%", max_plans=1)
    x = torch.randn(2, 4, 16)
    for mask in (whole(), padded(), whole()):
        assert_same_step(step_of(eager, x, mask), step_of(ours, x, mask))
        assert len(plans_of(ours)) == 1


def test_a_plan_for_one_answer_is_not_taken_for_the_other() -> None:
    eager, ours = twins(Masked)
    x = torch.randn(2, 4, 16)
    for_whole = plan(ours, (x, whole()), activation_budget="100%")
    wrap(ours, plan=for_whole)
    assert_same_step(step_of(eager, x, whole()), step_of(ours, x, whole()))
    with pytest.raises(PlanMismatchError):
        ours(x, padded())
    unwrap(ours)
    wrap(ours, activation_budget="100%", example_inputs=(x, whole()))
    assert_same_step(step_of(eager, x, padded()), step_of(ours, x, padded()))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if (x > 0).any():
            h = h * 2
            if (x == 5).any() or bool((x.sum() > 100).item()):
                h = h.tanh()
        elif torch.equal(x, torch.zeros_like(x)):
            h = h.exp()
        return h.square().mean()


def test_conditions_within_conditions() -> None:
    eager, ours = twins(Nested)
    wrap(ours, activation_budget="100%")
    x = torch.rand(4, 8)
    for given in (x, -x, 0 * x, 100 * x, x, torch.where(x > 0.9, 5, x), -x, 0 * x):
        assert_same_step(step_of(eager, given), step_of(ours, given))
    assert len(plans_of(ours)) == 5


REFUSED: dict[str, Callable[[Tensor, Tensor, nn.Module], Tensor]] = {
    "a number": lambda x, m, layer: layer(x) * m.sum().item(),
    "a computed value": lambda x, m, layer: layer(x) * (2 if (layer(x) > m).all() else 3),
    "a parameter": lambda x, m, layer: layer(x) * (2 if (layer.weight > 0).all() else 3),
    "a draw": lambda x, m, layer: layer(x) * (2 if (torch.rand_like(m) > m).all() else 3),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_questions_are_refused(what: str) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, m: Tensor) -> Tensor:
            return REFUSED[what](x, m, self.layer).square().mean()

    ours = wrap(Asking(), activation_budget="100%")
    with pytest.raises(CaptureError, match="depends on the values of its tensors"):
        ours(torch.randn(4, 8), torch.rand(4, 8))


def test_an_input_that_requires_grad_is_not_asked() -> None:
    ours = wrap(Nested(), activation_budget="100%")
    with pytest.raises(CaptureError, match="depends on the values of its tensors"):
        ours(torch.rand(4, 8, requires_grad=True))


def test_an_input_is_asked_for_what_was_written_to_it() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, m: Tensor) -> Tensor:
            h = self.layer(x) * (2 if (m.mul_(2) > 1).all() else 3)
            m[0] = 7
            return (h * (2 if (m > 5).any() else 3)).square().mean()

    eager, ours = twins(Writing)
    wrap(ours, activation_budget="100%")
    for factor in (1.0, 0.1, 1.0):
        given = [torch.full((4, 8), factor) for _ in range(2)]
        x = torch.randn(4, 8)
        assert_same_step(step_of(eager, x, given[0]), step_of(ours, x, given[1]))
        assert torch.equal(given[0], given[1])
    assert len(plans_of(ours)) == 2
