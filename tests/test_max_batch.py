"""``max_batch``: the answer fits, and the next batch doesn't."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rematerialize as remat
import rematerialize.batches
from rematerialize.analytic import on_fake_tensors
from rematerialize.errors import RematerializeError, ScheduleError, UnitError
from rematerialize.targets.inputs import resized

pytestmark = pytest.mark.usefixtures("quick_plans")

WIDTH = 64


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[part for _ in range(3) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())])


def inputs(batch: int = 8) -> tuple[Tensor]:
    return (torch.randn(batch, WIDTH),)


def test_the_answer_fits_and_one_more_does_not() -> None:
    net = model()
    budget = 2**20
    found = remat.max_batch(net, inputs(), budget=budget)
    assert found.budget_bytes == budget
    assert 8 < found.without < found.with_plan
    fits = remat.plan(net, resized(inputs(), found.with_plan, 0), budget=budget)
    assert fits.peak_bytes + fits.resident_bytes <= budget
    with pytest.raises(remat.BudgetError):
        remat.plan(net, resized(inputs(), found.with_plan + 1, 0), budget=budget)
    needs = {need.batch: need for need in found.tried}
    assert needs[found.without].store_all_bytes <= budget < needs[found.without + 1].store_all_bytes
    # One real step confirms it.
    assert found.confirmed_peak_bytes is not None
    assert 0.9 * budget < found.confirmed_peak_bytes <= budget
    assert found.overhead is not None
    assert found.overhead > 0
    assert "forward" not in vars(net)


def test_of_the_batches_that_are_tried_few_are_searched_the_answer_and_the_next_among_them() -> None:
    found = remat.max_batch(model(), inputs(), budget=2**20, confirm=False)
    searched = {need.batch for need in found.tried if need.searched}
    assert searched >= {found.with_plan, found.with_plan + 1}
    assert len(searched) <= 5  # the first, for which there is nothing to replay; a bound that was far off
    assert len(searched) < len(found.tried) < 16
    needs = {need.batch: need for need in found.tried}
    for batch in (found.with_plan, found.with_plan + 1):
        least = remat.plan(model(), resized(inputs(), batch, 0), activation_budget="100%", device="2-core CPU")
        assert needs[batch].minimum_bytes == least.minimum_bytes + least.resident_bytes


def test_a_plan_of_another_batch_that_does_not_run_at_this_one_is_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_ops(*_: object) -> None:
        raise ScheduleError("unknown op")

    usual = remat.max_batch(model(), inputs(), budget=2**19, confirm=False)
    monkeypatch.setattr(rematerialize.batches, "simulate", other_ops)
    found = remat.max_batch(model(), inputs(), budget=2**19, confirm=False)
    assert (found.without, found.with_plan) == (usual.without, usual.with_plan)
    assert all(need.searched for need in found.tried)


def test_an_optimizer_and_a_reserve_leave_less() -> None:
    net = nn.Linear(WIDTH, WIDTH)
    bare = remat.max_batch(net, inputs(), budget="256KiB", confirm=False)
    less = remat.max_batch(net, inputs(), budget="256KiB", optimizer="adamw", reserve="64KiB", confirm=False)
    assert less.with_plan < bare.with_plan


def test_a_batch_that_recomputes_little_lies_between() -> None:
    net, budget = model(), 2**20
    found = remat.max_batch(net, inputs(), budget=budget, confirm=False, max_overhead="20%")
    assert found.within_overhead is not None
    assert found.without < found.within_overhead < found.with_plan
    # At its own costs: measured, where the search ran on computed ones.
    costs = "2-core CPU"
    overheads = [
        remat.plan(net, resized(inputs(), found.within_overhead + more, 0), budget=budget, device=costs).overhead
        for more in (0, 1)
    ]
    assert overheads[0] <= 0.2 < overheads[1]
    assert "recomputing at most 20.0%" in str(found)
    with pytest.raises(UnitError, match="25%"):
        remat.max_batch(net, inputs(), budget=budget, max_overhead="much")


def test_where_not_even_one_fits_the_answer_is_none() -> None:
    found = remat.max_batch(model(), inputs(), budget="16KiB")
    assert (found.without, found.with_plan, found.confirmed_peak_bytes) == (0, 0, None)


def test_the_batch_may_be_another_dimension() -> None:
    found = remat.max_batch(nn.Linear(8, 16), (torch.randn(5, 2, 8),), activation_budget="64KiB", batch_dim=1)
    assert found.with_plan >= found.without > 2


def test_a_share_of_store_all_is_no_budget_for_a_batch() -> None:
    with pytest.raises(RematerializeError, match="grows with the batch"):
        remat.max_batch(model(), inputs(), activation_budget="50%")


def test_a_device_that_is_not_here_is_searched_without_running_anything() -> None:
    net, x = on_fake_tensors(lambda: (nn.Sequential(nn.Linear(4096, 4096), nn.GELU()), (torch.randn(8, 4096),)))
    found = remat.max_batch(net, x, budget="1%", device="NVIDIA H100 80GB")
    assert found.budget_bytes == 8 * 10**8
    assert found.confirmed_peak_bytes is None
    assert found.without > 5_000
    assert "computed" in str(found)


@pytest.mark.slow
def test_what_fits_without_a_plan_is_eagers_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def a_tenth_more(model: nn.Module, example_inputs: Any) -> int:
        taken.append(example_inputs[0].shape[0])
        if taken[-1] > 60:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return 10_000 * taken[-1] + 7

    monkeypatch.setattr(rematerialize.batches, "eager_peak", a_tenth_more)
    for budget in (390_006, 390_007, 700_000):
        taken.clear()
        found = remat.max_batch(model(), inputs(), activation_budget=budget)
        assert found.without == min((budget - 7) // 10_000, 60)
        ran = {step.batch: step.peak_bytes for step in found.eager}
        assert found.without + 1 in ran
        assert found.without in ran
        assert len(taken) < 12
    assert ran[61] is None
    assert re.search("61 takes +more than there is", str(found))
    assert "(computed)" not in str(found)


def test_an_eager_step_that_holds_more_than_the_captured_one_decides() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 17, 3, padding=1), nn.BatchNorm2d(17), nn.ReLU(), nn.Conv2d(17, 17, 3, stride=2))
    x, budget = torch.randn(2, 3, 31, 31), 2 * 2**20
    found = remat.max_batch(net, (x,), activation_budget=budget)
    peaks = [rematerialize.batches.eager_peak(net, resized((x,), found.without + more, 0)) for more in (0, 1)]
    assert peaks[0] <= budget < peaks[1]
    unconfirmed = remat.max_batch(net, (x,), activation_budget=budget, confirm=False)
    assert unconfirmed.eager == ()
    assert "everything stored (computed)" in str(unconfirmed)
