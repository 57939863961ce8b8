"""A captured step goes the way that eager goes: its branches, the layouts of gradients, its casts of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch.nn import functional

import rematerialize as remat
from rematerialize.harness import Stepper, measure_step_peak
from rematerialize.prepare import PreparedStep, bind_inputs, prepare
from tests.twins import at_minimum, check_steps, differences, step_of, store_all

pytestmark = pytest.mark.usefixtures("quick_plans")

SIZE = 8


class Branching(nn.Module):
    """Adds one where ``look`` says so, two elsewhere."""

    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        return self.layer(y + 1 if self.look(y) else y + 2)


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def _packed(x: Tensor) -> Tensor:
    steps = torch.diff(_positions(x), prepend=_positions(x)[:, :1] - 1, dim=-1)
    return ((steps != 1).cumsum(-1)[:, -1] == 0).all()


def _changed_in_place(x: Tensor) -> Tensor:
    flags = torch.zeros(3)
    flags[1] = 1
    return flags.sum() == 1


@pytest.mark.parametrize(
    "look",
    [
        _packed,
        _changed_in_place,
        lambda x: not _packed(x),
        lambda x: torch.tensor([3, 1, 2]).argmin().item() == 1,
        lambda x: torch.ones_like(torch.eye(x.shape[1])).sum() > 60,
        lambda x: torch.equal(torch.zeros(3), torch.full((3,), 0.0)),
        lambda x: not torch.compiler.is_compiling(),
    ],
    ids=["packed", "changed in place", "not packed", "literal", "template", "equal", "eager"],
)
def test_a_branch_on_what_follows_from_shapes_is_eagers(look: Callable[[Tensor], Any]) -> None:
    check_steps(lambda: Branching(look), torch.randn(4, SIZE))


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum() > 0,
        lambda x: torch.rand(3).sum() > 1,
        lambda x: torch.zeros(3).add_(x.detach()[0, :3]).sum() > 0,
        lambda x: torch.zeros(3).bernoulli_().sum() > 1,
        lambda x: torch.empty(3).sum() > 0,
    ],
    ids=["an input with a gradient", "random", "written", "random in place", "unset"],
)
def test_a_branch_on_other_values_is_refused(look: Callable[[Tensor], Any]) -> None:
    model, x = Branching(look), torch.randn(4, SIZE, requires_grad=True)
    with pytest.raises(remat.CaptureError, match="depends on the values of its tensors at test_eager_ways"):
        prepare(model, model.forward, bind_inputs(model.forward, (x,)))


def test_a_look_in_a_handler_is_told_as_what_it_was_to_handle() -> None:
    def look(x: Tensor) -> Any:
        try:
            return torch.bincount(x.detach().argmax(1)).shape[0] > 1
        except RuntimeError as error:
            raise ValueError(f"up to {int(x.argmax())}") from error

    model, x = Branching(look), torch.randn(4, SIZE)
    with pytest.raises(remat.CaptureError, match=r"x\.detach\(\)\.argmax\(1\).*aten\.bincount.*index_add"):
        prepare(model, model.forward, bind_inputs(model.forward, (x,)))


def test_where_eagers_way_can_not_be_traced_the_one_for_compilers_is_not_taken() -> None:
    def look(x: Tensor) -> Any:
        return torch.compiler.is_compiling() or (x.detach() > -9).all()

    model, x = Branching(look), torch.randn(4, SIZE, requires_grad=True)
    with pytest.raises(remat.CaptureError, match="depends on the values of its tensors at test_eager_ways"):
        prepare(model, model.forward, bind_inputs(model.forward, (x,)))


def test_a_write_into_a_strided_view_of_a_view_is_refused() -> None:
    class Strided(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            y.view(-1).as_strided((2, 2), (2, 1)).mul_(2)
            return y

    model, x = Strided(_packed), torch.randn(4, SIZE)
    with pytest.raises(remat.CaptureError, match="that as_strided made of another view at test_eager_ways"):
        prepare(model, model.forward, bind_inputs(model.forward, (x,)))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, SIZE, SIZE) / SIZE)

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([1, 3, 4], dtype=torch.int32)
        return functional.grouped_mm(functional.grouped_mm(x, self.experts, offs=ends).tanh(), self.experts, offs=ends)


def test_experts_in_float32_run_grouped_as_in_eager() -> None:
    check_steps(Experts, torch.randn(4, SIZE, requires_grad=True))


class Scores(nn.Module):
    """A contrastive head, as CLIP's: the sum over all scores rounds by their layout."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.scale = nn.Parameter(torch.tensor(2.6592))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(self.text(x)) @ functional.normalize(self.image(x)).t() * self.scale.exp()


def _expanded(scores: Tensor) -> Tensor:
    return scores.sum()


def _turned(scores: Tensor) -> Tensor:
    return functional.cross_entropy(scores.t(), torch.arange(len(scores)))


def _both(scores: Tensor) -> Tensor:
    return _turned(scores) + functional.cross_entropy(scores, torch.arange(len(scores)))


@pytest.mark.parametrize("rows", [3, 5, 9, 16])
@pytest.mark.parametrize("loss", [_expanded, _turned, _both])
@pytest.mark.parametrize("wrapped", [store_all, at_minimum])
def test_gradients_go_on_in_the_layout_in_which_they_arrive(
    rows: int, loss: Callable[[Tensor], Tensor], wrapped: Callable[..., nn.Module]
) -> None:
    torch.manual_seed(0)
    eager, x = Scores(), torch.randn(rows, SIZE)
    ours = copy.deepcopy(eager)
    ours = wrapped(ours, x) if wrapped is at_minimum else wrapped(ours)
    assert not list(differences(step_of(eager, x, loss_of=loss), step_of(ours, x, loss_of=loss)))


class TurnedLoss(Scores):
    """Returns the scores beside the loss of both directions, which is all that is differentiated."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return _both(scores), scores.t(), scores


@pytest.mark.parametrize("rows", [3, 4, 5, 9, 16])
def test_without_the_gradients_of_scores_the_sum_is_laid_out_as_eagers(rows: int) -> None:
    torch.manual_seed(0)
    eager, x = TurnedLoss(), torch.randn(rows, SIZE)
    ours = at_minimum(copy.deepcopy(eager), x)

    def first(output: Any) -> Tensor:
        return output[0]  # type: ignore[no-any-return]

    assert not list(differences(step_of(eager, x, loss_of=first), step_of(ours, x, loss_of=first)))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 2


def test_the_gradient_of_a_sum_is_not_copied_out_into_memory() -> None:
    x = torch.randn(4096, 4)
    peaks = []
    for model in (Wide(), store_all(Wide())):
        stepper = Stepper(model, (x,), lambda output: output.sum())
        stepper.step(0)
        peaks.append(measure_step_peak(stepper).peak_bytes)
    assert peaks[1] <= peaks[0]


class Shared(nn.Module):
    """One weight at every step of a recurrence, half of them under gradients' feet."""

    def __init__(self, region: Callable[[], Any]) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        with self.region():
            for _ in range(3):
                x = functional.gelu(self.cell(x)) + self.out(x)
        with self.region():
            x = self.cell(x) + self.cell.weight.to(torch.bfloat16).sum()
        return x.float()


def _autocast(**settings: Any) -> Callable[[], Any]:
    return lambda: torch.autocast("cpu", dtype=torch.bfloat16, **settings)


def _casts(prepared: PreparedStep, weight: str) -> int:
    """How often the forward casts a parameter."""
    [index] = [i for i, slot in enumerate(prepared.captured.slots) if slot.name == weight]
    users = prepared.captured.joint.primals[index].users
    return sum(user.target is torch.ops.aten._to_copy.default for user in users)


@pytest.mark.parametrize(("settings", "casts"), [({}, 3), ({"cache_enabled": False}, 5)])
def test_autocast_casts_a_weight_once_per_region_as_in_eager(settings: dict[str, Any], casts: int) -> None:
    x = torch.randn(4, SIZE)
    check_steps(lambda: Shared(_autocast(**settings)), x)
    model = Shared(_autocast(**settings))
    assert _casts(prepare(model, model.forward, bind_inputs(model.forward, (x,))), "cell.weight") == casts


def test_a_cast_that_something_else_traced_before_makes_no_difference() -> None:
    x, model = torch.randn(4, SIZE), Shared(_autocast())
    torch.ops.aten.to.dtype._dispatch_cache.clear()
    with enable_python_dispatcher():  # as torch.compile does, which remembers what it found for an op
        torch.zeros(2, requires_grad=True).to(torch.bfloat16)
    assert DispatchKey.AutogradCPU in torch.ops.aten.to.dtype._dispatch_cache
    assert _casts(prepare(model, model.forward, bind_inputs(model.forward, (x,))), "cell.weight") == 3
    check_steps(lambda: Shared(_autocast()), x)


def test_autocast_around_the_model_casts_a_weight_once_per_call() -> None:
    torch.manual_seed(0)
    eager, x = Shared(torch.enable_grad), torch.randn(4, SIZE)
    ours = store_all(copy.deepcopy(eager))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps = [step_of(model, x) for model in (eager, ours)]
    assert not list(differences(*steps))


class CastByHand(Shared):
    """Autocast's cache isn't asked: these casts' gradients add up in float32, in regions where it is off, too."""

    def forward(self, x: Tensor) -> Tensor:
        with self.region(), torch.autocast("cpu", enabled=False):
            for _ in range(3):
                x = (x.bfloat16() @ self.cell.weight.to(torch.bfloat16)).float().tanh()
        for _ in range(3):
            x = (x.bfloat16() @ self.out.weight.to(torch.bfloat16)).float().tanh()
        return x


def test_casts_by_hand_stay_apart() -> None:
    check_steps(lambda: CastByHand(_autocast()), torch.randn(4, SIZE))
    check_steps(lambda: CastByHand(torch.enable_grad), torch.randn(4, SIZE))


class CastWithoutGradient(Shared):
    """The cast of a region without gradients isn't the one that those behind it go through."""

    def forward(self, x: Tensor) -> Tensor:
        with self.region():
            with torch.no_grad():
                scale = self.cell(x).abs().mean()
            return (self.cell(x) * scale + self.out(x)).float()


def test_a_weight_that_is_cast_without_gradients_gets_them_later_as_in_eager() -> None:
    check_steps(lambda: CastWithoutGradient(_autocast()), torch.randn(4, SIZE))


def test_a_language_model_leaves_the_keys_and_values_of_the_past_out_of_a_step() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    assert config.use_cache
    torch.manual_seed(0)
    eager = transformers.LlamaForCausalLM(config)
    ours, ids = store_all(copy.deepcopy(eager)), torch.randint(32, (2, 8))
    losses = [model(input_ids=ids, labels=ids).loss for model in (eager, ours)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)
    assert ours(input_ids=ids, labels=ids).past_key_values is None
    with pytest.raises(remat.CaptureError, match="returns a DynamicCache"):
        ours(input_ids=ids, use_cache=True)
    assert ours.eval()(input_ids=ids).past_key_values is not None
