"""Which plan a wrapped model runs: signatures, the cache, budgets in both scopes, plans from files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rematerialize as remat
from rematerialize import api as api_module
from rematerialize import prepare as prepare_module
from rematerialize.solve import Planner
from tests.twins import assert_same_step, plans_of, step_of, store_all, twins

pytestmark = pytest.mark.usefixtures("quick_plans")


class MLP(nn.Module):
    """Four blocks with dropout and a batch norm; ends in the loss."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.blocks = nn.Sequential(
            *(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.norm(x)).sum()


# 4 x (32 x 32 + 32) weights and biases, 2 x 32 of the norm, float32.
PARAMETER_BYTES = (4 * (32 * 32 + 32) + 2 * 32) * 4
# Running mean and variance, float32, and the count of batches, int64.
BUFFER_BYTES = 2 * 32 * 4 + 8
INPUT_BYTES = 256 * 32 * 4
RESIDENT_BYTES = PARAMETER_BYTES + BUFFER_BYTES + INPUT_BYTES
MIB = 2**20


def batch(rows: int = 256) -> Tensor:
    return torch.linspace(-2, 2, rows * 32).reshape(rows, 32).sin()


# Signatures and the cache of plans.


def test_a_new_signature_plans_again_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    with caplog.at_level(logging.INFO, logger="rematerialize"):
        for rows in (64, 64, 10, 64, 10):  # the last batch of an epoch is smaller
            assert_same_step(step_of(eager, batch(rows)), step_of(ours, batch(rows)))
    planned = [record for record in caplog.records if "planned a training step" in record.getMessage()]
    assert len(planned) == len(plans_of(ours)) == 2
    assert all(record.levelno == logging.INFO for record in planned)
    assert [plan.resident_bytes for plan in plans_of(ours)] == sorted(
        RESIDENT_BYTES - INPUT_BYTES + rows * 32 * 4 + gradients for rows, gradients in ((64, 0), (10, PARAMETER_BYTES))
    )


def test_a_wrapped_model_tells_its_plans_in_order_of_use_and_another_is_refused() -> None:
    ours = remat.wrap(MLP(), activation_budget="100%")
    assert remat.plans_of(ours) == ()
    for rows in (64, 10, 64):
        ours(batch(rows)).backward()
    small, large = remat.plans_of(ours)
    assert small.store_all_peak_bytes < large.store_all_peak_bytes
    for bare in (MLP(), remat.unwrap(ours), None):
        with pytest.raises(remat.RematerializeError, match="not wrapped, so it has no plans"):
            remat.plans_of(bare)  # type: ignore[arg-type]


def test_a_non_contiguous_input_has_a_plan_of_its_own() -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    wide = batch().repeat(1, 2)[:, ::2]
    for x in (batch(), wide, wide.contiguous()):
        assert_same_step(step_of(eager, x), step_of(ours, x))
    assert len(plans_of(ours)) == 2


def test_the_cache_keeps_at_most_max_plans_and_drops_the_least_recently_used() -> None:
    ours = remat.wrap(MLP(), activation_budget="100%", max_plans=2)
    for rows in (4, 5, 4, 6):
        ours(batch(rows)).backward()
    kept = plans_of(ours)
    assert len(kept) == 2
    for rows in (4, 6):
        ours(batch(rows)).backward()
    assert all(a is b for a, b in zip(plans_of(ours), kept, strict=True))
    ours(batch(5)).backward()
    assert len(plans_of(ours)) == 2
    assert plans_of(ours)[0] is kept[1]


def test_example_inputs_plan_at_once_for_the_call_that_follows() -> None:
    for example in ((batch(),), {"x": batch()}):
        ours = remat.wrap(MLP(), activation_budget="100%", example_inputs=example)
        (plan,) = plans_of(ours)
        step_of(ours, **example) if isinstance(example, dict) else step_of(ours, *example)
        assert plans_of(ours) == [plan]


def test_a_signature_that_does_not_fit_is_refused_and_others_still_train() -> None:
    small = remat.plan(MLP(), (batch(8),), activation_budget="100%")
    ours = remat.wrap(MLP(), activation_budget=small.store_all_peak_bytes)
    ours(batch(8)).backward()
    with pytest.raises(remat.BudgetError) as caught:
        ours(batch(65536))
    assert caught.value.minimum_bytes > small.budget_bytes
    ours(batch(8)).backward()
    assert len(plans_of(ours)) == 1


def test_a_smaller_last_batch_may_use_what_a_share_gave_to_those_before_it() -> None:
    eager, ours = twins(Perceptron)
    remat.wrap(ours, activation_budget="60%")
    for rows in (256, 256, 6):  # alone, 6 rows need more than 60% of their own store-all: gradients don't shrink
        assert_same_step(step_of(eager, batch(rows)), step_of(ours, batch(rows)))
    large, small = plans_of(ours)
    assert small.store_all_peak_bytes * 6 // 10 < small.minimum_bytes <= small.budget_bytes == large.budget_bytes
    assert small.recomputed == 0 < large.recomputed


class Perceptron(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.GELU(), nn.Tanh())))


def test_where_everything_fits_nothing_is_searched_until_the_minimum_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = remat.wrap(MLP(), budget="1GiB")
    with monkeypatch.context() as patched:
        patched.setattr(Planner, "_search", lambda self: pytest.fail("a search"))
        ours(batch()).backward()
    (plan,) = plans_of(ours)
    assert plan.recomputed == 0
    assert plan.minimum_bytes == planned(activation_budget="100%").minimum_bytes < plan.peak_bytes


# Budgets. `budget` is everything on the device, `activation_budget` what the step adds.


def planned(**options: Any) -> remat.Plan:
    torch.manual_seed(0)
    return remat.plan(MLP(), (batch(),), **options)


@pytest.fixture
def minimum() -> int:
    return planned(activation_budget="100%").minimum_bytes


def test_parameters_buffers_and_inputs_are_resident_to_the_byte() -> None:
    assert planned(activation_budget="100%").resident_bytes == RESIDENT_BYTES


def test_gradients_that_exist_are_resident() -> None:
    model = MLP()
    model(batch()).backward()
    plan = remat.plan(model, (batch(),), activation_budget="100%")
    assert plan.resident_bytes == RESIDENT_BYTES + PARAMETER_BYTES


def test_tied_and_shared_storages_are_resident_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.second(self.first(x)).sum() + y.sum()

    x = batch()
    assert remat.plan(Shared(), (x, x[1:]), activation_budget="100%").resident_bytes == 4096 + INPUT_BYTES


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({}, 0),
        ({"reserve": 1000}, 1000),
        ({"reserve": "1KiB"}, 1024),
        # AdamW: two moments, and a float32 step count per parameter (4 x 2 + 2 of them).
        ({"optimizer": "adamw"}, 2 * PARAMETER_BYTES + 10 * 4),
        ({"optimizer": "AdamW", "reserve": "1KiB"}, 2 * PARAMETER_BYTES + 10 * 4 + 1024),
        ({"optimizer": "sgd"}, 0),
    ],
    ids=str,
)
def test_a_budget_is_the_activation_budget_plus_all_that_is_held(options: dict[str, Any], held: int) -> None:
    plan = planned(budget=MIB, **options)
    assert plan.budget_bytes == MIB - RESIDENT_BYTES - held
    assert plan.peak_bytes <= plan.budget_bytes


@pytest.mark.parametrize(
    ("make", "per_parameter"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), PARAMETER_BYTES),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 3 * PARAMETER_BYTES + 10 * 4),
    ],
    ids=["momentum", "plain", "amsgrad"],
)
def test_an_optimizer_counts_the_same_before_and_after_its_first_step(
    make: Callable[[Any], torch.optim.Optimizer], per_parameter: int
) -> None:
    model = MLP()
    optimizer = make(model.parameters())
    before = remat.plan(model, (batch(),), budget=MIB, optimizer=optimizer)
    assert not optimizer.state
    model(batch()).backward()
    optimizer.step()
    optimizer.zero_grad()
    after = remat.plan(model, (batch(),), budget=MIB, optimizer=optimizer)
    assert before.budget_bytes == after.budget_bytes == MIB - RESIDENT_BYTES - per_parameter


@pytest.mark.parametrize("besides", [{}, {"reserve": 4096}, {"optimizer": "adamw"}], ids=str)
def test_the_minimum_of_a_budget_works_and_one_byte_less_does_not(besides: dict[str, Any], minimum: int) -> None:
    with pytest.raises(remat.BudgetError) as caught:
        planned(budget=RESIDENT_BYTES + 1, **besides)
    needed = caught.value.minimum_bytes
    assert planned(budget=needed, **besides).budget_bytes == minimum
    with pytest.raises(remat.BudgetError) as again:
        planned(budget=needed - 1, **besides)
    assert again.value.minimum_bytes == needed


def test_the_minimum_of_an_activation_budget_works_and_one_byte_less_does_not(minimum: int) -> None:
    assert planned(activation_budget=minimum).budget_bytes == minimum
    with pytest.raises(remat.BudgetError) as caught:
        planned(activation_budget=minimum - 1)
    assert caught.value.minimum_bytes == minimum


def test_a_wrapped_model_refuses_in_the_scope_of_its_budget(minimum: int) -> None:
    ours = remat.wrap(MLP(), budget=RESIDENT_BYTES + minimum - 1)
    with pytest.raises(remat.BudgetError) as caught:
        ours(batch())
    assert caught.value.minimum_bytes == RESIDENT_BYTES + minimum


def test_shares_round_down() -> None:
    full = planned(activation_budget="100%")
    plan = planned(activation_budget="77%")
    assert plan.budget_bytes == full.store_all_peak_bytes * 77 // 100
    assert full.budget_bytes == full.store_all_peak_bytes == full.peak_bytes


def test_a_share_of_the_device_and_auto_are_in_the_budget_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "device_bytes", lambda device: 2 * MIB)
    monkeypatch.setattr(api_module, "free_bytes", lambda device: MIB)
    assert planned(budget="50%").budget_bytes == MIB - RESIDENT_BYTES
    assert planned(budget="auto").budget_bytes == MIB
    assert planned(budget="auto", reserve=1000).budget_bytes == MIB - 1000


def test_gradients_left_to_accumulate_count_under_a_budget(minimum: int) -> None:
    """The second micro-batch finds the first one's gradients in memory: they must fit as well."""
    ours = remat.wrap(MLP(), budget=RESIDENT_BYTES + minimum)
    ours(batch()).backward()
    with pytest.raises(remat.BudgetError) as caught:
        ours(batch())
    assert caught.value.minimum_bytes == RESIDENT_BYTES + minimum + PARAMETER_BYTES
    for parameter in ours.parameters():
        parameter.grad = None
    ours(batch()).backward()


def test_accumulation_does_not_plan_again_under_an_activation_budget() -> None:
    ours = remat.wrap(MLP(), activation_budget="100%")
    for _ in range(3):
        ours(batch()).backward()
    assert len(plans_of(ours)) == 1


# The curve, and plans that were made before.


def test_the_frontier_falls_in_budget_and_rises_in_overhead() -> None:
    plans = remat.frontier(MLP(), (batch(),), points=6)
    assert 2 <= len(plans) <= 6
    budgets = [plan.budget_bytes for plan in plans]
    assert budgets == sorted(set(budgets), reverse=True)
    assert [plan.overhead for plan in plans] == sorted(plan.overhead for plan in plans)
    assert all(plan.minimum_bytes <= plan.peak_bytes <= plan.budget_bytes for plan in plans)
    assert plans[0].overhead == 0
    assert plans[-1].budget_bytes == plans[-1].minimum_bytes


def test_a_plan_from_a_file_is_the_plan_that_runs(tmp_path: Path) -> None:
    eager, ours = twins(MLP)
    full = remat.plan(ours, (batch(),), activation_budget="100%")
    made = remat.plan(ours, (batch(),), activation_budget=full.minimum_bytes)
    made.save(tmp_path / "plan.json")
    loaded = remat.Plan.load(tmp_path / "plan.json")
    assert loaded.schedule.forward == made.schedule.forward
    assert loaded.schedule.backward == made.schedule.backward
    assert str(loaded) == str(made)
    remat.wrap(ours, plan=loaded)
    for turn in range(2):
        assert_same_step(step_of(eager, batch(), seed=turn), step_of(ours, batch(), seed=turn))
    assert plans_of(ours) == [loaded]


def test_a_plan_refuses_a_signature_that_it_was_not_made_for() -> None:
    model = MLP()
    ours = remat.wrap(model, plan=remat.plan(model, (batch(),), activation_budget="100%"))
    with pytest.raises(remat.PlanMismatchError):
        ours(batch(16))
    ours(batch()).backward()


def test_a_plan_file_that_claims_too_low_a_peak_is_refused(tmp_path: Path) -> None:
    made = planned(activation_budget="100%")
    data = made.to_dict()
    data["schedule"]["peak_bytes"] -= 1
    (tmp_path / "plan.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(remat.RematerializeError, match="make a new plan"):
        remat.Plan.load(tmp_path / "plan.json")


def test_planning_twice_gives_the_same_schedule() -> None:
    model = MLP()
    full = remat.plan(model, (batch(),), activation_budget="100%")
    again = remat.plan(model, (batch(),), activation_budget="100%")
    assert (full.graph, full.schedule) == (again.graph, again.schedule)
