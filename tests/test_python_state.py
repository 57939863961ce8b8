"""Python values that a forward reads are part of the signature: changed between steps, they have their effect."""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import logging
import random
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import rematerialize as remat
from rematerialize.capture import containers
from rematerialize.capture.python_random import kept_python
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


# Values of every type, in attributes of a module.


class Uses(nn.Module):
    """Reads one attribute in one way."""

    def __init__(self, value: Any, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.value = value
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.use(self, self.inner(x))).square().sum()


class Noise:
    """A callable object."""

    def __init__(self) -> None:
        self.sigma = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.sigma


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * SETTING.get()


SETTING: ContextVar[float] = ContextVar("SETTING", default=1.0)


class Whole(int):
    """A number of a user's type."""


def holding(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x * value["factor"]


def with_default(x: Tensor, table: Any) -> Tensor:
    return x * table["factor"]


def a_function() -> Any:
    def same(x: Tensor) -> Tensor:
        return x

    vars(same)["factor"] = 1.0
    return same


def call_value(m: Any, x: Tensor) -> Tensor:
    return m.value(x)  # type: ignore[no-any-return]


def by_variable(m: Any, x: Tensor) -> Tensor:
    value = m.value
    scale: float = getattr(value, "scale_" + str(len(x) - 3))
    return x * scale


def times_value(m: Any, x: Tensor) -> Tensor:
    return x * m.value


def put(value: Any) -> Callable[[Any], object]:
    return lambda m: setattr(m, "value", value)


Use = tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], Callable[[Any], object]]
ATTRIBUTES: dict[str, Use] = {
    "dtype": (lambda: torch.float32, lambda m, x: x.to(m.value).float(), put(torch.bfloat16)),
    "complex": (lambda: 1 + 0j, lambda m, x: (x * m.value).real, put(2 + 0j)),
    "bytes": (lambda: b"a", lambda m, x: x * m.value[0], put(b"b")),
    "bool for an int": (lambda: 1, lambda m, x: x * 1.5 if m.value is True else x, put(True)),
    "size": (lambda: torch.Size([1]), lambda m, x: x * m.value[0], put(torch.Size([2]))),
    "slice": (lambda: slice(0, 2), lambda m, x: x + x[:, m.value].sum(), put(slice(0, 3))),
    "range": (lambda: range(1), lambda m, x: x * len(m.value), put(range(2))),
    "layout": (lambda: torch.strided, lambda m, x: x * (1 + (m.value is torch.strided)), put(torch.sparse_coo)),
    "memory format": (
        lambda: torch.contiguous_format,
        lambda m, x: x * (1 + (m.value is torch.contiguous_format)),
        put(torch.preserve_format),
    ),
    "fraction": (lambda: Fraction(1, 2), lambda m, x: x * float(m.value), put(Fraction(1, 3))),
    "decimal": (lambda: Decimal("0.5"), lambda m, x: x * float(m.value), put(Decimal("0.25"))),
    "int of a user's type": (lambda: Whole(1), times_value, put(Whole(2))),
    "namespace": (
        lambda: argparse.Namespace(k=1.0),
        lambda m, x: x * m.value.k,
        lambda m: setattr(m.value, "k", 2.0),
    ),
    "function": (lambda: F.relu, call_value, put(F.gelu)),
    "builtin": (lambda: torch.sin, call_value, put(torch.tanh)),
    "class": (lambda: nn.ReLU, lambda m, x: m.value()(x), put(nn.GELU)),
    "function in a dict": (
        lambda: {"act": F.relu},
        lambda m, x: m.value["act"](x),
        lambda m: m.value.update(act=F.gelu),
    ),
    "closure": (lambda: holding({"factor": 1.0}), call_value, put(holding({"factor": 2.0}))),
    "what a closure holds": (
        lambda: holding({"factor": 1.0}),
        call_value,
        lambda m: m.value.__closure__[0].cell_contents.update(factor=2.0),
    ),
    "what a default holds": (
        lambda: functools.partial(with_default, table={"factor": 1.0}),
        call_value,
        lambda m: m.value.keywords["table"].update(factor=2.0),
    ),
    "attribute of a function": (
        lambda: a_function(),
        lambda m, x: m.value(x) * m.value.factor,
        lambda m: setattr(m.value, "factor", 2.0),
    ),
    "keyword of a partial": (
        lambda: functools.partial(F.leaky_relu, negative_slope=0.1),
        call_value,
        lambda m: m.value.keywords.update(negative_slope=0.4),
    ),
    "field of a callable object": (Noise, call_value, lambda m: setattr(m.value, "sigma", 2.0)),
    "field of the object of a method": (
        lambda: Noise().__call__,
        call_value,
        lambda m: setattr(m.value.__self__, "sigma", 2.0),
    ),
    "p of a module in a list": (
        lambda: [nn.Dropout(0.1)],
        lambda m, x: m.value[0](x),
        lambda m: setattr(m.value[0], "p", 0.6),
    ),
    "mode of a module in a dict": (
        lambda: {"drop": nn.Dropout(0.5)},
        lambda m, x: m.value["drop"](x),
        lambda m: m.value["drop"].eval(),
    ),
    "p of a module within one in a tuple": (
        lambda: (nn.Sequential(nn.Dropout(0.1)),),
        lambda m, x: m.value[0](x),
        lambda m: setattr(m.value[0][0], "p", 0.6),
    ),
    "variable that a module in a list reads": (
        lambda: [Scaled()],
        lambda m, x: m.value[0](x),
        lambda m: SETTING.set(SETTING.get() + 1),
    ),
    "field of a computed name": (
        lambda: types.SimpleNamespace(scale_0=1.0),
        lambda m, x: x * getattr(m.value, f"scale_{len(x) - 3}"),
        lambda m: setattr(m.value, "scale_0", 2.0),
    ),
    "field of a computed name, by a variable": (
        lambda: types.SimpleNamespace(scale_0=1.0),
        by_variable,
        lambda m: setattr(m.value, "scale_0", 2.0),
    ),
    "field of a computed name in its dict": (
        lambda: types.SimpleNamespace(scale_0=1.0),
        lambda m, x: x * m.value.__dict__[f"scale_{len(x) - 3}"],
        lambda m: setattr(m.value, "scale_0", 2.0),
    ),
    "method replaced": (lambda: None, lambda m, x: m.method(x), lambda m: setattr(m, "method", lambda x: x * 2)),
    "forward of a submodule replaced": (
        lambda: None,
        lambda m, x: x,
        lambda m: setattr(m.inner, "forward", lambda x: F.linear(x, m.outer.weight, m.inner.bias)),
    ),
    "sizes of a module of torch's": (
        lambda: None,
        lambda m, x: m.mix(x),
        lambda m: vars(m.mix).update(padding=(2,), dilation=(2,)),
    ),
}


class UsesMore(Uses):
    def __init__(self, value: Any, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(value, use)
        self.mix = nn.Conv1d(3, 3, 3, padding=1)

    def method(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out


@pytest.fixture(autouse=True)
def _quick(quick_plans: None) -> None:
    pass


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    """Two models that share nothing, the second wrapped."""
    torch.manual_seed(0)
    eager = make()
    torch.manual_seed(0)
    ours = remat.wrap(make(), activation_budget="100%")
    return eager, ours, torch.randn(3, 4)


def same_seeded_step(eager: nn.Module, ours: nn.Module, x: Tensor) -> bool:
    found = []
    for model in (eager, ours):
        torch.manual_seed(1)
        model.zero_grad()
        out = model(x)
        out.backward()
        found.append([out, *(p.grad for p in model.parameters())])
    return all(a is b if b is None else torch.equal(a, b) for a, b in zip(*found, strict=True))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    model(x).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def has_its_effect(make: Callable[[], nn.Module], change: Callable[[Any], object]) -> None:
    eager, ours, x = pair(make)
    for _ in range(2):
        assert same_seeded_step(eager, ours, x)
    assert len(plans_of(ours)) == 1
    before = gradients(eager, x)
    change(eager)
    change(ours)
    assert not all(torch.equal(a, b) for a, b in zip(gradients(eager, x), before, strict=True))
    assert same_seeded_step(eager, ours, x)


@pytest.mark.parametrize(("value", "use", "change"), ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_an_attribute_of_any_type_has_its_effect(
    value: Callable[[], Any], use: Callable[[Any, Tensor], Tensor], change: Callable[[Any], object]
) -> None:
    has_its_effect(lambda: UsesMore(value(), use), change)


# Classes, globals and what an autograd.Function's backward reads.


class Settings:
    scale = 1.0


ALPHA = 1.0
ACTIVATION: Any = F.relu
DROPS = [nn.Dropout(0.1)]


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -ALPHA * gradient


class Configured(torch.autograd.Function):
    factor = 1.0
    table = types.SimpleNamespace(scale=1.0)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @classmethod
    def backward(cls, ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * cls.factor * Configured.table.scale


reverse = Reverse.apply


class Maker:
    """Reads a global where it is made."""

    def __init__(self) -> None:
        self.scale = ALPHA


def set_here(name: str, value: object) -> Callable[[Any], object]:
    return lambda m: vars(sys.modules[__name__]).update({name: value})


OUTSIDE: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], object]]] = {
    "a class used as a config": (lambda m, x: x * Settings.scale, lambda m: setattr(Settings, "scale", 2.0)),
    "a global that a backward reads": (lambda m, x: Reverse.apply(x), set_here("ALPHA", 2.0)),
    "a global that a backward reads, by a short name": (lambda m, x: reverse(x), set_here("ALPHA", 2.0)),
    "an attribute of its class that a backward reads": (
        lambda m, x: Configured.apply(x),
        lambda m: setattr(Configured, "factor", 2.0),
    ),
    "a config's field that a backward reads": (
        lambda m, x: Configured.apply(x),
        lambda m: setattr(Configured.table, "scale", 2.0),
    ),
    "a global that a constructor reads": (lambda m, x: x * Maker().scale, set_here("ALPHA", 2.0)),
    "a global function": (lambda m, x: ACTIVATION(x), set_here("ACTIVATION", F.gelu)),
    "a global's module": (lambda m, x: DROPS[0](x), lambda m: setattr(DROPS[0], "p", 0.6)),
    "a class attribute of a computed name": (
        lambda m, x: x * m.by_name(len(x)),
        lambda m: setattr(ByName, "factors_3", [2.0]),
    ),
    "the forward of a class": (lambda m, x: x, lambda m: setattr(ByName, "forward", lambda m, x: m.outer(x).sum())),
    "a method of a class": (lambda m, x: m.doubled(x), lambda m: setattr(ByName, "doubled", lambda m, x: x * 3)),
    "the backward of a function": (
        lambda m, x: Reverse.apply(x),
        lambda m: setattr(Reverse, "backward", staticmethod(lambda ctx, gradient: gradient * 3)),
    ),
}


class ByName(Uses):
    factors_3: ClassVar = [1.0]

    def by_name(self, number: int) -> float:
        factor: float = getattr(self, f"factors_{number}")[0]
        return factor

    def doubled(self, x: Tensor) -> Tensor:
        return x * 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.fixture
def _outside_as_it_was() -> Iterator[None]:
    here, before = vars(sys.modules[__name__]), (ALPHA, ACTIVATION, ByName.forward)
    methods = (ByName.doubled, vars(Reverse)["backward"])
    yield
    here["ALPHA"], here["ACTIVATION"] = before[:2]
    ByName.forward = before[2]  # type: ignore[method-assign]
    ByName.doubled, Reverse.backward = methods  # type: ignore[method-assign]
    Settings.scale = Configured.factor = Configured.table.scale = 1.0
    ByName.factors_3 = [1.0]
    DROPS[0].p = 0.1


@pytest.mark.usefixtures("_outside_as_it_was")
@pytest.mark.parametrize(("use", "change"), OUTSIDE.values(), ids=OUTSIDE)
def test_a_value_outside_of_the_modules_has_its_effect(
    use: Callable[[Any, Tensor], Tensor], change: Callable[[Any], object]
) -> None:
    has_its_effect(lambda: ByName(None, use), change)


def test_what_a_replacing_function_reads_has_its_effect() -> None:
    held = {"factor": 1.0}
    model = ByName(F.relu, call_value)
    ours = remat.wrap(copy.deepcopy(model), activation_budget="100%")
    x = torch.randn(3, 4)
    assert same_seeded_step(model, ours, x)
    model.value = ours.value = lambda x: x * held["factor"]  # type: ignore[assignment]
    assert same_seeded_step(model, ours, x)
    held["factor"] = 3.0
    assert same_seeded_step(model, ours, x)


# Hooks and parametrizations of inner modules.


class Times(nn.Module):
    """A parametrization through a callable."""

    def __init__(self, factor: Callable[[], float]) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor()


class Watcher:
    def __init__(self) -> None:
        self.factor = 1.0
        self.calls = 0

    def hook(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * self.factor


def hooked(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0), Total())
    inner, held = model[2], {"factor": 1.0}
    watcher = Watcher()
    if kind == "forward":
        inner.register_forward_hook(lambda m, args, out: out * held["factor"])
    elif kind == "forward pre":
        inner.register_forward_pre_hook(lambda m, args: (args[0] * held["factor"],))
    elif kind == "full backward":
        inner.register_full_backward_hook(lambda m, given, out: (given[0] * held["factor"],))
    elif kind == "full backward pre":
        inner.register_full_backward_pre_hook(lambda m, out: (out[0] * held["factor"],))
    elif kind == "method":
        inner.register_forward_hook(watcher.hook)
    elif kind == "one of two alike":
        for part, table in ((model[0], {"factor": 1.0}), (inner, held)):
            part.register_forward_hook(times_of(table))
    else:
        parametrize.register_parametrization(inner, "weight", Times(lambda: held["factor"]))
    model.turn = lambda: (held.update(factor=2.0), setattr(watcher, "factor", 2.0))  # type: ignore[assignment]
    return model


def times_of(table: dict[str, float]) -> Callable[..., Tensor]:
    return lambda m, args, out: out * table["factor"]


class Total(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().sum()


@pytest.mark.parametrize(
    "kind",
    ["forward", "forward pre", "full backward", "full backward pre", "method", "one of two alike", "parametrization"],
)
def test_what_hooks_of_inner_modules_read_has_its_effect(kind: str) -> None:
    has_its_effect(lambda: hooked(kind), lambda m: m.turn())


# What moves at every call.


class Schedule:
    """A callable object that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 1 / self.calls


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    def turn(self) -> float:
        self.calls += 1
        return 1 / self.calls


MOVING: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "random.Random": (lambda: random.Random(0), lambda r: r.random()),
    "method of a random.Random": (lambda: random.Random(0).random, lambda r: r()),
    "numpy generator": (lambda: np.random.default_rng(0), lambda r: float(r.random())),
    "numpy generator of Mersenne's": (
        lambda: np.random.Generator(np.random.MT19937(0)),
        lambda r: float(r.random()),
    ),
    "numpy random state": (lambda: np.random.RandomState(0), lambda r: float(r.rand())),
    "count": (lambda: itertools.count(1), lambda r: 1 / next(r)),
    "cycle": (lambda: itertools.cycle([1.0, 2.0, 3.0]), lambda r: next(r)),
    "iterator of a list": (lambda: iter([1.0, 2.0, 3.0, 4.0]), lambda r: next(r)),
    "generator in a list": (lambda: [random.Random(0)], lambda r: r[0].random()),
    "count in a dict": (lambda: {"n": itertools.count(1)}, lambda r: 1 / next(r["n"])),
    "callable object": (Schedule, lambda r: r()),
    "object with slots": (Slotted, lambda r: r.turn()),
}


class Moves(nn.Module):
    def __init__(self, moving: Any, draw: Callable[[Any], float]) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.moving = moving
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) * self.draw(self.moving)).sum()


@pytest.mark.parametrize(("make", "draw"), MOVING.values(), ids=MOVING)
def test_what_moves_at_every_call_is_refused_by_name(make: Callable[[], Any], draw: Callable[[Any], float]) -> None:
    ours = remat.wrap(Moves(make(), draw), activation_budget="100%")
    with pytest.raises(remat.CaptureError, match=r"\bmoving\b"):
        ours(torch.randn(3, 4))


@pytest.mark.parametrize(("make", "draw"), MOVING.values(), ids=MOVING)
def test_what_moves_while_it_is_traced_is_put_back(make: Callable[[], Any], draw: Callable[[Any], float]) -> None:
    model, moving, untouched = Moves(make(), draw), make(), make()
    model.moving = moving

    def refused() -> None:
        with kept_python(model, model.forward):
            for _ in range(2):
                model(torch.randn(3, 4))
            raise remat.CaptureError("refused")

    with pytest.raises(remat.CaptureError):
        refused()
    assert model.moving is moving
    assert [draw(moving) for _ in range(3)] == [draw(untouched) for _ in range(3)]


@pytest.mark.parametrize(("make", "draw"), MOVING.values(), ids=MOVING)
def test_what_is_refused_is_left_as_it_was(make: Callable[[], Any], draw: Callable[[Any], float]) -> None:
    moving, untouched = make(), make()
    ours = remat.wrap(Moves(moving, draw), activation_budget="100%")
    with pytest.raises(remat.CaptureError):
        ours(torch.randn(3, 4))
    assert ours.moving is moving
    assert [draw(moving) for _ in range(3)] == [draw(untouched) for _ in range(3)]


class Makes(OrderedDict[str, Callable[[], nn.Module]]):
    """A registry of classes, as libraries have one of activations: what is read is made at each reading."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


REGISTRY = Makes(gelu=nn.GELU, silu=nn.SiLU)


class Asks(nn.Module):
    """Takes its activation from a registry, and looks at a value."""

    def __init__(self, registry: Makes | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.registry = registry

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (REGISTRY if self.registry is None else self.registry)["silu"](self.inner(x))
        return (y if y.isfinite().all() else y.nan_to_num()).mean()


@pytest.mark.parametrize("registry", [None, Makes(silu=nn.SiLU, gelu=nn.GELU)], ids=["global", "held"])
def test_a_registry_that_makes_what_is_read_is_left_as_it_was(registry: Makes | None) -> None:
    watched = REGISTRY if registry is None else registry
    before = list(OrderedDict.items(watched))
    model = Asks(registry)
    with pytest.raises(remat.CaptureError, match="depends on the values of its tensors"):
        remat.wrap(model, activation_budget="100%")(torch.randn(3, 4))
    assert list(OrderedDict.items(watched)) == before
    assert isinstance(watched["gelu"], nn.GELU)


@pytest.mark.parametrize("kind", [dict, OrderedDict, list, set, deque])
def test_containers_of_a_users_class_are_read_and_filled_past_its_methods(kind: type[Any]) -> None:
    def forbidden(self: Any, *args: Any) -> None:
        raise AssertionError

    names = ("__getitem__", "__setitem__", "items", "keys", "copy", "clear", "update", "extend", "append", "add", "pop")
    strict: Any = type("Strict", (kind,), dict.fromkeys((*names, "__len__", "__iter__"), forbidden))
    value = strict()
    content = {"b": 1, "a": 2} if issubclass(kind, dict) else {1, 2} if kind is set else [3, 1, 2]
    assert containers.refill(value, content)
    assert containers.plain(value) == content
    assert not containers.refill(value, content)
    if kind is not set:
        containers.set_entry(value, next(iter(dict(containers.entries(value)))), 7)
        assert containers.entries(value)[0][1] == 7


COUNT = itertools.count(1)
DRAWN = 0


def test_a_count_in_a_global_and_in_a_class_is_refused_and_put_back() -> None:
    class Outside(nn.Module):
        turns = 0

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            global DRAWN
            DRAWN += 1
            type(self).turns += 1
            return (self.inner(x) * next(COUNT) * DRAWN * self.turns).sum()

    model = Outside()
    ours = remat.wrap(copy.deepcopy(model), activation_budget="100%")
    with pytest.raises(remat.CaptureError, match=r"Outside.turns.*COUNT.*DRAWN"):
        ours(torch.randn(3, 4))
    before = repr(COUNT), DRAWN, Outside.turns

    def refused() -> None:
        with kept_python(model, model.forward):
            model(torch.randn(3, 4))
            raise remat.CaptureError("refused")

    with pytest.raises(remat.CaptureError):
        refused()
    assert (repr(COUNT), DRAWN, Outside.turns) == before


# What makes no plan.


class Looks(nn.Module):
    """Points to what it doesn't read, and reads attributes by computed names."""

    def __init__(self, trainer: Trainer, seen: list[Any]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.trainer = trainer
        self.log = trainer.__init__  # type: ignore[misc]
        self.scale_1 = 1.0
        self.inner.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
        self.outer.note = lambda: trainer.global_step  # type: ignore[assignment]
        self.makes = lambda x: x * 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.makes = lambda x: x * 1.0  # another at every call, and the same
        return self.outer(self.makes(self.inner(x)) * getattr(self, f"scale_{1}")).sum()


def test_what_code_cannot_read_makes_no_plan() -> None:
    trainer, seen = Trainer(), []  # type: ignore[var-annotated]
    eager, ours, x = pair(lambda: Looks(trainer, seen))
    for step in range(4):
        trainer.global_step = step
        assert same_seeded_step(eager, ours, x)
        if step == 2:
            eager.eval(), ours.eval()
            ours(x)
            eager.train(), ours.train()
    assert len(plans_of(ours)) <= 2


def close_over(model: nn.Module) -> None:
    inner = next(model.children())
    inner.register_forward_hook(lambda m, args, out: out * (1 + model.training))


def test_closures_over_a_model_do_not_keep_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), Total())
    close_over(model)
    gone = weakref.ref(remat.wrap(model, activation_budget="100%"))
    model(torch.randn(3, 4)).backward()
    del model
    gc.collect()
    assert gone() is None
