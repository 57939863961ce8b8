"""Precision, process-wide settings, randomness and mutation under the lowest budget: eager's bits, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, spectral_norm

import rematerialize as remat
from tests.twins import (
    SEED,
    assert_same_step,
    at_minimum,
    check_steps,
    plans_of,
    same,
    same_gradients,
    step_of,
    store_all,
    total,
    twins,
)

pytestmark = pytest.mark.usefixtures("quick_plans")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = (layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.2)))
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).tanh()


def batch(rows: int = 8) -> Tensor:
    return torch.linspace(-2, 2, rows * 16).reshape(rows, 16).sin()


@pytest.fixture
def settings() -> Iterator[None]:
    """Put process-wide settings back."""
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)


# Low precision.


class Scaled(nn.Module):
    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, dtype=torch.bfloat16)
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.linear(x)) * 0.7


@pytest.mark.parametrize(
    "of",
    [
        lambda h: (h.var(0) + 1e-4).sqrt(),
        lambda h: h.std(1) * 0.3,
        lambda h: F.alpha_dropout(h * 1, 0.3),
        lambda h: torch.add(h, h.sin() * 1, alpha=0.3),
        lambda h: h.sin().mul_(0.3).cos(),
    ],
    ids=["variance", "deviation", "alpha dropout", "alpha", "by hand"],
)
def test_a_low_precision_times_a_number_is_rounded_as_in_eager(of: Callable[[Tensor], Tensor]) -> None:
    """ATen's mul_ by a number rounds the number first, its mul doesn't."""
    check_steps(lambda: Scaled(of), batch().bfloat16())


# Autocast and scaling.


class Mixed(Net):
    """Autocast on for a part and off for the rest."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.blocks[:3](x)
        with torch.autocast("cpu", enabled=False):
            return self.blocks[3:](hidden.float())


def test_autocast_on_and_off_inside_of_a_model_is_part_of_the_step() -> None:
    check_steps(Mixed, batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_a_step_with_a_gradient_scaler_is_eagers(dtype: torch.dtype) -> None:
    found = []
    for model in twins(Net):
        if found:
            with torch.autocast("cpu", dtype=dtype):
                at_minimum(model, batch())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16 if dtype is torch.float16 else 2.0**8)
        for turn in range(3):
            torch.manual_seed(turn)
            with torch.autocast("cpu", dtype=dtype):
                loss = total(model(batch()))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        found.append([*(p.detach().clone() for p in model.parameters()), torch.tensor(scaler.get_scale())])
    assert all(same(a, b) for a, b in zip(*found, strict=True))


class GradientPenalty(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), norm, nn.Tanh(), nn.Conv2d(8, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square()


DIFFERENTIATED_NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(2, 8),
    "layer": lambda: nn.LayerNorm([8, 8, 8]),
    "batch": lambda: nn.BatchNorm2d(8),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
}


@pytest.mark.parametrize("norm", DIFFERENTIATED_NORMS)
def test_second_derivatives_of_norms_under_autocast_are_eagers(norm: str) -> None:
    x = torch.linspace(-2, 2, 256).mul(7.3).sin().reshape(4, 1, 8, 8)
    eager, ours = twins(lambda: GradientPenalty(DIFFERENTIATED_NORMS[norm]()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        at_minimum(ours, x)
    for model in (eager, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = total(model(x))
        loss.backward()
    assert same_gradients(eager, ours)


def test_a_backward_inside_of_the_autocast_of_its_forward_is_eagers() -> None:
    eager, ours = twins(Net)
    store_all(ours)
    for model in (eager, ours):
        torch.manual_seed(SEED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total(model(batch())).backward()
    assert same_gradients(eager, ours)


def test_a_backward_under_an_autocast_that_would_change_it_is_refused() -> None:
    eager, ours = twins(Net)
    ours = at_minimum(ours, batch())
    loss = total(ours(batch()))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="outside of the autocast"):
        loss.backward()
    ours.zero_grad()
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


# Settings of the process.


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


def test_the_choice_of_attention_kernels_is_part_of_the_signature() -> None:
    eager, ours = twins(Attention)
    store_all(ours)
    x = torch.linspace(-2, 2, 2 * 4 * 32 * 16).reshape(2, 4, 32, 16).sin()
    assert_same_step(step_of(eager, x), step_of(ours, x))
    with sdpa_kernel(SDPBackend.MATH):
        assert_same_step(step_of(eager, x), step_of(ours, x))
    assert len(plans_of(ours)) == 2


SETTINGS: dict[str, tuple[Callable[[Any], None], tuple[Any, ...]]] = {
    "matmul precision": (torch.set_float32_matmul_precision, ("medium", "highest")),
    "deterministic": (torch.use_deterministic_algorithms, (True, False)),
}


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_changed_between_steps_plans_again(name: str) -> None:
    change, values = SETTINGS[name]
    eager, ours = twins(Net)
    store_all(ours)
    for value in (*values, *values):
        change(value)
        assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    assert len(plans_of(ours)) == 2


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_changed_before_the_backward_is_refused_where_it_recomputes(name: str) -> None:
    change, (other, default) = SETTINGS[name]
    eager, ours = twins(Net)
    stored = store_all(twins(Net)[0])
    ours = at_minimum(ours, batch(64))
    losses = []
    for model in (stored, eager, ours):
        torch.manual_seed(SEED)
        losses.append(total(model(batch(64))))
    change(other)
    for loss in losses[:2]:
        loss.backward()
    with pytest.raises(RuntimeError, match=r"in its backward, which recomputes.*settings of the forward"):
        losses[2].backward()
    change(default)
    assert same_gradients(stored, eager)
    for model in (eager, ours):
        model.zero_grad()
    assert_same_step(step_of(eager, batch(64)), step_of(ours, batch(64)))


# Randomness.


def _drop_path(x: Tensor, h: Tensor) -> Tensor:
    return x + h.tanh() * torch.empty(x.shape[0], 1).bernoulli_(0.7) / 0.7


DRAWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "stochastic depth": _drop_path,
    "multinomial": lambda x, h: x + h.tanh().scatter(1, torch.multinomial(h.detach().softmax(-1), 4), 0.0),
    "rrelu": lambda x, h: F.rrelu(h, training=True),
    "gumbel_softmax": lambda x, h: x + F.gumbel_softmax(h, tau=0.7) + F.gumbel_softmax(h, hard=True),
    "alpha_dropout": lambda x, h: F.alpha_dropout(F.selu(h), 0.2, training=True),
    "feature_alpha_dropout": lambda x, h: F.feature_alpha_dropout(F.selu(h)[..., None], 0.2, training=True)[..., 0],
    "feature dropout": lambda x, h: F.dropout2d(h.view(-1, 4, 2, 2), 0.3, training=True).view(-1, 16).tanh(),
    "rsample": lambda x, h: Normal(h, 1.0, validate_args=False).rsample().tanh(),
    "bernoulli of the values": lambda x, h: h * torch.bernoulli(h.sigmoid().detach()),
}


class Draws(nn.Module):
    def __init__(self, draw: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.draw(x, layer(x))
        return x


@pytest.mark.parametrize("name", DRAWS)
def test_what_a_step_draws_is_what_eager_draws(name: str) -> None:
    check_steps(lambda: Draws(DRAWS[name]), batch())


def test_a_distribution_that_checks_its_arguments_is_refused() -> None:
    # Asked for: libraries that are imported in the same process turn the default off.
    ours = store_all(Draws(lambda x, h: Normal(h, 1.0, validate_args=True).rsample()))
    with pytest.raises(remat.CaptureError, match="depends on the values of its tensors"):
        ours(batch())


# State that a forward changes.


class Tracks(nn.Module):
    """A moving average that the same forward reads, beside a weight that is computed at each call."""

    def __init__(self, normed: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = normed(nn.Linear(16, 16)), nn.Linear(16, 16)
        self.register_buffer("average", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        with torch.no_grad():
            self.average.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        return self.second(hidden + self.average).tanh()


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral_norm of old": spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", NORMS)
def test_normed_weights_and_moving_averages_are_updated_once_per_step(name: str) -> None:
    check_steps(lambda: Tracks(NORMS[name]), batch())


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"affine": False}, {"momentum": 0.5}])
def test_batch_norms_that_are_recomputed_leave_eagers_statistics(options: dict[str, Any]) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            *(p for _ in range(3) for p in (nn.Linear(16, 16), nn.BatchNorm1d(16, **options), nn.Tanh()))
        )

    (plan,) = plans_of(check_steps(make, batch(64), steps=3))
    assert plan.recomputed > 0


def test_a_batch_norm_that_averages_over_all_steps_is_refused() -> None:
    """Its factor is a Python number made from the count of steps, ``momentum=None``."""
    ours = store_all(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16, momentum=None)))
    with pytest.raises(remat.CaptureError, match="depends on the values of its tensors"):
        ours(batch())


def test_synchronized_batch_norm_of_one_process_is_eagers() -> None:
    check_steps(lambda: nn.Sequential(nn.Linear(16, 16), nn.SyncBatchNorm(16), nn.Tanh()), batch())


class Mutates(nn.Module):
    """Writes through views of a buffer and of an activation; hands out the buffer, an input and views of both."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("queue", torch.zeros(4, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.queue[1:3].add_(x[:2].detach())
        hidden = self.linear(x)
        changed = hidden.clone()
        changed[:, :4] *= 2
        changed.t()[3].mul_(3)
        self.queue[0].copy_(hidden[0].detach())
        return changed.tanh() + self.queue.sum(0), self.queue[1], x, x[1:]


def test_writes_through_views_and_outputs_that_alias_state_are_as_in_eager() -> None:
    """A view of a buffer among the outputs stood behind the backward, and the buffer's update with it."""
    eager, ours = twins(Mutates)
    ours = at_minimum(ours, batch())
    for turn in range(2):
        assert_same_step(step_of(eager, batch(), seed=turn), step_of(ours, batch(), seed=turn))
    x = batch()
    outputs = ours(x)
    assert outputs[1].data_ptr() == ours.queue[1].data_ptr()
    assert outputs[2] is x
    assert outputs[3].data_ptr() == x[1:].data_ptr()
