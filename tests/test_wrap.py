"""A wrapped model is the same model to everyone: its parts, its state, its calls."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rematerialize as remat
from tests.twins import (
    assert_same_step,
    at_minimum,
    check_steps,
    planner_of,
    plans_of,
    same,
    step_of,
    store_all,
    tensors_in,
    total,
    twins,
)

pytestmark = pytest.mark.usefixtures("quick_plans")


class MLP(nn.Module):
    """Four blocks with dropout and a batch norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.blocks = nn.Sequential(
            *(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.2)))
        )

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        y = self.blocks(self.norm(x)) * scale
        return y if shift is None else y + shift


def batch(rows: int = 8, width: int = 16) -> Tensor:
    return torch.linspace(-2, 2, rows * width).reshape(rows, width).sin()


# The same object, with the same parts.


def test_wrap_returns_the_model_itself_with_all_its_parts() -> None:
    model = MLP()
    before = (
        {name: id(value) for name, value in model.named_parameters()},
        {name: id(value) for name, value in model.named_buffers()},
        list(model.state_dict()),
        [(name, id(module)) for name, module in model.named_modules()],
        str(model),
    )
    wrapped = remat.wrap(model, activation_budget="100%", example_inputs=(batch(),))
    step_of(wrapped, batch())
    assert wrapped is model
    assert type(wrapped) is MLP
    assert before == (
        {name: id(value) for name, value in wrapped.named_parameters()},
        {name: id(value) for name, value in wrapped.named_buffers()},
        list(wrapped.state_dict()),
        [(name, id(module)) for name, module in wrapped.named_modules()],
        str(wrapped),
    )


def test_a_wrapped_forward_keeps_its_signature_and_name() -> None:
    model = MLP()
    signature = inspect.signature(model.forward)
    store_all(model)
    assert inspect.signature(model.forward) == signature
    assert model.forward.__name__ == "forward"


def test_unwrap_gives_the_model_back_as_it_was() -> None:
    eager, ours = twins(MLP)
    at_minimum(ours, batch())
    step_of(ours, batch())
    ours.zero_grad()
    step_of(eager, batch())
    eager.zero_grad()
    assert remat.unwrap(ours) is ours
    assert "forward" not in vars(ours)
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


def test_unwrap_gives_back_a_forward_that_the_instance_had_of_its_own() -> None:
    model = nn.Linear(4, 4)

    def own(x: Tensor) -> Tensor:
        return F.linear(x, model.weight).exp()

    model.forward = own  # type: ignore[method-assign]
    store_all(model)
    assert torch.equal(model(torch.ones(2, 4)), own(torch.ones(2, 4)))
    remat.unwrap(model)
    assert model.forward is own


def test_a_state_dict_goes_to_an_unwrapped_model_and_back() -> None:
    eager, ours = twins(MLP)
    at_minimum(ours, batch())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    step_of(ours, batch())
    optimizer.step()
    ours.zero_grad()
    eager.load_state_dict(ours.state_dict())
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    fresh, other = twins(MLP)
    at_minimum(other, batch())
    step_of(other, batch())
    other.zero_grad()
    other.load_state_dict(eager.state_dict())
    fresh.load_state_dict(eager.state_dict())
    assert_same_step(step_of(fresh, batch()), step_of(other, batch()))


def test_assigning_a_state_dict_reaches_the_planned_step() -> None:
    eager, ours = twins(MLP)
    at_minimum(ours, batch())
    step_of(ours, batch())
    ours.zero_grad()
    torch.manual_seed(3)
    state = MLP().state_dict()
    for model in (eager, ours):
        model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


# Which forward runs.


def counted(model: nn.Module) -> list[bool]:
    """Notes each run of the original forward's Python code."""
    runs: list[bool] = []
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        runs.append(torch.is_grad_enabled())
        return inner(*args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]
    return runs


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_original_forward_runs(context: Callable[[], Any]) -> None:
    eager, ours = twins(MLP)
    runs = counted(ours)
    store_all(ours)
    eager(batch())
    ours(batch())
    traced = len(runs)
    for mode in (True, False):
        eager.train(mode)
        ours.train(mode)
        with context():
            torch.manual_seed(0)
            expected = eager(batch())
            torch.manual_seed(0)
            found = ours(batch())
        assert not found.requires_grad
        if not mode:
            assert torch.equal(expected, found)
    assert len(runs) == traced + 2


def test_in_eval_mode_the_original_forward_runs_and_differentiates() -> None:
    eager, ours = twins(MLP)
    runs = counted(ours)
    store_all(ours)
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    traced = len(runs)
    eager.eval()
    ours.eval()
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    assert len(runs) == traced + 1
    eager.train()
    ours.train()
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    assert len(runs) == traced + 1


def test_a_part_in_eval_mode_plans_again() -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    for frozen in (False, True, False):
        for model in (eager, ours):
            model.norm.train(not frozen)
        assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    assert len(plans_of(ours)) == 2


# Calls.


def test_keyword_arguments_constants_and_defaults_are_as_in_eager() -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    shift = torch.full((16,), 0.25)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((batch(),), {}),
        ((batch(), 0.5), {}),
        ((batch(),), {"scale": 2.0, "shift": shift}),
        ((), {"x": batch(), "shift": shift}),
    ]
    for args, kwargs in calls:
        assert_same_step(step_of(eager, *args, **kwargs), step_of(ours, *args, **kwargs))


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Answer:
    logits: Tensor
    note: str
    extra: Tensor | None = None


torch.utils._pytree.register_dataclass(Answer)


class Shaped(nn.Module):
    """Returns what `shape` makes of two values."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x))
        return self.shape(hidden, torch.sigmoid(self.second(hidden)))


@pytest.mark.parametrize(
    "shape",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, (b, {"deep": a * b})],
        lambda a, b: {"loss": b.sum(), "parts": [a, None], "name": "x", "count": 3},
        lambda a, b: Pair(a, b),
        lambda a, b: Answer(b, "fine"),
        lambda a, b: (None, a, None),
        lambda a, b: (a, a.argmax(1), b.detach() * 2),
    ],
    ids=["tuple", "nested", "dict", "namedtuple", "dataclass", "None", "not differentiable"],
)
def test_outputs_keep_their_structure(shape: Callable[[Tensor, Tensor], Any]) -> None:
    eager, ours = twins(lambda: Shaped(shape))
    at_minimum(ours, batch())
    expected, found = eager(batch()), ours(batch())
    assert torch.utils._pytree.tree_structure(expected) == torch.utils._pytree.tree_structure(found)
    assert type(expected) is type(found)
    for left, right in zip(tensors_in(expected), tensors_in(found), strict=True):
        assert left.requires_grad == right.requires_grad
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


def storages(output: Any) -> list[int]:
    """Which outputs share a storage: the same number for the same storage."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(leaf.untyped_storage().data_ptr(), len(numbers)) for leaf in tensors_in(output)]


@pytest.mark.parametrize(
    "shape",
    [
        lambda a, b: (b, b),
        lambda a, b: (b[:, :8], b[:, 8:]),
        lambda a, b: b.chunk(2, 1),
        lambda a, b: (b, b.view(4, 32)),
        lambda a, b: (b.t(), b.detach()),
        lambda a, b: (lambda whole: (whole.detach(), whole))((a * b).view(2, -1)),
        lambda a, b: (a, a[0], b),
        lambda a, b: b[1:3].transpose(0, 1),
        lambda a, b: b.unbind(0),
    ],
    ids=["twice", "halves", "chunk", "view", "detached", "detached view", "row", "transposed", "unbind"],
)
def test_outputs_that_alias_each_other_do_so_as_in_eager(shape: Callable[[Tensor, Tensor], Any]) -> None:
    eager, ours = twins(lambda: Shaped(shape))
    at_minimum(ours, batch())
    expected, found = eager(batch()), ours(batch())
    assert storages((expected,)) == storages((found,))
    for left, right in zip(tensors_in(expected), tensors_in(found), strict=True):
        assert (left.shape, left.stride(), left.storage_offset()) == (
            right.shape,
            right.stride(),
            right.storage_offset(),
        )
        assert left.requires_grad == right.requires_grad
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


class WithInput(nn.Module):
    """Returns its input, a view of it, or one of its parameters next to a result."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.what = what

    def forward(self, x: Tensor) -> Any:
        result = self.linear(x).tanh()
        other = {"input": x, "view": x[1:], "parameter": self.linear.bias, "weight view": self.linear.weight[0]}
        return result, other[self.what]


@pytest.mark.parametrize("what", ["input", "view", "parameter", "weight view"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_an_output_may_be_an_input_or_a_view_of_one(what: str, needs_grad: bool) -> None:
    eager, ours = twins(lambda: WithInput(what))
    at_minimum(ours, batch().requires_grad_(needs_grad))
    steps = []
    for model in (eager, ours):
        x = batch().requires_grad_(needs_grad)
        returned = model(x)[1]
        if what == "input":
            assert returned is x
        elif what == "view":
            assert returned._base is x
        elif what == "parameter":
            assert returned is model.linear.bias
        steps.append((step_of(model, x), x.grad))
    assert_same_step(steps[0][0], steps[1][0])
    assert same(steps[0][1], steps[1][1])


# Parameters and buffers.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.mix(self.embed(tokens)).relu()), tokens)


def test_tied_weights_get_the_sum_of_their_gradients() -> None:
    ours = check_steps(Tied, torch.arange(12))
    assert ours.head.weight is ours.embed.weight


def test_weights_untied_after_a_step_are_two() -> None:
    eager, ours = twins(Tied)
    store_all(ours)
    tokens = torch.arange(12)
    for model in (eager, ours):
        step_of(model, tokens)
        model.zero_grad()
        torch.manual_seed(5)
        model.head.weight = nn.Parameter(torch.randn(12, 16))
    assert_same_step(step_of(eager, tokens), step_of(ours, tokens))


def test_a_module_replaced_after_a_step_is_the_one_that_trains() -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    for model in (eager, ours):
        step_of(model, batch())
        model.zero_grad()
        torch.manual_seed(5)
        model.blocks[0] = nn.Linear(16, 16)
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


@pytest.mark.parametrize(
    "change",
    [lambda m: setattr(m.blocks[2], "p", 0.7), lambda m: setattr(m, "blocks", m.blocks[:6])],
    ids=["dropout rate", "fewer blocks"],
)
def test_an_attribute_changed_between_steps_has_its_effect(change: Callable[[Any], None]) -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    for model in (eager, ours):
        step_of(model, batch())
        model.zero_grad()
        change(model)
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


class Buffers(nn.Module):
    """A counter, a buffer read and then updated, and one updated and then read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("old", torch.ones(16))
        self.register_buffer("new", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = torch.tanh(self.linear(x) + self.old) * self.old.clone()
        self.old.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        self.new.lerp_(y.detach().amax(0), 0.5)
        return (y * self.new).sin()


def test_buffers_read_and_updated_in_either_order_are_as_in_eager() -> None:
    ours = check_steps(Buffers, batch(), steps=3)
    assert ours.calls.item() == 3


def test_batch_norm_is_updated_once_per_step() -> None:
    ours = check_steps(MLP, batch(), steps=3)
    assert ours.norm.num_batches_tracked.item() == 3


class Attribute(nn.Module):
    """Plain tensors as attributes: one constant, one that requires grad."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.constant = torch.linspace(0, 1, 16)
        self.free = torch.full((16,), 0.5, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.constant).tanh() * self.free


def test_plain_tensor_attributes_are_read_anew_at_each_step() -> None:
    eager, ours = twins(Attribute)
    store_all(ours)
    for turn in range(3):
        for model in (eager, ours):
            model.constant = torch.linspace(0, 1 + turn, 16)
        assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
        assert same(eager.free.grad, ours.free.grad)


class Listed(nn.Module):
    """Tensors that only a list holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.tables = [torch.linspace(0, 1, 16), torch.full((16,), 0.5, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.tables[0]).tanh() * self.tables[1]


def test_a_tensor_that_a_list_holds_is_never_silently_left_without_its_gradient() -> None:
    eager, ours = twins(Listed)
    step_of(eager, batch())
    try:
        step_of(store_all(ours), batch())
    except remat.CaptureError:
        return
    assert same(eager.tables[1].grad, ours.tables[1].grad)


def test_frozen_and_unused_parameters_keep_no_gradient() -> None:
    class Partly(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[0].requires_grad_(False)
            self.unused = nn.Linear(3, 3)

    ours = check_steps(Partly, batch())
    assert ours.blocks[0].weight.grad is None
    assert ours.unused.weight.grad is None


def test_requires_grad_toggled_between_steps_plans_again() -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    for needs_grad in (True, False, True):
        for model in (eager, ours):
            model.zero_grad()
            model.blocks[3].requires_grad_(needs_grad)
        assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    assert len(plans_of(ours)) == 2


def test_parametrized_weights_are_as_in_eager() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
            nn.Tanh(),
            nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
        )

    torch.manual_seed(1)
    eager = make()
    torch.manual_seed(1)
    ours = at_minimum(make(), batch())
    for _ in range(2):
        assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


def test_functional_call_swaps_parameters_as_in_eager() -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    results = []
    for model in (eager, ours):
        swapped = {name: (value.detach() * 1.5).requires_grad_() for name, value in model.named_parameters()}
        torch.manual_seed(0)
        total(torch.func.functional_call(model, swapped, (batch(),))).backward()
        results.append(swapped)
    for name, value in results[0].items():
        assert same(value.grad, results[1][name].grad)
        assert value.grad is not None


# Copies and files.


def test_a_deep_copy_trains_on_its_own() -> None:
    eager, ours = twins(MLP)
    at_minimum(ours, batch())
    step_of(ours, batch())
    step_of(eager, batch())
    for model in (eager, ours):
        model.zero_grad()
    duplicate = copy.deepcopy(ours)
    assert planner_of(duplicate).model is duplicate
    assert_same_step(step_of(eager, batch()), step_of(duplicate, batch()))
    assert all(parameter.grad is None for parameter in ours.parameters())
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    ours_step = step_of(ours, batch())
    eager.zero_grad()
    eager.load_state_dict(ours.state_dict())
    assert ours_step.gradients["blocks.0.weight"].abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("stepped", [False, True])
def test_a_whole_wrapped_model_is_saved_and_loaded(stepped: bool, tmp_path: Path) -> None:
    eager, ours = twins(MLP)
    remat.wrap(ours, activation_budget="100%")
    for model in (eager, ours) if stepped else ():
        step_of(model, batch())
        model.zero_grad()
    torch.save(ours, tmp_path / "model.pt")
    loaded = [
        torch.load(tmp_path / "model.pt", weights_only=False),
        pickle.loads(pickle.dumps(ours)),
        torch.load(io.BytesIO((tmp_path / "model.pt").read_bytes()), weights_only=False),
    ]
    expected = step_of(eager, batch())
    for model in loaded:
        assert type(model) is MLP
        assert planner_of(model).model is model
        assert_same_step(expected, step_of(model, batch()))
        assert len(plans_of(model)) == 1
        remat.unwrap(model)


# Hooks.


def test_hooks_on_the_outer_module_run_at_every_call() -> None:
    eager, ours = twins(MLP)
    at_minimum(ours, batch())
    seen: dict[nn.Module, list[str]] = {eager: [], ours: []}
    for model in (eager, ours):
        model.register_forward_pre_hook(lambda m, args: (seen[m].append("before"), (args[0] * 2,))[1])
        model.register_forward_hook(lambda m, args, out: (seen[m].append("after"), out * 3)[1])
        model.register_full_backward_hook(lambda m, gi, go: seen[m].append("backward"))
    for _ in range(2):
        assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    assert seen[ours] == seen[eager]
    assert len(seen[ours]) == 6


def test_hooks_on_parameters_run_at_every_step() -> None:
    eager, ours = twins(MLP)
    at_minimum(ours, batch())
    seen: list[nn.Module] = []
    for model in (eager, ours):
        weight = model.blocks[0].weight
        weight.register_hook(lambda gradient: gradient * 2)
        weight.register_post_accumulate_grad_hook(lambda p, m=model: seen.append(m))
    for _ in range(2):
        assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    assert seen == [eager, ours] * 2


def test_a_hook_of_an_inner_module_that_changes_values_does_so_in_every_step() -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    for turn in range(2):
        if turn == 1:
            for model in (eager, ours):
                model.blocks[3].register_forward_hook(lambda m, args, out: out * 2)
        assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


# Memory of the outputs.


class EndsInTanh(nn.Module):
    """The backward reads the output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


@pytest.mark.parametrize("retain", [None, True, False])
@pytest.mark.parametrize("make", [EndsInTanh, MLP, lambda: Shaped(lambda a, b: (a.t(), a, b[:, 1:]))])
def test_a_step_that_is_dropped_frees_everything(make: Callable[[], nn.Module], retain: bool | None) -> None:
    model = at_minimum(make(), batch())
    output = model(batch())
    if retain is not None:
        total(output).backward(retain_graph=retain)
    watched = [weakref.ref(leaf.untyped_storage()) for leaf in tensors_in((output,))]
    nodes = [weakref.ref(leaf) for leaf in tensors_in((output,))]
    del output
    gc.collect()
    assert [ref() for ref in nodes] == [None] * len(nodes)
    assert watched
