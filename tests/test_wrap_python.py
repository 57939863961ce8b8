"""What the Python of a forward does besides tensor operations: kept where a step can repeat it, else refused."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import rematerialize as remat
from tests.twins import assert_same_step, at_minimum, plans_of, step_of, store_all, twins

pytestmark = pytest.mark.usefixtures("quick_plans")


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.steps = 0
        self.mask: Any = None
        self.masks: dict[int, Tensor] = {}
        self.seen: list[Tensor] = []


def batch() -> Tensor:
    return torch.linspace(-2, 2, 128).reshape(8, 16).sin()


# What a step can repeat.


class CachesMask(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(16, 16).tril()
        return (self.linear(x) @ self.mask).tanh()


class CachesBySize(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.masks:
            self.masks[len(x)] = torch.ones(16, 16).tril()
        return (self.linear(x) @ self.masks[len(x)]).tanh()


class Collects(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.seen.append(y.detach())
        return y.tanh()


@pytest.mark.parametrize("kind", [CachesMask, CachesBySize, Collects])
def test_what_a_trace_leaves_on_the_module_is_taken_away(kind: Callable[[], nn.Module]) -> None:
    eager, ours = twins(kind)
    at_minimum(ours, batch())
    assert (ours.mask, ours.masks, ours.seen) == (None, {}, [])
    for turn in range(2):
        assert_same_step(step_of(eager, batch(), seed=turn), step_of(ours, batch(), seed=turn))
    copy.deepcopy(ours)


@pytest.mark.parametrize("kind", [CachesMask, CachesBySize])
def test_a_cache_filled_in_eval_mode_serves_training(kind: Callable[[], nn.Module]) -> None:
    eager, ours = twins(kind)
    store_all(ours)
    for training in (True, False, True, True):
        for model in (eager, ours):
            model.train(training)
        assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    assert len(plans_of(ours)) <= 2


class WithoutGradient(Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.linear.weight.abs().mean()
        return self.linear(x) * scale


class PartlyHalf(Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float().tanh()


class TensorHook(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
        return y.tanh()


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x


class OwnFunction(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Doubled.apply(self.linear(x)).tanh()


class Checkpointed(Linear):
    def forward(self, x: Tensor) -> Tensor:
        def block(z: Tensor) -> Tensor:
            return F.dropout(self.linear(z), 0.3).tanh()

        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)


class FromNumpy(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.from_numpy(np.ones(16, dtype=np.float32))


@pytest.mark.parametrize("kind", [WithoutGradient, PartlyHalf, TensorHook, OwnFunction, Checkpointed, FromNumpy])
def test_modes_hooks_and_functions_inside_a_forward_are_part_of_the_step(kind: Callable[[], nn.Module]) -> None:
    eager, ours = twins(kind)
    at_minimum(ours, batch())
    for turn in range(2):
        assert_same_step(step_of(eager, batch(), seed=turn), step_of(ours, batch(), seed=turn))


def _pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5)


@pytest.mark.parametrize(
    "reparametrize",
    [
        lambda: nn.utils.weight_norm(nn.Linear(16, 16)),
        lambda: nn.utils.spectral_norm(nn.Linear(16, 16)),
        _pruned,
    ],
    ids=["weight norm", "spectral norm", "pruning"],
)
def test_weights_that_a_hook_computes_before_each_forward_are_as_in_eager(
    reparametrize: Callable[[], nn.Module],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(1)
        eager = nn.Sequential(reparametrize(), nn.Tanh())
        torch.manual_seed(1)
        ours = at_minimum(nn.Sequential(reparametrize(), nn.Tanh()), batch())
    for turn in range(2):
        assert_same_step(step_of(eager, batch(), seed=turn), step_of(ours, batch(), seed=turn))


# What it can't repeat.


class Counts(Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.linear(x) * self.steps


class LeavesLoss(Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.loss = self.linear(x).sum()
        return self.linear(x)


class PythonRandom(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * random.random()


class NumpyRandom(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float(np.random.rand())


class SparseGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.abs().long()).sum()


class Replaces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("average", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        self.average = self.average * 0.9
        return self.linear(x) * self.average


REFUSED = [Counts, LeavesLoss, PythonRandom, NumpyRandom, SparseGradient, Replaces]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_step_cannot_repeat_is_refused_and_changes_nothing(kind: Callable[[], nn.Module]) -> None:
    eager, ours = twins(kind)
    random.seed(0)
    np.random.seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    attributes = set(vars(ours))
    store_all(ours)
    with pytest.raises(remat.CaptureError) as caught:
        ours(batch())
    assert "\n" not in str(caught.value)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # type: ignore[index, union-attr]
    remat.unwrap(ours)
    assert set(vars(ours)) == attributes
    random.seed(0)
    np.random.seed(0)
    expected = step_of(eager, batch())
    random.seed(0)
    np.random.seed(0)
    found = step_of(ours, batch())
    assert all(torch.equal(a, b) for a, b in zip(expected.outputs, found.outputs, strict=True))


@functools.lru_cache(maxsize=4)
def shared_mask(width: int) -> Tensor:
    return torch.ones(width, width).tril()


class CachesGlobally(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) @ shared_mask(16)).tanh()


def test_a_cache_outside_of_the_module_is_not_left_with_a_tensor_of_the_trace() -> None:
    shared_mask.cache_clear()
    eager, ours = twins(CachesGlobally)
    store_all(ours)
    try:
        found = step_of(ours, batch())
    except remat.CaptureError:
        found = None  # refusing is fine, breaking the eager model is not
    try:
        expected = step_of(eager, batch())
    finally:
        shared_mask.cache_clear()
    if found is not None:
        assert_same_step(expected, found)


class SetsItsWindow(Linear):
    """As Swin does: an attribute clamped to the input's size, at every call to the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.window = 1000

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] <= self.window:
            self.window = x.shape[0]
        return (self.linear(x) * self.window).tanh()


def test_an_attribute_that_every_call_sets_to_the_same_value_is_no_counter() -> None:
    eager, ours = twins(SetsItsWindow)
    store_all(ours)
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
