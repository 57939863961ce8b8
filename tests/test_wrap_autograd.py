"""Autograd can't tell a wrapped model from an eager one: accumulation, clipping, partial and repeated backwards."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rematerialize as remat
from tests.twins import (
    SEED,
    Step,
    assert_same_step,
    at_minimum,
    check_steps,
    gradients_of,
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
    """Four blocks with dropout; ends in a tanh, whose backward reads the output."""

    def __init__(self, width: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(layer for _ in range(4) for layer in (nn.Linear(width, width, dtype=dtype), nn.GELU(), nn.Dropout(0.2)))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).tanh()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.2))
        self.actor, self.critic = nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.actor(hidden).softmax(1), self.critic(hidden)


def batch(rows: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-2, 2, rows * 16, dtype=dtype).reshape(rows, 16).sin()


def both(make: Callable[[], nn.Module], *args: Any) -> tuple[nn.Module, nn.Module]:
    """Two equal models, the second wrapped at the minimum."""
    eager, ours = twins(make)
    return eager, at_minimum(ours, *args)


# Training loops.


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_with_several_optimizers_follows_eager(set_to_none: bool, clip: float | None) -> None:
    eager, ours = both(TwoHeads, batch())
    for model in (eager, ours):
        optimizers = [
            torch.optim.AdamW([*model.trunk.parameters(), *model.actor.parameters()], lr=1e-2),
            torch.optim.SGD(model.critic.parameters(), lr=1e-2, momentum=0.9),
        ]
        for turn in range(4):
            step_of(model, batch(), seed=turn)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
    assert all(same(left, right) for left, right in zip(eager.parameters(), ours.parameters(), strict=True))


def test_gradients_accumulate_over_micro_batches() -> None:
    eager, ours = both(MLP, batch())
    steps: list[Step] = []
    for model in (eager, ours):
        held = None
        for turn in range(3):
            steps.append(step_of(model, batch() * (turn + 1), seed=turn))
            gradient = model.blocks[0].weight.grad
            assert held is None or gradient is held
            held = gradient
    for expected, found in zip(steps[:3], steps[3:], strict=True):
        assert_same_step(expected, found)
    assert len(plans_of(ours)) == 1


def test_two_forwards_may_run_before_their_backward() -> None:
    eager, ours = both(MLP, batch())
    for model in (eager, ours):
        torch.manual_seed(SEED)
        left, right = model(batch()), model(batch() * 2)
        (left * right).sum().backward()
    assert all(same(a, b) for a, b in zip(*map(gradients, (eager, ours)), strict=True))


def gradients(model: nn.Module) -> list[Tensor | None]:
    return list(gradients_of(model).values())


OUTSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": Tensor.sum,
    "broadcast": lambda y: (y.t() @ torch.ones(8, 3)).sum(),
    "sparse": lambda y: y[::2].sum() + y[0, 0],
    "dense": lambda y: F.mse_loss(y, torch.zeros(())[None].expand(8, 16)),
    "transposed": lambda y: y.t().reshape(4, 32).pow(2).sum(),
}


@pytest.mark.parametrize("layout", OUTSIDE)
def test_a_loss_outside_may_hand_back_a_gradient_in_any_layout(layout: str) -> None:
    eager, ours = both(MLP, batch())
    expected = step_of(eager, batch(), loss_of=OUTSIDE[layout])
    assert_same_step(expected, step_of(ours, batch(), loss_of=OUTSIDE[layout]))


def test_a_loss_whose_fake_kernel_returns_another_shape_takes_its_gradient() -> None:
    class Margin(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return F.multilabel_margin_loss(
                super().forward(x)[0], torch.tensor([3, 0, -1, *[0] * 13]), reduction="none"
            )

    eager, ours = both(Margin, batch())
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


def test_a_gradient_handed_in_is_left_as_it_was() -> None:
    ours = store_all(MLP())
    given = torch.full((8, 16), 0.5)
    ours(batch()).backward(given)
    assert torch.equal(given, torch.full((8, 16), 0.5))


def test_a_part_may_be_wrapped_alone_and_more_than_one() -> None:
    def make() -> nn.Module:
        return nn.Sequential(MLP(), nn.Linear(16, 16), MLP())

    eager, ours = twins(make)
    at_minimum(ours[0], batch())
    at_minimum(ours[2], batch().requires_grad_())
    for turn in range(2):
        assert_same_step(step_of(eager, batch(), seed=turn), step_of(ours, batch(), seed=turn))


# Partial and repeated backwards.


class Turned(nn.Module):
    """Two outputs whose gradients meet, in two layouts, in front of a reshape of a transposed value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x.transpose(0, 1).contiguous()).transpose(0, 1)
        scaled = y * self.scale
        return scaled[..., 1:].norm() + y.mean() + scaled.mean(), scaled


@pytest.mark.parametrize(
    "loss_of", [Tensor.sum, lambda y: total(y.permute(2, 1, 0).contiguous())], ids=["expanded", "transposed"]
)
def test_a_gradient_in_another_layout_goes_on_alone_where_the_other_output_has_none(
    loss_of: Callable[[Tensor], Tensor],
) -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(SEED))
    eager, ours = both(Turned, x)
    for model in (eager, ours):
        step_of(model, x, loss_of=lambda out: loss_of(out[1]))
    assert all(same(a, b) for a, b in zip(*map(gradients, (eager, ours)), strict=True))


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_without_a_gradient_takes_part_with_zeros(used: int) -> None:
    eager, ours = both(TwoHeads, batch())
    for model in (eager, ours):
        step_of(model, batch(), loss_of=lambda out: total(out[used]))
    for name, expected in gradients_of(eager).items():
        found = gradients_of(ours)[name]
        if expected is None:
            assert found is None or not found.any()
        else:
            assert same(expected, found)


def test_retained_graphs_can_be_gone_through_again_until_freed() -> None:
    eager, ours = both(MLP, batch())
    for model in (eager, ours):
        torch.manual_seed(SEED)
        loss = total(model(batch()))
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    assert all(same(a, b) for a, b in zip(*map(gradients, (eager, ours)), strict=True))


def test_one_backward_per_output_works_on_a_retained_graph() -> None:
    eager, ours = both(TwoHeads, batch())
    for model in (eager, ours):
        torch.manual_seed(SEED)
        policy, value = model(batch())
        total(policy).backward(retain_graph=True)
        total(value).backward()
    assert all(same(a, b) for a, b in zip(*map(gradients, (eager, ours)), strict=True))


def test_a_step_after_a_backward_that_was_refused_is_eagers() -> None:
    eager, ours = both(MLP, batch())
    output = total(ours(batch()))
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()
    ours.zero_grad()
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


def test_autograd_grad_takes_gradients_of_chosen_tensors_and_leaves_the_others() -> None:
    eager, ours = both(MLP, batch().requires_grad_())
    found = []
    for model in (eager, ours):
        torch.manual_seed(SEED)
        x = batch().requires_grad_()
        loss = total(model(x))
        found.append(torch.autograd.grad(loss, [x, model.blocks[0].weight]))
        assert gradients(model) == [None] * 8
    assert all(same(a, b) for a, b in zip(*found, strict=True))


def test_double_backward_is_refused_in_clear_words() -> None:
    ours = at_minimum(MLP(), batch().requires_grad_())
    x = batch().requires_grad_()
    (gradient,) = torch.autograd.grad(total(ours(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"(?i)twice|double backward"):
        gradient.sum().backward()


class SecondDerivative(nn.Module):
    """A loss of derivatives, inside of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return slope.pow(2).mean()


def test_derivatives_inside_the_model_are_part_of_the_step() -> None:
    check_steps(SecondDerivative, torch.linspace(-1, 1, 16).reshape(8, 2))


# Inputs.


def test_inputs_that_require_grad_get_their_gradients() -> None:
    eager, ours = both(MLP, batch().requires_grad_())
    inputs = [batch().requires_grad_() for _ in range(2)]
    for _ in range(2):
        assert_same_step(step_of(eager, inputs[0]), step_of(ours, inputs[1]))
        assert same(inputs[0].grad, inputs[1].grad)
    assert inputs[0].grad is not None


def test_gradients_flow_on_through_an_input_that_is_no_leaf() -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    leaves = [torch.ones(8, 1, requires_grad=True) for _ in range(2)]
    assert_same_step(step_of(eager, batch() * leaves[0]), step_of(ours, batch() * leaves[1]))
    assert same(leaves[0].grad, leaves[1].grad)


class ChangesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.linear(x).tanh()


def test_an_input_changed_in_place_is_changed_once() -> None:
    eager, ours = twins(ChangesInput)
    store_all(ours)
    inputs = [batch(), batch()]
    for _ in range(2):
        assert_same_step(step_of(eager, inputs[0]), step_of(ours, inputs[1]))
        assert torch.equal(*inputs)


def test_the_same_tensor_may_be_passed_twice() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x).tanh() * self.linear(y).sigmoid()

    eager, ours = twins(Sum)
    store_all(ours)
    x, y = batch(), batch() * 2
    for args in ((x, x), (x, y), (y, y), (x, x[:])):
        assert_same_step(step_of(eager, *args), step_of(ours, *args))


# Changes in place between forward and backward.


def test_a_parameter_changed_before_the_backward_is_refused_as_in_eager() -> None:
    eager, ours = both(MLP, batch())
    for model in (eager, ours):
        loss = total(model(batch()))
        with torch.no_grad():
            model.blocks[3].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_input_changed_before_the_backward_is_refused_as_in_eager() -> None:
    eager, ours = both(MLP, batch())
    for model in (eager, ours):
        x = batch()
        loss = total(model(x))
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_output_that_the_backward_reads_must_not_be_changed() -> None:
    eager, ours = both(MLP, batch())
    for model in (eager, ours):
        output = model(batch())
        with torch.no_grad():
            output.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_an_output_that_the_backward_does_not_read_may_be_changed() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

    def loss_of(output: Tensor) -> Tensor:
        return output.mul_(2).relu_().sum()

    eager, ours = both(make, batch())
    for _ in range(2):
        expected = step_of(eager, batch(), loss_of=loss_of)
        assert_same_step(expected, step_of(ours, batch(), loss_of=loss_of))


# Randomness, precision, layouts.


def test_the_same_seed_replays_the_same_step_and_another_seed_does_not() -> None:
    ours = at_minimum(MLP(), batch())
    first = step_of(ours, batch(), seed=1)
    ours.zero_grad()
    other = step_of(ours, batch(), seed=2)
    ours.zero_grad()
    assert_same_step(first, step_of(ours, batch(), seed=1))
    assert not torch.equal(first.outputs[0], other.outputs[0])


def test_draws_of_the_user_continue_as_after_an_eager_step() -> None:
    eager, ours = both(MLP, batch())
    draws = []
    for model in (eager, ours):
        torch.manual_seed(SEED)
        seen = [torch.rand(3)]
        loss = total(model(batch()))
        seen.append(torch.rand(3))
        loss.backward()
        draws.append([*seen, torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_as_in_eager(dtype: torch.dtype) -> None:
    check_steps(lambda: MLP(dtype=dtype), batch(dtype=dtype))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, dtype=torch.complex64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = torch.fft.fft(x.to(torch.complex64)) @ self.weight
        return torch.fft.ifft(spectrum).real.tanh(), spectrum.conj() * 2


def test_complex_parameters_and_outputs_are_as_in_eager() -> None:
    check_steps(Complex, batch())


def test_channels_last_is_as_in_eager() -> None:
    def make() -> nn.Module:
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 4, 3)
        )
        return net.to(memory_format=torch.channels_last)

    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    check_steps(make, images.to(memory_format=torch.channels_last))


def test_autocast_is_part_of_the_signature() -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    for enabled in (True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = [torch.manual_seed(SEED) and model(batch()) for model in (eager, ours)]
        for output in outputs:
            total(output).backward()
        assert same(*outputs)
        assert outputs[1].dtype == (torch.bfloat16 if enabled else torch.float32)
        assert all(same(a, b) for a, b in zip(*map(gradients, (eager, ours)), strict=True))
    assert len(plans_of(ours)) == 2


@pytest.mark.parametrize("stepped", [False, True])
def test_a_model_moved_to_another_precision_trains_in_it(stepped: bool) -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    for model in (eager, ours) if stepped else ():
        step_of(model, batch())
        model.zero_grad()
    for model in (eager, ours):
        model.to(torch.float64)
    x = batch(dtype=torch.float64)
    assert_same_step(step_of(eager, x), step_of(ours, x))


# Failures and company.


def test_a_step_that_fails_midway_leaves_the_next_one_whole() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(8, 16), MLP()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.mix(self.embed(tokens))

    good, bad = torch.arange(8), torch.arange(8) + 4
    eager, ours = both(Lookup, good)
    with pytest.raises(IndexError):
        ours(bad)
    for turn in range(2):
        assert_same_step(step_of(eager, good, seed=turn), step_of(ours, good, seed=turn))


def test_a_forward_that_raises_is_named_and_the_next_input_works() -> None:
    eager, ours = twins(MLP)
    store_all(ours)
    with pytest.raises(remat.CaptureError, match="forward"):
        ours(torch.ones(8, 5))
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


def test_wrapped_models_interleave() -> None:
    first, second = both(MLP, batch()), both(TwoHeads, batch())
    found: list[list[Step]] = []
    for side in (0, 1):
        torch.manual_seed(SEED)
        one, two = first[side], second[side]
        losses = [total(one(batch())), total(two(batch())), total(one(batch() * 2))]
        for loss in losses:
            loss.backward()
        found.append([step_of(one, batch(), seed=None), step_of(two, batch(), seed=None)])
    for expected, ours in zip(*found, strict=True):
        assert_same_step(expected, ours)


def test_wrapped_models_train_in_two_threads() -> None:
    def make() -> nn.Module:
        return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())))

    expected = step_of(twins(make)[0], batch())
    models = [store_all(twins(make)[0]) for _ in range(2)]
    shared = store_all(twins(make)[0])
    failures: list[object] = []

    def work(model: nn.Module) -> None:
        try:
            for _ in range(5):
                model.zero_grad()
                found = step_of(model, batch(), seed=None)
                if not all(same(a, found.gradients[n]) for n, a in expected.gradients.items()):
                    failures.append("gradients differ")
                if not same(shared(batch()), expected.outputs[0]):
                    failures.append("the shared model's output differs")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(plans_of(shared)) == 1


def test_outputs_that_require_no_grad_are_marked_so() -> None:
    class WithMetric(MLP):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return {"loss": y.sum(), "metric": y.detach().mean(), "hits": (y > 0).sum()}

    eager, ours = both(WithMetric, batch())
    assert [t.requires_grad for t in tensors_in(ours(batch()))] == [t.requires_grad for t in tensors_in(eager(batch()))]
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


def test_a_second_derivative_is_never_taken_for_zero() -> None:
    """Under allow_unused, what isn't connected counts as zero: gradients stay connected to all that they depend on."""
    model, scale = remat.wrap(MLP(), activation_budget="100%"), torch.ones((), requires_grad=True)
    x = torch.randn(3, 16)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.functional.hessian(lambda y: model(y).sum(), x)
    for of in ("input", "outside"):
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((model(y) * scale).sum(), y, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(gradient.sum(), y if of == "input" else scale, allow_unused=True)


@pytest.mark.parametrize("outer", [False, True])
def test_under_torch_compile_the_planned_step_runs_as_it_is(outer: bool) -> None:
    def compiled(model: nn.Module) -> list[Tensor | None]:
        torch._dynamo.reset()  # type: ignore[no-untyped-call]
        whole = nn.Sequential(nn.Linear(8, 8), model) if outer else model
        torch.compile(whole, backend="aot_eager")(x).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    torch.manual_seed(0)
    x, eager = torch.randn(3, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    ours = remat.wrap(copy.deepcopy(eager), activation_budget="100%")
    found = []
    for model in (eager, ours):
        torch.manual_seed(1)
        found.append(compiled(model))
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(plans_of(ours)) == 1
