"""Python values that a forward reads are part of the signature: changed between steps, they have their effect."""

from __future__ import annotations

import copy
import logging
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rematerialize as remat
from tests.twins import plans_of

FACTOR = 1.0
TABLE = {"factor": [1.0]}


@dataclass
class Config:
    factor: float = 1.0
    unread: int = 0


class Hidden:
    """A record whose field only its own method reads."""

    __slots__ = ("secret",)

    def __init__(self) -> None:
        self.secret = 1.0

    def factor_of(self) -> float:
        return self.secret


class Trainer:
    """What a model may point to without reading it."""

    def __init__(self) -> None:
        self.global_step = 0


def from_table() -> float:
    return TABLE["factor"][0]


def make_scaled(factor: float) -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    def scaled(x: Tensor) -> Tensor:
        return x * factor

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return scaled, change


class Reads(nn.Module):
    """Scales by values from everywhere that Python keeps them."""

    shared = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.options: dict[str, Any] = {"factor": 1.0, "deep": [{"factor": 1.0}]}
        self.factors = [1.0]
        self.chosen = {1.0}
        self.config = Config()
        self.space = types.SimpleNamespace(factor=1.0)
        self.hidden = Hidden()
        self.array = np.ones(4, dtype=np.float32)
        self.trainer = Trainer()

    def forward(self, x: Tensor, given: Any = None) -> Tensor:
        factor = self.options["factor"] * self.options["deep"][0]["factor"] * self.factors[0] * sum(self.chosen)
        factor = factor * self.config.factor * self.space.factor * self.hidden.factor_of() * self.shared
        factor = factor * FACTOR * from_table() * float(self.array.sum()) * (1.0 if given is None else given.factor)
        return (self.inner(x) * factor).sum()


def set_global(model: Reads) -> None:
    vars(sys.modules[__name__])["FACTOR"] = 2.0


CHANGES: dict[str, Callable[[Reads], object]] = {
    "an entry of a dict": lambda m: m.options.update(factor=2.0),
    "a value deep inside": lambda m: m.options["deep"][0].update(factor=2.0),
    "an entry of a list": lambda m: m.factors.__setitem__(0, 2.0),
    "a set": lambda m: m.chosen.add(2.0),
    "a field of a config": lambda m: setattr(m.config, "factor", 2.0),
    "another config": lambda m: setattr(m, "config", Config(2.0)),
    "a field of a namespace": lambda m: setattr(m.space, "factor", 2.0),
    "a slot that a method reads": lambda m: setattr(m.hidden, "secret", 2.0),
    "a class attribute": lambda m: setattr(Reads, "shared", 2.0),
    "a global variable": set_global,
    "a global that a called function reads": lambda m: TABLE["factor"].__setitem__(0, 2.0),
    "a numpy array": lambda m: m.array.__setitem__(0, 5.0),
}


@pytest.fixture(autouse=True)
def _as_it_was() -> Any:
    yield
    Reads.shared = 1.0
    vars(sys.modules[__name__])["FACTOR"] = 1.0
    TABLE["factor"][0] = 1.0


def twins() -> tuple[Reads, Reads, Tensor]:
    torch.manual_seed(0)
    model = Reads()
    return model, remat.wrap(copy.deepcopy(model), activation_budget="100%"), torch.randn(3, 4)  # type: ignore[return-value]


def same_step(eager: nn.Module, ours: nn.Module, *args: Any) -> bool:
    eager.zero_grad()
    ours.zero_grad()
    losses = [model(*args) for model in (eager, ours)]
    for loss in losses:
        loss.backward()
    pairs = zip(eager.parameters(), ours.parameters(), strict=True)
    grads = [(a.grad, b.grad) for a, b in pairs]
    return torch.equal(*losses) and all(a is not None and b is not None and torch.equal(a, b) for a, b in grads)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_value_that_changes_between_steps_has_its_effect(change: Callable[[Reads], object]) -> None:
    eager, ours, x = twins()
    assert same_step(eager, ours, x)
    before = eager(x)
    change(eager)
    change(ours)
    assert not torch.equal(eager(x), before)
    assert same_step(eager, ours, x)


def test_an_argument_that_is_an_object_counts_with_its_fields() -> None:
    eager, ours, x = twins()
    given = Config()
    assert same_step(eager, ours, x, given)
    given.factor = 3.0
    assert same_step(eager, ours, x, given)


def test_a_closure_counts_with_what_it_holds() -> None:
    scaled, change = make_scaled(1.0)

    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return scaled(torch.tanh(self.inner(x))).sum()

    eager = Closed()
    ours = remat.wrap(copy.deepcopy(eager), activation_budget="100%")
    x = torch.randn(3, 4)
    assert same_step(eager, ours, x)
    change(2.0)
    assert same_step(eager, ours, x)


def test_what_a_forward_does_not_read_makes_no_plan(caplog: pytest.LogCaptureFixture) -> None:
    eager, ours, x = twins()
    for step in range(3):
        for model in (eager, ours):
            model.trainer.global_step = step
            model.config.unread = step
        assert same_step(eager, ours, x)
    assert len(plans_of(ours)) == 1


def test_a_log_that_a_forward_only_fills_makes_no_plan() -> None:
    log: list[int] = []

    class Logs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            log.append(len(x))
            return torch.tanh(self.inner(x)).sum()

    eager = Logs()
    ours = remat.wrap(copy.deepcopy(eager), activation_budget="100%")
    for _ in range(3):
        assert same_step(eager, ours, torch.randn(3, 4))  # eager fills it at every step
    assert len(plans_of(ours)) == 1


class Record:
    calls = 0


class Counts(nn.Module):
    """Moves a number on in a record: at every call, or up to a bound."""

    def __init__(self, record: Any, until: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.record = record
        self.until = until

    def forward(self, x: Tensor) -> Tensor:
        own = self.record if isinstance(self.record, dict) else vars(self.record)
        own["calls"] = min(own.get("calls", 0) + 1, self.until)
        return torch.tanh(self.inner(x) * own["calls"]).sum()


@pytest.mark.parametrize("make", [lambda: {"calls": 0}, Record], ids=["dict", "object"])
def test_a_counter_in_a_record_is_refused(make: Callable[[], Any]) -> None:
    ours = remat.wrap(Counts(make(), 1_000_000), activation_budget="100%")

    def train() -> None:
        for _ in range(3):
            ours(torch.randn(3, 4)).backward()

    with pytest.raises(remat.CaptureError, match="record"):
        train()


@pytest.mark.parametrize("make", [lambda: {"calls": 0}, Record], ids=["dict", "object"])
def test_a_default_that_the_first_call_fills_in_is_no_counter(make: Callable[[], Any]) -> None:
    eager = Counts(make(), 1)
    ours = remat.wrap(copy.deepcopy(eager), activation_budget="100%")
    for _ in range(4):
        assert same_step(eager, ours, torch.randn(3, 4))


def test_planning_again_names_the_value_that_changed(caplog: pytest.LogCaptureFixture) -> None:
    eager, ours, x = twins()
    assert same_step(eager, ours, x)
    for turn, told in ((2.0, False), (3.0, True)):  # the first may be a default that settles
        eager.config.factor = ours.config.factor = turn
        with caplog.at_level(logging.WARNING, logger="rematerialize"):
            assert same_step(eager, ours, x)
        assert ("planned again because Reads.config changed, for the 2. time" in caplog.text) == told
