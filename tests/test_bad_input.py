"""Bad input gives one clear error that says what to do, and changes nothing."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rematerialize as remat

pytestmark = pytest.mark.usefixtures("quick_plans")


class MLP(nn.Module):
    """Eight blocks, a buffer and dropout; ends in the loss."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.layers = nn.Sequential(
            *(layer for _ in range(8) for layer in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.norm(x)).sum()


class Raises(MLP):
    def forward(self, x: Tensor) -> Tensor:
        raise LookupError("the forward's own words")


class Branches(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y > 0:
            return y
        return y * y


class Chooses(MLP):
    def forward(self, x: Tensor) -> Tensor:
        chosen = x[x.sum(dim=1) > 0]
        return super().forward(chosen)


class Detached(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class NoTensor(MLP):
    def forward(self, x: Tensor) -> Any:
        super().forward(x)
        return {"loss": 3.0}


def frozen() -> nn.Module:
    return MLP().requires_grad_(False)


def inputs(width: int = 32) -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 1, 64 * width).reshape(64, width),)


def photograph(model: nn.Module) -> Callable[[], None]:
    """Return a check that nothing about the model or the process has changed since now."""
    state = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    identities = [(name, id(value)) for name, value in model.named_parameters(remove_duplicate=False)]
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    instance = {name: sorted(vars(module)) for name, module in model.named_modules()}
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }
    needs_grad = [parameter.requires_grad for parameter in model.parameters()]
    generator = torch.get_rng_state()
    grad_mode = torch.is_grad_enabled()

    def check() -> None:
        now = model.state_dict(keep_vars=False)
        assert list(now) == list(state)
        assert all(torch.equal(now[name], state[name]) for name in state)
        assert [(name, id(v)) for name, v in model.named_parameters(remove_duplicate=False)] == identities
        assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
        assert {name: sorted(vars(module)) for name, module in model.named_modules()} == instance
        assert "forward" not in vars(model)
        assert {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        } == hooks
        assert [parameter.requires_grad for parameter in model.parameters()] == needs_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), generator)
        assert torch.is_grad_enabled() == grad_mode

    return check


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_grad_enabled(True)


def refused(
    error: type[Exception], call: Callable[..., object], model: nn.Module, *args: Any, **kwargs: Any
) -> Exception:
    """Assert that the call raises exactly this kind of error, with a useful text, and changes nothing."""
    check = photograph(model)
    with pytest.raises(error) as caught:
        call(model, *args, **kwargs)
    check()
    assert str(caught.value).strip()
    return caught.value


ENTRANCES = {
    "plan": lambda model, example_inputs, **budget: remat.plan(model, example_inputs, **budget),
    "wrap": lambda model, example_inputs, **budget: remat.wrap(model, example_inputs=example_inputs, **budget),
}
either = pytest.mark.parametrize("enter", ENTRANCES.values(), ids=ENTRANCES.keys())


# The budget itself.


@either
@pytest.mark.parametrize("budget", [0, -1, "0GiB", "-30%", 0.3, float("nan"), "8 Gib ibs", "", "150%", True])
@pytest.mark.parametrize("name", ["budget", "activation_budget"])
def test_a_budget_that_is_no_size_is_refused_in_one_line(enter: Any, budget: Any, name: str) -> None:
    error = refused(remat.UnitError, enter, MLP(), inputs(), **{name: budget})
    assert "\n" not in str(error)
    assert repr(budget) in str(error)


def test_wrap_refuses_a_bad_budget_at_once_even_when_it_would_plan_later() -> None:
    refused(remat.UnitError, remat.wrap, MLP(), budget=0.3)


@either
def test_both_budgets_are_one_too_many(enter: Any) -> None:
    error = refused(remat.RematerializeError, enter, MLP(), inputs(), budget="1GiB", activation_budget="30%")
    assert "both" in str(error)
    assert "parameters included" in str(error)  # what each of them is, without a look into the help


def test_the_help_of_wrap_tells_every_parameter() -> None:
    told = inspect.getdoc(remat.wrap) or ""
    assert [name for name in inspect.signature(remat.wrap).parameters if f"\n{name} : " not in told] == []


@either
def test_no_budget_is_one_too_few(enter: Any) -> None:
    refused(remat.RematerializeError, enter, MLP(), inputs())


@either
def test_an_unknown_solver_is_refused_at_once_with_the_closest_match(enter: Any) -> None:
    error = refused(remat.RematerializeError, enter, MLP(), inputs(), budget="1GiB", solver="swep")
    assert "did you mean 'sweep'" in str(error)
    refused(remat.RematerializeError, remat.wrap, MLP(), budget="1GiB", solver="swep")


@either
@pytest.mark.parametrize("besides", [{"reserve": "1MiB"}, {"optimizer": "adamw"}])
def test_what_only_a_whole_budget_counts_is_refused_with_an_activation_budget(
    enter: Any, besides: dict[str, Any]
) -> None:
    refused(remat.RematerializeError, enter, MLP(), inputs(), activation_budget="50%", **besides)


@either
def test_a_share_that_is_too_small_is_told_as_a_share(enter: Any) -> None:
    text = str(refused(remat.BudgetError, enter, MLP(), inputs(), activation_budget="1%"))
    assert "(1% of store-all's)" in text
    assert re.search(r"iB, [\d.]+% of store-all's\)", text)


@either
@pytest.mark.parametrize("name", ["budget", "activation_budget"])
def test_the_minimum_of_the_error_works_and_one_byte_less_does_not(enter: Any, name: str) -> None:
    model = MLP()
    error = refused(remat.BudgetError, enter, model, inputs(), **{name: 1})
    assert isinstance(error, remat.BudgetError)
    minimum = error.minimum_bytes
    assert str(minimum) in str(error)
    again = refused(remat.BudgetError, enter, model, inputs(), **{name: minimum - 1})
    assert isinstance(again, remat.BudgetError)
    assert again.minimum_bytes == minimum
    enter(model, inputs(), **{name: minimum})


def test_a_budget_below_the_minimum_is_found_at_the_first_call_and_leaves_no_trace() -> None:
    model = remat.wrap(MLP(), activation_budget=1)
    with pytest.raises(remat.BudgetError):
        model(*inputs())
    assert all(parameter.grad is None for parameter in model.parameters())


# The inputs and the model.


@either
@pytest.mark.parametrize(
    "example_inputs",
    [
        (),
        (torch.ones(64, 32), torch.ones(64, 32)),
        {"y": torch.ones(64, 32)},
        (torch.ones(64, 31),),
        (torch.ones(64, 32, dtype=torch.int64),),
        ("text",),
    ],
    ids=["too few", "too many", "unknown keyword", "wrong shape", "wrong dtype", "not a tensor"],
)
def test_inputs_that_the_forward_does_not_take_are_a_capture_error(enter: Any, example_inputs: Any) -> None:
    refused(remat.CaptureError, enter, MLP(), example_inputs, activation_budget="50%")


@either
@pytest.mark.parametrize("example_inputs", [torch.ones(64, 32), None, 3, [torch.ones(64, 32)]])
def test_inputs_that_are_no_tuple_and_no_dict_are_refused_with_what_to_write(enter: Any, example_inputs: Any) -> None:
    if example_inputs is None and enter is ENTRANCES["wrap"]:
        pytest.skip("None is wrap's way to say: plan at the first call")
    error = refused(remat.RematerializeError, enter, MLP(), example_inputs, activation_budget="50%")
    assert "tuple" in str(error)


@either
def test_a_forward_that_raises_is_shown_as_the_forwards_own_failure(enter: Any) -> None:
    error = refused(remat.CaptureError, enter, Raises(), inputs(), activation_budget="50%")
    assert "LookupError" in str(error)
    assert "the forward's own words" in str(error)
    assert Path(__file__).name in str(error)


@either
@pytest.mark.parametrize(
    ("model_class", "culprit"),
    [(Branches, "if y > 0:"), (Chooses, "chosen = x[x.sum(dim=1) > 0]")],
    ids=["control flow", "shapes"],
)
def test_data_dependence_is_a_capture_error_that_names_the_users_line(
    enter: Any, model_class: type[nn.Module], culprit: str
) -> None:
    error = refused(remat.CaptureError, enter, model_class(), inputs(), activation_budget="50%")
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if text.strip() == culprit)
    assert f"{Path(__file__).name}:{line}" in str(error)


@either
@pytest.mark.parametrize("make", [frozen, nn.Identity, Detached, NoTensor])
def test_a_step_with_nothing_to_differentiate_is_a_capture_error(enter: Any, make: Callable[[], nn.Module]) -> None:
    error = refused(remat.CaptureError, enter, make(), inputs(), activation_budget="50%")
    assert "grad" in str(error)


@either
def test_a_model_already_wrapped_is_refused(enter: Any) -> None:
    model = remat.wrap(MLP(), activation_budget="50%", example_inputs=inputs())
    with pytest.raises(remat.RematerializeError, match="already"):
        enter(model, inputs(), activation_budget="50%")
    model(*inputs()).backward()


def test_a_part_already_wrapped_is_refused() -> None:
    outer = nn.Sequential(remat.wrap(nn.Linear(4, 4), activation_budget="1MiB"), nn.ReLU())
    with pytest.raises(remat.RematerializeError, match="already"):
        remat.wrap(outer, activation_budget="1MiB")


@either
@pytest.mark.parametrize("what", [None, 3, torch.ones(3), MLP, lambda x: x])
def test_what_is_no_module_is_refused(enter: Any, what: Any) -> None:
    with pytest.raises((remat.RematerializeError, TypeError), match="Module"):
        enter(what, inputs(), activation_budget="50%")


@either
def test_what_a_compiler_made_of_a_model_is_refused(enter: Any) -> None:
    with pytest.raises(remat.RematerializeError, match=r"torch\.compile made of a model.*wrap the model itself"):
        enter(torch.compile(MLP()), inputs(), activation_budget="50%")
    scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(remat.RematerializeError, match=r"torch\.jit made of a model"):
        enter(scripted, (torch.ones(2, 4),), activation_budget="50%")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@either
def test_cuda_asked_for_and_absent_is_said_so(enter: Any) -> None:
    with pytest.raises(remat.RematerializeError, match=r"(?i)cuda"):
        enter(MLP(), inputs(), activation_budget="50%", device="cuda")


# Plans in files.


@pytest.fixture(scope="module")
def plan_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    remat.plan(MLP(), inputs(), activation_budget="50%").save(str(path))
    return path.read_text(encoding="utf-8")


def test_a_plan_survives_its_file(plan_text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_text, encoding="utf-8")
    plan = remat.Plan.load(path)
    assert str(plan) == str(remat.plan(MLP(), inputs(), activation_budget="50%")) or plan.peak_bytes > 0
    plan.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == plan_text


def bad_plans(text: str) -> dict[str, str]:
    data = json.loads(text)
    return {
        "empty": "",
        "truncated": text[: len(text) // 2],
        "not JSON": "budget: 8GiB",
        "a list": "[]",
        "foreign": '{"nodes": []}',
        "a later format": json.dumps({**data, "format": "rematerialize.plan/99"}),
        **{f"without {key}": json.dumps({k: v for k, v in data.items() if k != key}) for key in ("graph", "schedule")},
    }


@pytest.mark.parametrize(
    "case",
    [
        "empty",
        "truncated",
        "not JSON",
        "a list",
        "foreign",
        "a later format",
        "without graph",
        "without schedule",
    ],
)
def test_a_file_that_is_no_plan_is_one_clear_error(case: str, plan_text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(bad_plans(plan_text)[case], encoding="utf-8")
    with pytest.raises(remat.RematerializeError) as caught:
        remat.Plan.load(path)
    assert "\n" not in str(caught.value)


def test_a_plan_of_another_model_is_refused_and_changes_nothing(plan_text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_text, encoding="utf-8")
    plan = remat.Plan.load(path)
    other = MLP(width=16)
    refused(remat.PlanMismatchError, remat.wrap, other, plan=plan, example_inputs=inputs(16))


def test_a_failed_plan_says_nothing_at_warning_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(remat.CaptureError):
        remat.plan(Branches(), inputs(), activation_budget="50%")
    assert not [record for record in caplog.records if record.name.startswith("rematerialize")]
