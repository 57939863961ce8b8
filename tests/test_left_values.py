"""Plain values that a forward sets, of its modules or elsewhere: a planned step sets them as eager does, or refuses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rematerialize as remat
from tests.twins import assert_same_step, plans_of, step_of, store_all, twins

pytestmark = pytest.mark.usefixtures("quick_plans")


def batch(size: int = 8) -> Tensor:
    return torch.linspace(-2, 2, size * 16).reshape(size, 16).sin()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.teacher = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
        self.count: Any = 2
        self.config = Config()
        self.ready = False


class Config:
    scale = 1.0


class Previous(Layers):
    """Reads what the call before set."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).tanh()) * self.count
        self.count = len(x)
        return h


class Settles(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).tanh()) * self.count
        self.count = max(self.count - 1, 1)
        return h


class Absent(Layers):
    """Sets an attribute that wasn't there."""

    def forward(self, x: Tensor) -> Tensor:
        self.items = len(x)
        return self.b(self.a(x).tanh())


class OfAConfig(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).tanh()) * self.config.scale
        self.config.scale = 1.0 / len(x)
        return h


class Teacher(Layers):
    """Evaluates a part of its own."""

    def forward(self, x: Tensor) -> Tensor:
        self.teacher.eval()
        with torch.no_grad():
            target = self.teacher(x)
        return self.b(self.a(x).tanh()) - target


class AtFirst(Layers):
    """Computes something else at its first call."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if not self.ready:
            self.ready = True
            h = h * 3
        return self.b(h)


class Positions(Layers):
    """A table that grows with the longest input, and a number that goes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0
        self.table: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.longest:
            self.longest = len(x)
            self.table = torch.arange(len(x) * 16).reshape(-1, 16).cos()
        return self.b(self.a(x + self.table[: len(x)]).tanh())


LEAVING = [Previous, Settles, Absent, OfAConfig, Teacher, AtFirst, Positions]


def values_of(model: nn.Module) -> list[Any]:
    plain = [(k, v) for k, v in vars(model).items() if isinstance(v, int | float | bool)]
    return [*plain, vars(model.config), [module.training for module in model.modules()]]


@pytest.mark.parametrize("kind", LEAVING)
def test_what_a_forward_sets_is_set_and_read_as_in_eager(kind: type[Layers]) -> None:
    eager, ours = twins(kind)
    store_all(ours)
    for turn, size in enumerate((8, 8, 4, 8, 12)):
        assert_same_step(step_of(eager, batch(size), seed=turn), step_of(ours, batch(size), seed=turn))
        if kind is not Positions:  # whose table isn't left, and so neither is its length
            assert values_of(eager) == values_of(ours)
    assert len(plans_of(ours)) <= 9


@pytest.mark.parametrize("kind", [Teacher, Absent])
def test_what_settles_at_once_needs_one_plan(kind: type[Layers]) -> None:
    _, ours = twins(kind)
    store_all(ours)
    for _ in range(3):
        step_of(ours, batch())
    assert len({id(plan) for plan in plans_of(ours)}) == 1


@pytest.mark.parametrize("make", [list, deque, set, dict])
def test_a_container_that_grows_and_is_read_is_refused(make: Callable[[], Any]) -> None:
    class Growing(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.history = make()

        def forward(self, x: Tensor) -> Tensor:
            h = self.b(self.a(x).tanh()) / (1 + len(self.history))
            if isinstance(self.history, dict):
                self.history[len(self.history)] = len(x)
            elif isinstance(self.history, set):
                self.history.add(len(self.history))
            else:
                self.history.append(len(x))
            return h

    model = store_all(Growing())
    with pytest.raises(remat.CaptureError, match="history"):
        model(batch())
    assert len(model.history) == 0


LOSSES: list[Tensor] = []
SIZES: list[int] = []


class LeavesALoss(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        LOSSES.append(h.square().mean())
        return self.b(h)


class LeavesANewList(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        self.losses = [h.square().mean()]
        return self.b(h)


class NotesGradients(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        h.register_hook(lambda gradient: LOSSES.append(gradient.norm()))
        return self.b(h)


@pytest.mark.parametrize("kind", [LeavesALoss, LeavesANewList, NotesGradients])
def test_losses_left_in_lists_are_refused_and_leave_nothing_there(kind: type[Layers]) -> None:
    model = store_all(kind())
    with pytest.raises(remat.CaptureError, match=r"LOSSES|losses"):
        model(batch())
    assert LOSSES == []


def test_a_log_outside_that_nobody_reads_is_left_alone() -> None:
    class Logs(Layers):
        def forward(self, x: Tensor) -> Tensor:
            SIZES.append(len(x))
            return self.b(self.a(x).tanh())

    eager, ours = twins(Logs)
    store_all(ours)
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    SIZES.clear()


class Meter:
    def __init__(self) -> None:
        self.total = 0

    def add(self, number: int) -> int:
        self.total += number
        return self.total


METER = Meter()


def test_a_method_that_is_called_as_a_lists_own_is_looked_into() -> None:
    class Counts(Layers):
        def forward(self, x: Tensor) -> Tensor:
            METER.add(len(x))
            return self.b(self.a(x).tanh())

    model = store_all(Counts())
    with pytest.raises(remat.CaptureError, match="METER"):
        model(batch())


# Arguments.


def adds(model: Layers, values: dict[str, Any], log: list[Any]) -> Tensor:
    values["h"] = model.a(values["x"]).tanh()
    return model.b(values["h"])


def pops(model: Layers, values: dict[str, Any], log: list[Any]) -> Tensor:
    return model.b(model.a(values.pop("x")).tanh())


def appends(model: Layers, values: dict[str, Any], log: list[Any]) -> Tensor:
    log.append(model.a(values["x"]).tanh())
    return model.b(log[-1])


@pytest.mark.parametrize("use", [adds, pops, appends])
def test_a_container_that_is_given_and_changed_is_refused(use: Callable[..., Tensor]) -> None:
    class Given(Layers):
        def forward(self, values: dict[str, Any], log: list[Any]) -> Tensor:
            return use(self, values, log)

    model = store_all(Given())
    values: dict[str, Any] = {"x": batch()}
    log: list[Any] = []
    with pytest.raises(remat.CaptureError, match=r"it is given as input [01], which a planned step doesn't"):
        model(values, log)
    assert list(values) == ["x"]
    assert log == []


def test_an_iterator_that_is_given_is_refused_and_not_used_up() -> None:
    class Takes(Layers):
        def forward(self, x: Tensor, factors: Any) -> Tensor:
            return self.b(self.a(x).tanh()) * next(factors)

    model, factors = store_all(Takes()), iter([2.0, 3.0])
    with pytest.raises(remat.CaptureError, match="an input is an iterator"):
        model(batch(), factors)
    assert next(factors) == 2.0


def test_attributes_of_an_input_have_their_effect() -> None:
    class Marked(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh()) * getattr(x, "scale", 1.0) + getattr(self.a.weight, "shift", 0.0)

    eager, ours = twins(Marked)
    for model in (eager, ours):
        model.a.weight.shift = 3.0
    store_all(ours)
    for scale in (None, 2.0, 5.0):
        x = batch()
        if scale is not None:
            x.scale = scale  # type: ignore[attr-defined]
        assert_same_step(step_of(eager, x), step_of(ours, x))


def test_a_part_that_the_forward_unfreezes_is_refused_by_name() -> None:
    class Unfreezes(Layers):
        def forward(self, x: Tensor) -> Tensor:
            self.a.requires_grad_(True)
            return F.relu(self.b(self.a(x)))

    model = Unfreezes()
    model.a.requires_grad_(False)
    store_all(model)
    with pytest.raises(remat.CaptureError, match=r"requires_grad_\(\) on 'a.weight'"):
        model(batch())


def test_layers_outputs_of_a_fresh_transformer_are_as_eagers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    eager, ours = twins(lambda: transformers.BertModel(config))
    store_all(ours)
    ids = torch.arange(24).reshape(2, 12)
    for turn in range(2):
        found = [step_of(model, ids, seed=turn, output_hidden_states=True) for model in (eager, ours)]
        assert_same_step(*found)
