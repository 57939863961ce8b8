"""What a forward leaves for its next call, shares, or changes behind torch's back: as eager, or refused at once."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rematerialize as remat
from tests.twins import assert_same_step, at_minimum, same, same_gradients, step_of, store_all, total, twins

pytestmark = pytest.mark.usefixtures("quick_plans")


def batch(turn: int = 0) -> Tensor:
    return torch.linspace(-2, 2 + turn, 128).reshape(8, 16).sin()


class Layers(nn.Module):
    """Two layers and somewhere to leave things."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.state: Any = None
        self.memory: Any = []
        self.register_buffer("late", None)


# Tensors that the next call reads.


class Hidden(Layers):
    def forward(self, x: Tensor) -> Tensor:
        before = torch.zeros(8, 16) if self.state is None else self.state
        h = torch.tanh(self.a(x) + self.b(before))
        self.state = h.detach()
        return h


class Remembered(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if self.memory:
            h = h + self.b(self.memory[-1])
        self.memory.append(h.detach())
        return h


class Queued(Remembered):
    def __init__(self) -> None:
        super().__init__()
        self.memory = collections.deque(maxlen=2)


class ByName(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.memory = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if "last" in self.memory:
            h = h + self.b(self.memory["last"])
        self.memory["last"] = h.detach()
        return h


class OnARecord(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.state = types.SimpleNamespace(last=None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if self.state.last is not None:
            h = h + self.b(self.state.last)
        self.state.last = h.detach()
        return h


class DrawnOnce(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = torch.rand(16)
        return self.a(x) * self.state


class OfAWeight(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = self.b.weight.detach() * 2
        return self.a(x) @ self.state


@dataclasses.dataclass(frozen=True)
class Pair:
    last: Tensor


class InANewContainer(Layers):
    """What the first call makes isn't a place that was there before."""

    make: Callable[[Tensor], Any]
    read: Callable[[Any], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = type(self).make(x.detach())
        return self.a(x) * type(self).read(self.state)


class InATuple(InANewContainer):
    make = staticmethod(lambda h: (1, h.mean()))
    read = staticmethod(lambda state: state[1])


class InADict(InANewContainer):
    make = staticmethod(lambda h: {"seen": [h.mean()]})
    read = staticmethod(lambda state: state.get("seen")[0])


class InARecord(InANewContainer):
    make = staticmethod(lambda h: Pair(h.mean()))
    read = staticmethod(lambda state: state.last)


class InAListOfRecords(InANewContainer):
    make = staticmethod(lambda h: [types.SimpleNamespace(last=h.mean())])
    read = staticmethod(lambda state: state[0].last)


class Slots:
    __slots__ = ("last",)

    def __init__(self, last: Tensor) -> None:
        self.last = last


class InSlots(InANewContainer):
    make = staticmethod(lambda h: Slots(h.mean()))
    read = staticmethod(lambda state: state.last)


class InAClosure(InANewContainer):
    @staticmethod
    def make(h: Tensor) -> Any:
        mean = h.mean()
        return lambda: mean

    read = staticmethod(lambda state: state())


class InAPartial(InANewContainer):
    make = staticmethod(lambda h: functools.partial(torch.add, h.mean(), 1))
    read = staticmethod(lambda state: state())


class InAnIterator(InANewContainer):
    make = staticmethod(lambda h: iter([h.mean()] * 9))
    read = staticmethod(lambda state: next(state))


class ToldByAFlag(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.state, self.ready = (x.detach().mean(),), True
        return self.a(x) * self.state[0]


STATEFUL = [Hidden, Remembered, Queued, ByName, OnARecord, DrawnOnce, OfAWeight]
STATEFUL += [InATuple, InADict, InARecord, InAListOfRecords, ToldByAFlag, InSlots, InAClosure, InAPartial, InAnIterator]


def shown(value: Any) -> Any:
    return vars(value) if isinstance(value, types.SimpleNamespace) else value


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_tensor_that_the_next_call_reads_is_refused_by_name(kind: type[Layers]) -> None:
    model = kind()
    before = [str(shown(model.state)), str(model.memory)]
    with pytest.raises(
        remat.CaptureError, match=r"reads '?\"?(state|memory).* as an earlier call left it.*register_buf"
    ):
        remat.wrap(model, activation_budget="100%")(batch())
    assert [str(shown(model.state)), str(model.memory)] == before
    step_of(remat.unwrap(model), batch())


@functools.lru_cache(maxsize=4)
def drawn(size: int) -> Tensor:
    return torch.rand(size)


@functools.lru_cache(maxsize=4)
def counted(size: int) -> Tensor:
    return torch.arange(size) / size


class InAFunctionsCache(Layers):
    def __init__(self, function: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.function(16)


def test_what_a_functions_cache_keeps_of_a_draw_is_refused_and_constants_are_planned() -> None:
    with pytest.raises(remat.CaptureError, match=r"drawn in the cache of drawn\(\) \(functools.lru_cache"):
        remat.wrap(InAFunctionsCache(drawn), activation_budget="100%")(batch())
    eager, ours = twins(lambda: InAFunctionsCache(counted))
    at_minimum(ours, batch())
    for turn in range(2):
        assert_same_step(step_of(eager, batch(turn)), step_of(ours, batch(turn)))


class OnAParameter(Layers):
    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.b.weight
        if not hasattr(weight, "seen"):
            weight.seen = x.detach().mean()
        return self.a(x) * weight.seen


def test_what_a_forward_leaves_on_a_parameter_and_reads_is_refused() -> None:
    model = OnAParameter()
    with pytest.raises(remat.CaptureError, match=r"leaves 'seen' on 'b.weight', which a planned step can't repeat"):
        remat.wrap(model, activation_budget="100%")(batch())
    assert not hasattr(model.b.weight, "seen")


def test_one_that_was_there_before_planning_is_refused_too() -> None:
    model = Hidden()
    model(batch())
    with pytest.raises(remat.CaptureError, match="reads 'state' as an earlier call left it"):
        remat.wrap(model, activation_budget="100%")(batch(1))
    assert isinstance(model.state, Tensor)


def test_a_cache_of_a_weight_that_eager_has_filled_stays_as_it_is() -> None:
    eager, ours = twins(OfAWeight)
    for model in (eager, ours):
        with torch.no_grad():
            model(batch())
            model.b.weight.add_(1)
    at_minimum(ours, batch())
    for turn in range(2):
        assert_same_step(step_of(eager, batch(turn)), step_of(ours, batch(turn)))


class Logged(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        self.state = h.detach()  # for whoever looks
        return self.b(self.state + h)


class LoggedInATuple(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        self.state = {"h": (h.detach(), 1)}
        return self.b(self.state["h"][0] + h)


class OfABuffer(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(16.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = self.frequencies.cos()
        return self.a(x) * self.state


class TupleOfABuffer(OfABuffer):
    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = self.frequencies.cos(), self.frequencies.sin()
        cos, sin = self.state
        return self.a(x) * cos + sin


@pytest.mark.parametrize("kind", [Logged, LoggedInATuple, OfABuffer, TupleOfABuffer])
def test_what_is_left_and_read_in_the_same_call_and_caches_of_constants_are_planned(kind: type[Layers]) -> None:
    eager, ours = twins(kind)
    at_minimum(ours, batch())
    for turn in range(3):
        assert_same_step(step_of(eager, batch(turn)), step_of(ours, batch(turn)))


# Values that move on.


class CountsFromNone(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.state = 1 if self.state is None else self.state + 1
        return self.a(x) * self.state


class CountsFromNothing(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.a(x) * self.calls


class CountsOnARecord(OnARecord):
    def forward(self, x: Tensor) -> Tensor:
        self.state.last = (self.state.last or 0) + 1
        return self.a(x) * self.state.last


@pytest.mark.parametrize("kind", [CountsFromNone, CountsFromNothing, CountsOnARecord])
def test_counters_are_refused_wherever_they_begin(kind: type[Layers]) -> None:
    model = kind()
    with pytest.raises(
        remat.CaptureError, match=r"changes (state|calls|state.last), which a planned step can't repeat"
    ):
        remat.wrap(model, activation_budget="100%")(batch())
    assert not hasattr(model, "calls")
    assert shown(model.state) in (None, {"last": None})


# Parts that the first call makes.


class MakesABuffer(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "cache"):
            self.register_buffer("cache", torch.arange(16.0), persistent=False)
        return self.a(x) + self.cache


class FillsABuffer(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = torch.arange(16.0)
        return self.a(x) + self.late


class MakesAPart(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "cache"):
            self.cache = nn.Linear(16, 16)
        out: Tensor = self.cache(self.a(x))
        return out


@pytest.mark.parametrize("kind", [MakesABuffer, FillsABuffer, MakesAPart])
def test_parts_that_the_first_call_makes_are_refused_until_it_was_made(kind: type[Layers]) -> None:
    eager, ours = twins(kind)
    with pytest.raises(remat.CaptureError, match=r"makes '(cache|late).* at its first call: call the model once"):
        store_all(ours)(batch())
    assert not hasattr(ours, "cache")
    assert ours.late is None
    for model in (eager, ours):
        torch.manual_seed(3)
        with torch.no_grad():
            model(batch())
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


class ReplacesAPart(Layers):
    """As BigBird does where a sequence is short: another class with the same weights, and weights that it drew."""

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = "another"
            other = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
            other[0] = self.a
            self.a = other
        out: Tensor = self.a(x)
        return out


def test_a_part_that_the_first_call_replaces_is_refused_until_it_was_replaced() -> None:
    eager, ours = twins(ReplacesAPart)
    before = ours.a
    with pytest.raises(remat.CaptureError, match=r"another module in the place of 'a'.*: if only its first call does"):
        store_all(ours)(batch())
    assert ours.a is before
    assert ours.state is None
    for model in (eager, ours):
        torch.manual_seed(3)
        with torch.no_grad():
            model(batch())
    for turn in range(2):
        assert_same_step(step_of(eager, batch(turn)), step_of(ours, batch(turn)))


# Behind torch's back.


class AssignsData(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data = F.normalize(self.a.weight.data, dim=1)
        return self.a(x)


class ReadsGrad(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y if self.a.weight.grad is None else y * 2


class MakesSparse(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return (self.a.weight.relu().to_sparse_csr() @ x.T).T


class Linearizes(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y, push = torch.func.linearize(lambda p: self.a(p).tanh(), x)
        out: Tensor = push(torch.ones_like(x)) + y
        return out


REFUSED = {
    AssignsData: r"assigns to .data of a tensor at test_left_behind.py:\d+.*copy_",
    ReadsGrad: r"reads .grad of a tensor at test_left_behind.py:\d+.*as an input",
    MakesSparse: r"makes a sparse tensor at test_left_behind.py:\d+ \(to_sparse_csr\).*index_add",
    Linearizes: r"calls torch.func.linearize at test_left_behind.py:\d+.*jvp",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_trace_would_miss_or_not_survive_is_refused_at_its_line(kind: type[Layers]) -> None:
    model = kind()
    with pytest.raises(remat.CaptureError, match=REFUSED[kind]):
        remat.wrap(model, activation_budget="100%")(batch())
    gc.collect()
    step_of(Logged(), batch())  # torch itself is as it was


# Memory that is shared.


class Doubles(Layers):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.a(x.clone()).tanh()
        x.mul_(2)
        return self.b(h + y.sin())


def test_inputs_that_share_memory_are_not_served_by_a_plan_for_others() -> None:
    eager, ours = twins(Doubles)
    store_all(ours)
    assert_same_step(step_of(eager, batch(), batch(1)), step_of(ours, batch(), batch(1)))
    base = torch.ones(12, 16)
    with pytest.raises(remat.CaptureError, match="share memory, and it writes into one of them"):
        ours(base[:8], base[4:])


class ThreeInputs(Layers):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()) + 2 * self.a(y) + 3 * self.b(z)


def test_a_tensor_given_twice_has_a_plan_for_its_places() -> None:
    eager, ours = twins(ThreeInputs)
    store_all(ours)
    x, y = batch(), batch(1)
    calls: list[Callable[[], tuple[Tensor, ...]]] = [lambda: (x, x, y), lambda: (x, y, y), lambda: (x, y, x)]
    for call in calls:
        assert_same_step(step_of(eager, *call()), step_of(ours, *call()))


class OnATensor(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.ones(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.state


def test_a_plain_tensor_attribute_of_another_shape_plans_again() -> None:
    eager, ours = twins(OnATensor)
    store_all(ours)
    for state in (torch.ones(16), torch.full((8, 16), 2.0), torch.tensor(3.0)):
        eager.state = ours.state = state
        assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


class Conjugated(Layers):
    def forward(self, z: Tensor) -> Tensor:
        return self.a(z.real * (2 if z.is_conj() else 1))


def test_a_conjugate_view_plans_again() -> None:
    eager, ours = twins(Conjugated)
    store_all(ours)
    z = torch.complex(batch(), batch(1))
    for value in (z, z.conj(), z):
        assert_same_step(step_of(eager, value), step_of(ours, value))


def test_autocasts_cache_is_part_of_the_signature() -> None:
    eager, ours = twins(ThreeInputs)
    store_all(ours)
    for enabled in (True, False, True):
        for model in (eager, ours):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=enabled):
                y = model(batch(), batch(1), batch(2))
            y.float().square().sum().backward()
        assert same_gradients(eager, ours)


# Gradients of inputs and of features.


class AsksForAGradient(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_()
        u = self.b(self.a(x).tanh())
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return u + slope


def test_an_input_that_the_forward_asks_a_gradient_for_gets_it() -> None:
    eager, ours = twins(AsksForAGradient)
    store_all(ours)
    for turn in range(3):
        inputs = batch(turn), batch(turn)
        for model, x in zip((eager, ours), inputs, strict=True):
            model.zero_grad()
            model(x).square().sum().backward()
            assert x.grad is not None
        assert same(*(x.grad for x in inputs))
        assert same_gradients(eager, ours)
    assert len(remat.plans_of(ours)) == 1


class Features(Layers):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x).tanh()
        return h, self.b(h).sin()


def watched_by_a_hook(features: Tensor) -> None:
    features.register_hook(lambda gradient: gradient * 0.1)


@pytest.mark.parametrize("watch", [watched_by_a_hook, Tensor.retain_grad])
def test_hooks_on_what_the_forward_goes_on_with_are_refused(watch: Callable[[Tensor], None]) -> None:
    model = store_all(Features())
    features, logits = model(batch())
    watch(features)
    with pytest.raises(RuntimeError, match=r"output 0 of this step has a hook or retain_grad.*inside the forward"):
        (logits.square().mean() + features.mean()).backward()
    step_of(model, batch())


def test_hooks_on_what_the_forward_ends_with_are_eagers() -> None:
    results = []
    for model in twins(Features):
        if not results:
            store_all(model)
        features, logits = model(batch())
        logits.register_hook(lambda gradient: gradient * 0.1)
        logits.retain_grad()
        (logits.square().mean() + features.mean()).backward()
        assert logits.grad is not None
        results.append([logits.grad, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))


class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.seen.add_(gradients[0].abs().mean(0))
        return gradients[0], None


class WritesInTheBackward(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(Noted.apply(self.a(x), self.seen))  # type: ignore[no-untyped-call]
        return out


class WritesInAHook(WritesInTheBackward):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()

        def note(gradient: Tensor) -> None:
            with torch.no_grad():
                self.seen.add_(gradient.abs().mean(0))

        if h.requires_grad:
            h.register_hook(note)
        out: Tensor = self.b(h)
        return out


@pytest.mark.parametrize("kind", [WritesInTheBackward, WritesInAHook])
def test_what_a_backward_writes_is_refused(kind: type[Layers]) -> None:
    with pytest.raises(remat.CaptureError, match=r"(the backward changes seen|changed in place by what runs apart)"):
        store_all(kind())(batch())


# What differs, as docs/semantics.md says.


class TwoDraws(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.5)).tanh()


def test_a_weight_that_is_used_outside_of_the_step_too_has_a_sum_in_another_order() -> None:
    gradients = []
    for model in twins(Layers):
        model.forward = lambda x, m=model: m.b(m.a(x).tanh()) + m.a(x)
        if gradients:
            store_all(model)
        loss = model(batch()).square().sum() + model.a.weight.square().sum() + model(batch(1)).sum()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, eagers in zip(*gradients, strict=True):
        assert ours is not None
        assert eagers is not None
        torch.testing.assert_close(ours, eagers, rtol=1e-5, atol=1e-5)


class Product(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).tanh() * self.b(x) * x


class Residual(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Product()

    def forward(self, x: Tensor) -> Tensor:
        features = self.a(x).tanh()
        return features + self.inner(features)


def test_an_input_that_is_used_outside_of_the_step_too_has_a_sum_in_another_order() -> None:
    eager, part = twins(Residual)
    store_all(part.inner)
    whole = store_all(copy.deepcopy(eager))
    steps = [step_of(model, batch()) for model in (eager, part, whole)]
    assert_same_step(steps[0], steps[2])
    for model in (part, whole):
        for ours, eagers in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, eagers.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(part.inner.a.weight.grad, eager.inner.a.weight.grad)  # the rest is eager's


class Tokens(Layers):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.a(x)
        return {"first": h[:, 0], "others": h[:, 1:], "all": h, "head": self.b(h)}


def test_outputs_that_look_at_one_value_have_a_sum_in_another_order() -> None:
    """Eager adds the head's gradient before those of views that were taken before it."""
    gradients = []
    for model in twins(Tokens):
        if gradients:
            store_all(model)
        total(model(batch())).backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, eagers in zip(*gradients, strict=True):
        assert ours is not None
        assert eagers is not None
        torch.testing.assert_close(ours, eagers, rtol=1e-5, atol=1e-5)


def test_hooks_of_parameters_run_once_each_after_the_whole_backward() -> None:
    calls: list[list[str]] = []
    for model in twins(TwoDraws):
        if calls:
            store_all(model)
        calls.append([])
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, log=calls[-1]: log.append(name))
        model(batch()).sum().backward()
    assert sorted(calls[0]) == sorted(calls[1])


def test_features_are_differentiated_as_far_as_they_go_on_outside() -> None:
    model = store_all(Features())
    features, logits = model(batch())
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(logits.sum(), features, retain_graph=True)
    (outside,) = torch.autograd.grad(features.square().sum() + logits.sum(), features)
    assert torch.equal(outside, 2 * features)


class Lazy(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.late_layer = nn.LazyLinear(16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.late_layer(self.a(x).tanh())
        return out


def test_a_lazy_layer_is_refused_until_it_has_a_shape() -> None:
    eager, ours = Lazy(), Lazy()
    with pytest.raises(remat.RematerializeError, match=r"'late_layer.weight' has no shape.*call the model once"):
        store_all(ours)
    for model in (eager, ours):
        with torch.no_grad():
            model(batch())
    ours.load_state_dict(eager.state_dict())
    at_minimum(ours, batch())
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


class Deep(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.b(self.a(x).tanh()).sin()
        return x


def test_data_changed_before_the_backward_is_what_is_recomputed_with() -> None:
    gradients = []
    for budget in ("100%", None):
        model = twins(Deep)[0]
        ours = store_all(model) if budget else at_minimum(model, batch())
        loss = ours(batch()).square().sum()
        model.a.weight.data = model.a.weight.data * 2
        loss.backward()
        assert model.a.weight.grad is not None
        gradients.append(model.a.weight.grad)
    assert torch.isfinite(gradients[0]).all()
    assert not torch.equal(*gradients)
