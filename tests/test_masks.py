"""Masks as bytes: the same numbers as eager's, in a quarter of the memory, planned where they are worth it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rematerialize as remat
from rematerialize.api import choose
from rematerialize.budget import read_budget
from rematerialize.capture import Kernel, KernelCost
from rematerialize.capture.masks import draw_bytes
from rematerialize.device_table import DEVICES
from rematerialize.measure import CostModel
from rematerialize.prepare import PreparedStep, PrepareOptions, bind_inputs, byte_masks, matching_variant, prepare
from rematerialize.solve import Planner
from tests.twins import assert_same_step, run_by, step_of, twins

pytestmark = pytest.mark.usefixtures("quick_plans")

Mask = Callable[[Tensor, torch.Generator], Tensor]


class Dropping(nn.Module):
    """Two layers with a mask each, and what is done to a mask in between."""

    def __init__(self, mask: Mask, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, dtype=dtype), nn.Linear(64, 64, dtype=dtype)
        self.mask, self.own = mask, torch.Generator()

    def forward(self, x: Tensor) -> Any:
        for layer in (self.first, self.second):
            x = layer(x).tanh()
            x = (x * self.mask(x, self.own)).sin()
        return x


def dropping(x: Tensor, _: torch.Generator) -> Tensor:
    return F.dropout(torch.ones_like(x), 0.3)


def channels_last(x: Tensor, _: torch.Generator) -> Tensor:
    image = x.reshape(4, 8, 8, 64).to(memory_format=torch.channels_last)
    return F.dropout(torch.ones_like(image), 0.4).reshape(x.shape)


def with_a_generator(x: Tensor, own: torch.Generator) -> Tensor:
    return torch.empty_like(x).bernoulli_(0.7, generator=own)


def transposed(x: Tensor, _: torch.Generator) -> Tensor:
    return torch.empty_like(x.T).bernoulli_(0.7).T


def evens(x: Tensor, _: torch.Generator) -> Tensor:
    return torch.zeros_like(x).bernoulli_()


def with_holes(x: Tensor, _: torch.Generator) -> Tensor:
    """A mask in a layout that no cast would keep."""
    return torch.empty_strided((256, 64), (128, 2), dtype=x.dtype).bernoulli_(0.7)


MASKS: dict[str, tuple[Mask, torch.dtype]] = {
    "dropout": (dropping, torch.float32),
    "bfloat16": (dropping, torch.bfloat16),
    "float64": (dropping, torch.float64),
    "channels last": (channels_last, torch.float32),
    "a generator of its own": (with_a_generator, torch.float32),
    "transposed": (transposed, torch.float32),
    "of even odds": (evens, torch.float32),
}


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-2, 2, 256 * 64).sin().reshape(256, 64).to(dtype)


def prepared(model: nn.Module, *inputs: Any) -> PreparedStep:
    return prepare(model, model.forward, bind_inputs(model.forward, inputs))


def with_given_costs(step: PreparedStep) -> PreparedStep:
    """A draw takes twenty times as long as any other op: which plan is faster doesn't depend on a clock then."""
    drawing = ("bernoulli", "draw_bytes")
    ops = [replace(op, time_s=20e-6 if any(name in op.target for name in drawing) else 1e-6) for op in step.graph.ops]
    graph = replace(step.graph, ops=tuple(ops))
    return replace(step, graph=graph, planner=Planner(graph))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("share", [0, 50])
def test_masks_as_bytes_are_eagers_bit_for_bit(kind: str, share: int) -> None:
    mask, dtype = MASKS[kind]
    eager, ours = twins(lambda: Dropping(mask, dtype))
    x = rows(dtype)
    masked = byte_masks(prepared(ours, x), PrepareOptions())
    assert sum("draw_bytes" in op.target for op in masked.graph.ops) == 2
    assert not any("bernoulli" in op.target for op in masked.graph.ops)
    low, high = masked.planner.minimum(), masked.planner.store_all().peak_bytes
    run_by(ours, masked.build(masked.planner.solve(low + (high - low) * share // 100)))
    for turn in range(2):
        for model in (eager, ours):
            model.own.manual_seed(turn)
        assert_same_step(step_of(eager, x, seed=turn), step_of(ours, x, seed=turn))
        assert torch.equal(eager.own.get_state(), ours.own.get_state())


def test_a_mask_with_holes_stays_as_it_is() -> None:
    eager, ours = twins(lambda: Dropping(with_holes))
    masked = byte_masks(prepared(ours, rows()), PrepareOptions())
    assert not any("draw_bytes" in op.target for op in masked.graph.ops)
    run_by(ours, masked.build(masked.planner.solve(masked.planner.minimum())))
    assert_same_step(step_of(eager, rows()), step_of(ours, rows()))


def test_a_mask_that_nobody_reads_is_drawn_for_the_generators_state() -> None:
    class Wasting(Dropping):
        def forward(self, x: Tensor) -> Any:
            self.mask(x, self.own)
            return self.second(self.mask(x, self.own) * self.first(x)).sin()

    eager, ours = twins(lambda: Wasting(dropping))
    step = prepared(ours, rows())
    assert step.masked is not None
    masked = byte_masks(step, PrepareOptions())
    assert sum("draw_bytes" in op.target for op in masked.graph.ops) == 1
    run_by(ours, masked.build(masked.planner.solve(masked.planner.minimum())))
    assert_same_step(step_of(eager, rows()), step_of(ours, rows()))


def test_an_output_that_is_a_mask_is_eagers() -> None:
    class Telling(Dropping):
        def forward(self, x: Tensor) -> Any:
            mask = self.mask(x, self.own)
            return self.second(self.first(x) * mask).tanh(), mask, mask[1:].T

    eager, ours = twins(lambda: Telling(dropping))
    masked = byte_masks(prepared(ours, rows()), PrepareOptions())
    run_by(ours, masked.build(masked.planner.solve(masked.planner.minimum())))
    assert_same_step(step_of(eager, rows()), step_of(ours, rows()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stride", [(1000, 1), (1, 300)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("direct", [False, True])
def test_bytes_are_drawn_as_numbers_are(
    dtype: torch.dtype, stride: tuple[int, int], threads: int, direct: bool
) -> None:
    torch.set_num_threads(threads)  # the fixture puts it back
    shape = (300, 1000)
    for p in (0.1, 0.5, 0.97):
        torch.manual_seed(3)
        numbers = torch.empty_strided(shape, stride, dtype=dtype).bernoulli_(p)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        drawn = draw_bytes(shape, stride, p, dtype=dtype, device=torch.device("cpu"), direct=direct)
        assert drawn.dtype == torch.uint8
        assert drawn.stride() == stride
        assert torch.equal(drawn.to(dtype), numbers)
        assert torch.equal(torch.get_rng_state(), after)


class Block(nn.Module):
    """Wide masks beside narrow products: drawing is most of what a recomputation takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = F.dropout(layer(x).tanh(), 0.2)
        return x


def test_a_plan_within_a_budget_keeps_bytes_where_that_is_faster(tmp_path: Path) -> None:
    eager, ours = twins(Block)
    x = torch.linspace(-2, 2, 4096 * 16).sin().reshape(4096, 16)
    whole = prepared(ours, x)
    assert whole.masked is not None
    whole = replace(with_given_costs(whole), masked=with_given_costs(whole.masked))
    assert whole.masked is not None
    assert matching_variant(whole, whole.masked.graph) is whole.masked
    budgets = [whole.planner.store_all().peak_bytes * share // 100 for share in (90, 70, 50, 40)]
    found = [whole.solve(budget) for budget in budgets]
    assert all(schedule.peak_bytes <= budget for (_, schedule), budget in zip(found, budgets, strict=True))
    times = [schedule.time_s for _, schedule in found]
    assert times == sorted(times)
    assert whole.masked in [variant for variant, _ in found]
    assert all(
        schedule.time_s <= whole.planner.solve(b).time_s for (_, schedule), b in zip(found, budgets, strict=True)
    )
    plan = choose(ours, whole, read_budget(None, budgets[-1]))
    plan.save(tmp_path / "plan.json")
    remat.wrap(ours, plan=remat.Plan.load(tmp_path / "plan.json"))
    for turn in range(2):
        assert_same_step(step_of(eager, x, seed=turn), step_of(ours, x, seed=turn))


class Noisy(CostModel):
    """A mask that was drawn at once took long: something else ran meanwhile."""

    def __call__(self, kernels: Iterable[Kernel], tell: Any = None) -> dict[str, KernelCost]:
        return {
            kernel.name: KernelCost(1e-2 if "bernoulli" in str(kernel.calls[1:]) else 1e-6)
            for kernel in kernels
            if kernel.calls
        }


def test_noise_of_costs_makes_no_step_faster_than_storing_everything() -> None:
    torch.manual_seed(1)
    model, x = Block(), torch.randn(4096, 16)
    options = PrepareOptions(costs=Noisy())
    whole = prepare(model, model.forward, bind_inputs(model.forward, (x,)), options)
    stored = whole.planner.store_all()
    assert stored.time_s > 5e-2
    assert whole.masked is not None
    assert whole.masked.planner.store_all().time_s >= stored.time_s
    variant, schedule = whole.solve(stored.peak_bytes)
    assert variant is whole
    assert len(schedule.forward) + len(schedule.backward) == len(whole.graph.ops)


def test_small_masks_are_not_planned_twice() -> None:
    class Paths(Block):
        def forward(self, x: Tensor) -> Any:
            for layer in self.layers:
                x = layer(x).tanh() * torch.empty(len(x), 1).bernoulli_(0.8)
            return x

    torch.manual_seed(1)
    assert prepared(Paths(), torch.randn(64, 16)).masked is None


def test_by_formula_bytes_take_no_less_time_than_masks_where_everything_fits() -> None:
    torch.manual_seed(1)
    model, x = Block(), torch.randn(4096, 16)
    options = PrepareOptions(device=DEVICES["2-core CPU"])
    whole = prepare(model, model.forward, bind_inputs(model.forward, (x,)), options)
    assert whole.masked is not None
    assert whole.masked.planner.store_all().time_s > whole.planner.store_all().time_s


def filled(x: Tensor, _: torch.Generator) -> Tensor:
    return torch.empty_like(x).bernoulli_(0.7)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_masks_as_bytes_on_the_gpu_are_eagers_bit_for_bit(dtype: torch.dtype) -> None:
    eager, ours = (model.to("cuda") for model in twins(lambda: Dropping(filled, dtype)))
    x = rows(dtype).to("cuda")
    masked = byte_masks(prepared(ours, x), PrepareOptions())
    assert sum("draw_bytes" in op.target for op in masked.graph.ops) == 2
    run_by(ours, masked.build(masked.planner.solve(masked.planner.minimum())))
    for turn in range(2):
        assert_same_step(step_of(eager, x, seed=turn), step_of(ours, x, seed=turn))
