"""What a call takes besides its kernels: tried without touching what belongs to the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rematerialize import call_cost
from rematerialize.call_cost import call_seconds
from rematerialize.prepare import bind_inputs, prepare_example


class Returning(nn.Module):
    """A layer, and what a function makes of its result."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.make = make
        self.width = 8

    def forward(self, x: Tensor) -> Any:
        self.width = x.shape[1]
        return self.make(x, self.norm(self.layer(x)))


def cost_of(model: nn.Module, x: Tensor) -> float:
    prepared = prepare_example(model, (x,))
    return call_seconds(prepared, model, bind_inputs(model.forward, (x,)))


MAKES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a value": lambda x, h: h.relu(),
    "a dict": lambda x, h: {"loss": h.sum(), "logits": h, "count": 3},
    "a view alone": lambda x, h: h.relu().t(),
    "views of one value": lambda x, h: h.relu().chunk(2, dim=1),
    "the input, too": lambda x, h: (x, h.tanh()),
    "an index, too": lambda x, h: (h.tanh(), h.argmax(1)),
    "complex values": lambda x, h: torch.complex(h, h).conj(),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_call_is_tried_whatever_it_returns(make: Callable[[Tensor, Tensor], Any]) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    assert cost_of(Returning(make), x) > 0
    assert x.grad is None


def test_nothing_of_the_user_is_changed() -> None:
    model = Returning(lambda x, h: h)
    heard: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_hook(heard.append)
        parameter.register_post_accumulate_grad_hook(heard.append)
    kept = torch.ones(8, 8)
    model.layer.weight.grad = kept
    x = torch.randn(4, 8)
    prepared = prepare_example(model, (x,))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    model.width = 5
    assert call_seconds(prepared, model, bind_inputs(model.forward, (x,))) > 0
    assert not heard
    assert model.layer.weight.grad is kept
    assert torch.equal(kept, torch.ones(8, 8))
    assert model.layer.bias.grad is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.width == 5


def test_more_parameters_take_longer() -> None:
    few, many = nn.Sequential(*[nn.Linear(4, 4)] * 2), nn.Sequential(*(nn.Linear(4, 4) for _ in range(100)))
    x = torch.randn(2, 4)
    assert cost_of(many, x) > cost_of(few, x)


def test_what_runs_in_place_of_kernels_runs_before_the_call_and_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    forward = call_cost.RematerializedForward.run_planned

    def run_planned(self: Any, *given: Any) -> Any:
        order.append("call")
        result = forward(self, *given)
        order.append("called")
        return result

    monkeypatch.setattr(call_cost.RematerializedForward, "run_planned", run_planned)
    monkeypatch.setattr(call_cost._Between, "__call__", lambda self: order.append("kernels"))
    assert cost_of(Returning(lambda x, h: h.relu()), torch.randn(4, 8)) > 0
    one = ["call", "kernels", "called", "kernels"]
    assert order == one + ["kernels", *one] * call_cost.RUNS


def test_its_time_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def work(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(call_cost.time, "perf_counter", lambda: now[0])
    between = call_cost._Between([lambda: work(8.0)])

    def run() -> None:
        work(0.5)
        between()
        work(0.25)
        between()

    assert list(between.times(run)) == [0.75] * call_cost.RUNS
