"""What autograd offers around and inside a step: works as in eager under the lowest budget, or is refused."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rematerialize as remat
from tests.twins import (
    SEED,
    assert_same_step,
    at_minimum,
    check_steps,
    gradients_of,
    plans_of,
    same,
    same_gradients,
    step_of,
    store_all,
    total,
    twins,
)

pytestmark = pytest.mark.usefixtures("quick_plans")

WRAPS: dict[str, Callable[..., nn.Module]] = {"stored": lambda model, *_: store_all(model), "minimum": at_minimum}


class Net(nn.Module):
    """Three blocks, a tanh at the end."""

    def __init__(self, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        layers = (layer for _ in range(blocks) for layer in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.2)))
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Any:
        return self.blocks(x).tanh()


def batch(rows: int = 8, width: int = 16) -> Tensor:
    return torch.linspace(-2, 2, rows * width).reshape(rows, width).sin()


# Outputs that the loss leaves out.


class Heads(nn.Module):
    """A shared trunk, three heads and a second use of the trunk's output; the last head's slope is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Net(blocks=2)
        self.heads = nn.ModuleList(nn.Linear(16, 4) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x) * self.scale
        first = self.heads[0](hidden)
        return [
            first.tanh(),
            torch.cat([self.heads[1](hidden), first], 1),
            self.heads[2](hidden + x).sum(),
            (self.heads[3](hidden) * 0).sqrt(),
        ]


@pytest.mark.parametrize("wrapped", WRAPS)
def test_outputs_that_the_loss_leaves_out_have_no_part_in_the_gradients(wrapped: str) -> None:
    eager, ours = twins(Heads)
    ours = WRAPS[wrapped](ours, batch())
    for used in ((0,), (1,), (2,), (0, 2), (1, 0), (0, 1, 2), (3,), (0, 1, 2, 3)):
        for model in (eager, ours):
            model.zero_grad()
            step_of(model, batch(), loss_of=lambda out, used=used: total([out[i] for i in used]))
        assert same_gradients(eager, ours) or 3 in used, used
        assert [p.grad is None for p in eager.parameters()] == [p.grad is None for p in ours.parameters()]


class Flat(nn.Module):
    """Its first output is worth zeros to what it was made of, by a formula that never looks at the output's gradient;
    its third meets the first's ancestors on another way.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.trunk, self.flat, self.other = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.name = name

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x)
        made, other = self.flat(hidden) * 1.5, self.other(x).tanh()
        made = FLAT[self.name](made, other)
        return [made, other * 1.0, hidden.sin(), made + hidden]


FLAT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fill_": lambda x, y: x.fill_(0.3),
    "zero_": lambda x, y: x.zero_(),
    "copy_": lambda x, y: x.copy_(y),
    "fill_ by a tensor": lambda x, y: x.fill_(y.sum()),
    "fill_ in part": lambda x, y: x.t()[1:3].fill_(1.0).new_empty(0).sum() + x,
    "round": lambda x, y: x.round(),
    "floor_": lambda x, y: x.floor_(),
    "floor division": lambda x, y: torch.div(x, y, rounding_mode="floor"),
}


@pytest.mark.parametrize("name", FLAT)
def test_zeros_of_an_output_that_the_loss_leaves_out_are_none(name: str) -> None:
    eager, ours = twins(lambda: Flat(name))
    ours = at_minimum(ours, batch())
    for used in ((0,), (1,), (2,), (3,), (0, 1), (1, 2), (0, 2), (1, 3)):
        for model in (eager, ours):
            model.zero_grad()
            step_of(model, batch(), loss_of=lambda out, used=used: total([out[i] for i in used]))
        assert same_gradients(eager, ours), used
        assert [p.grad is None for p in eager.parameters()] == [p.grad is None for p in ours.parameters()], used


def test_losses_of_one_forward_may_go_backward_one_by_one() -> None:
    eager, ours = twins(Heads)
    ours = at_minimum(ours, batch())
    for model in (eager, ours):
        torch.manual_seed(SEED)
        outputs = model(batch())
        for index in (1, 0, 2):
            total(outputs[index]).backward(retain_graph=index != 2)
    assert same_gradients(eager, ours)


def test_gradients_of_an_input_and_of_parameters_can_be_asked_for_alone() -> None:
    eager, ours = twins(Heads)
    ours = at_minimum(ours, batch().requires_grad_())
    found = []
    for model in (eager, ours):
        torch.manual_seed(SEED)
        x = batch().requires_grad_()
        outputs = model(x)
        found.append(
            [
                *torch.autograd.grad(total(outputs[0]), [x], retain_graph=True),
                *torch.autograd.grad(total(outputs[:3]), [x, model.scale, model.heads[2].weight]),
            ]
        )
    assert all(same(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), lambda: nn.Linear(4, 4)])
def test_gradients_in_a_batch_are_refused_and_one_at_a_time_are_eagers(make: Callable[[], nn.Module]) -> None:
    eager, ours = twins(make)
    store_all(ours)
    x = batch(2, 4)
    with pytest.raises(RuntimeError, match=r"in a batch.*one at a time"):
        torch.autograd.functional.jacobian(ours, x, vectorize=True)
    assert torch.equal(torch.autograd.functional.jacobian(eager, x), torch.autograd.functional.jacobian(ours, x))


# Frozen parts.


@pytest.mark.parametrize("wrapped", WRAPS)
def test_a_frozen_prefix_is_neither_held_nor_recomputed(wrapped: str) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(Net(32), Net(32))
        model[0].requires_grad_(False)
        return model

    x = batch(64, 32)
    eager, ours = twins(make)
    ours = WRAPS[wrapped](ours, x)
    for turn in range(2):
        assert_same_step(step_of(eager, x, seed=turn), step_of(ours, x, seed=turn))
    (plan,) = plans_of(ours)
    alone = store_all(Net(32))
    alone(x)
    assert plan.store_all_peak_bytes == plans_of(alone)[0].store_all_peak_bytes + x.nbytes  # what enters the rest
    if wrapped == "stored":
        assert plan.recomputed == 0


def test_parameters_frozen_in_the_middle_keep_no_gradient() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(Net(), Net(), Net())
        model[1].requires_grad_(False)
        return model

    ours = check_steps(make, batch())
    assert all(p.grad is None for p in ours[1].parameters())
    assert all(p.grad is not None for p in ours[0].parameters())


# Accumulation and hooks.


def test_accumulating_holds_the_old_and_the_new_gradients_as_eager_does() -> None:
    """The step makes its gradients beside those that are there, then adds in place."""
    ours = at_minimum(Net(64), batch(8, 64))
    step_of(ours, batch(8, 64))
    held = [p.grad for p in ours.parameters()]
    step_of(ours, batch(8, 64))
    assert all(p.grad is before for p, before in zip(ours.parameters(), held, strict=True))


def test_an_optimizer_may_step_and_free_gradients_inside_of_the_backward() -> None:
    results = []
    for model in twins(Net):
        if results:
            at_minimum(model, batch())
        optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}

        def step(parameter: Tensor, optimizers: Any = optimizers) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for turn in range(3):
            step_of(model, batch(), seed=turn)
        results.append([p.detach().clone() for p in model.parameters()])
        assert all(p.grad is None for p in model.parameters())
    assert all(same(a, b) for a, b in zip(*results, strict=True))


def test_every_hook_of_the_outer_module_runs_at_every_step() -> None:
    logs: list[list[Tensor]] = []
    for model in twins(Net):
        if logs:
            store_all(model)
        log: list[Tensor] = []
        logs.append(log)
        model.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        model.register_forward_hook(lambda module, args, output: output * 1.5)
        model.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 2,))
        model.register_full_backward_hook(lambda module, given, got, log=log: log.extend((given[0], got[0])))
        for turn in range(2):
            x = batch().requires_grad_()
            step_of(model, x, seed=turn)
            assert x.grad is not None
            log.append(x.grad)
        log.extend(g for g in gradients_of(model).values() if g is not None)
    assert len(logs[0]) == len(logs[1])
    assert all(same(a, b) for a, b in zip(*logs, strict=True))


# Functions of the user's own.


class Scaled(torch.autograd.Function):
    """Arguments that aren't tensors, Python state between forward and backward, differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, names: tuple[str, ...], flag: bool | None = None) -> Tensor:
        ctx.scale, ctx.names, ctx.rows = scale, names, len(x)
        ctx.save_for_backward(x)
        return x * scale + len(names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradient * ctx.scale * x.cos() * len(ctx.names) * ctx.rows, None, None, None


class Again(torch.autograd.Function):
    """Its backward calls autograd, as torch's own checkpointing by re-entry does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x * weight).tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            x, weight = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
            return torch.autograd.grad((x * weight).tanh(), (x, weight), gradient)


class Setup(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.scale = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        return None if gradient is None else gradient * ctx.scale * 2, None


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 5


class WithMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.mask = x > 0
        ctx.mark_non_differentiable(ctx.mask)
        return x.clone(), ctx.mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        return gradient * ctx.mask


class OwnFunctions(Net):
    def __init__(self) -> None:
        super().__init__(blocks=2)
        self.weight = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Any:
        hidden = Scaled.apply(self.blocks(x), 2.5, ("a", "b"), True)
        hidden = Setup.apply(Again.apply(hidden, self.weight), 3.0)
        return WithMask.apply(Dirty.apply(hidden.clone()))


def test_functions_of_ones_own_are_part_of_the_step() -> None:
    check_steps(OwnFunctions, batch())


# Activation checkpointing in the model.


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(super().forward, self.blocks[:3](x), use_reentrant=False)


def test_regions_of_activation_checkpointing_are_part_of_the_step() -> None:
    check_steps(Checkpointed, batch())


class Selective(Net):
    """Products must be saved, by a policy."""

    def forward(self, x: Tensor) -> Any:
        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            product = op is torch.ops.aten.addmm.default
            return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(super().forward, x, use_reentrant=False, context_fn=contexts)


def test_what_a_policy_says_must_be_saved_is_not_recomputed() -> None:
    counts = {}
    for kind in (Net, Selective):
        (plan,) = plans_of(check_steps(lambda kind=kind: kind(blocks=6), batch(64)))
        runs = Counter((*plan.schedule.forward, *plan.schedule.backward))
        counts[kind] = [runs[op.name] for op in plan.graph.ops if op.target.startswith("aten.addmm")]
    assert max(counts[Net]) > 1  # without the policy it pays to
    assert set(counts[Selective]) == {1}


class Reentrant(Net):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.blocks[3:], self.blocks[:3](x), use_reentrant=True)


def test_checkpointing_by_reentry_is_refused_with_the_way_round() -> None:
    eager, ours = twins(Reentrant)
    store_all(ours)
    with pytest.raises(remat.CaptureError, match="use_reentrant=False"):
        ours(batch())
    assert_same_step(step_of(eager, batch()), step_of(remat.unwrap(ours), batch()))


# What goes around a step.


@pytest.mark.parametrize("around", ["hooks", "save_on_cpu", "checkpoint"])
def test_hooks_on_saved_tensors_around_a_step_are_refused(around: str) -> None:
    eager, ours = twins(Net)
    store_all(ours)
    calls: dict[str, Callable[[], Any]] = {
        "checkpoint": lambda: checkpoint(ours, batch(), use_reentrant=False),
        "save_on_cpu": lambda: _under(save_on_cpu(), ours),
        "hooks": lambda: _under(saved_tensors_hooks(lambda t: t.detach() * 2, lambda t: t), ours),
    }
    with pytest.raises(remat.RematerializeError, match=r"saved_tensors_hooks.*outside"):
        calls[around]()
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


def _under(context: Any, model: nn.Module) -> Any:
    with context:
        return model(batch())


class SavesItsWay(Net):
    context: Any = staticmethod(lambda: saved_tensors_hooks(lambda t: t.detach() * 2, lambda t: t))

    def forward(self, x: Tensor) -> Any:
        with self.context():
            return super().forward(x)


class SavesOnCPU(SavesItsWay):
    context = save_on_cpu


def test_hooks_on_saved_tensors_inside_of_a_model_are_refused_unless_torch_made_them() -> None:
    with pytest.raises(remat.CaptureError, match="saved_tensors_hooks"):
        store_all(SavesItsWay())(batch())
    check_steps(SavesOnCPU, batch())


def test_a_wrapped_part_may_stand_in_a_region_that_is_run_by_reentry() -> None:
    eager, ours = twins(Net)
    store_all(ours)
    inputs = [batch().requires_grad_() for _ in range(2)]
    for model, x in zip((eager, ours), inputs, strict=True):
        torch.manual_seed(SEED)
        total(checkpoint(model, x, use_reentrant=True)).backward()
    assert same(inputs[0].grad, inputs[1].grad)
    assert same_gradients(eager, ours)


@pytest.mark.parametrize("planned", [False, True])
def test_transforms_and_forward_derivatives_through_a_step_are_refused(planned: bool) -> None:
    ours = store_all(nn.Sequential(nn.Linear(16, 16), nn.Tanh()))
    if planned:
        ours(batch())
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(values: Any) -> Tensor:
        return torch.func.functional_call(ours, values, (batch(),)).sum()

    def dual() -> Tensor:
        with forward_ad.dual_level():
            result: Tensor = ours(forward_ad.make_dual(batch(), torch.ones(8, 16)))
        return result

    calls: list[Callable[[], Any]] = [
        lambda: torch.func.grad(loss)(parameters),
        lambda: torch.func.vmap(ours)(batch()),
        lambda: torch.func.jvp(ours, (batch(),), (batch(),)),
        dual,
    ]
    for call in calls:
        with pytest.raises(remat.RematerializeError, match=r"inside the wrapped module's forward.*unwrap"):
            call()


@pytest.mark.parametrize("loss", ["linear", "curved"])
def test_double_backward_is_refused_whatever_the_loss(loss: str) -> None:
    """A penalty on gradients of a linear loss would lose its part silently: the tangent doesn't require grad."""
    ours = at_minimum(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)), batch().requires_grad_())
    x = batch().requires_grad_()
    output = ours(x)
    value = output.sum() if loss == "linear" else output.square().sum()
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    assert slope.requires_grad
    penalty = (slope.norm(dim=1) - 1).square().mean()
    with pytest.raises(RuntimeError, match=r"double backward.*inside the wrapped module's forward.*unwrap"):
        (output.mean() + penalty).backward()


def test_a_graph_of_gradients_that_nobody_differentiates_is_harmless() -> None:
    eager, ours = twins(Net)
    ours = at_minimum(ours, batch())
    for model in (eager, ours):
        torch.manual_seed(SEED)
        total(model(batch())).backward(create_graph=True)
    assert same_gradients(eager, ours)


# Anomaly mode.


def test_a_step_is_planned_and_run_in_anomaly_mode() -> None:
    with torch.autograd.set_detect_anomaly(True):
        check_steps(Net, batch())


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * 0).sqrt()


def test_a_nan_that_anomaly_mode_finds_stops_the_backward_and_the_next_step_runs() -> None:
    eager, ours = twins(Rooted)
    store_all(ours)
    for model in (eager, ours):
        with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="returned nan values"):
            model(batch()).sum().backward()
        model.zero_grad()
        total(model(batch())).backward()
    assert all(p.grad is not None and p.grad.isnan().any() for p in ours.parameters())
