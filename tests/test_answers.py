"""What a forward asks of tensors and of torch: a trace answers as eager does, or the forward is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rematerialize as remat
from tests.twins import assert_same_step, check_steps, same_gradients, step_of, store_all, twins

pytestmark = pytest.mark.usefixtures("quick_plans")


def batch() -> Tensor:
    return torch.linspace(-2, 2, 36).reshape(6, 6).sin()


class Asks(nn.Module):
    def __init__(self, ask: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.ask = ask
        self.linear = nn.Linear(6, 6)
        self.generator = torch.Generator().manual_seed(3)

    def __deepcopy__(self, memo: object) -> Asks:
        copy = Asks(self.ask)
        copy.load_state_dict(self.state_dict())
        return copy

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh() * self.ask(self, x)


def in_double(model: Asks, x: Tensor) -> Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return torch.linspace(0, 1, 6) / 3 + torch.full((6,), 0.1)
    finally:
        torch.set_default_dtype(before)


def kinds(model: Asks, x: Tensor) -> int:
    """What a forward may ask of types, as bits."""
    values = (model.linear(x), model.linear.weight, x, x.detach() > 0, 3, model)
    expected = (Tensor, nn.Parameter, Tensor, Tensor, int, Asks)
    answers = [type(value) is kind for value, kind in zip(values, expected, strict=True)]
    answers += [isinstance(Asks, type), not isinstance(3, type), issubclass(type, object), type(int) == type]  # noqa: E721
    answers += [type("Made", (), {}).__name__ == "Made"]
    return sum(answer << bit for bit, answer in enumerate(answers))


ANSWERED: dict[str, Callable[[Any, Tensor], Any]] = {
    "is it a parameter": lambda m, x: 1 + sum(isinstance(p, nn.Parameter) for p in (m.linear.weight, x)),
    "is anomaly detection on": lambda m, x: 3 if torch.is_anomaly_enabled() else 2,
    "numbers of another default type": in_double,
    "attributes of a parameter": lambda m, x: getattr(m.linear.weight, "mark", 1),
    "types": kinds,
    "a generator drawn from twice": lambda m, x: (
        torch.rand(6, generator=m.generator) + torch.rand(6, generator=m.generator)
    ),
}


@pytest.mark.parametrize("ask", ANSWERED.values(), ids=ANSWERED)
def test_a_trace_answers_as_eager(ask: Callable[[Any, Tensor], Any]) -> None:
    eager, ours = twins(lambda: Asks(ask))
    for model in (eager, ours):
        model.linear.weight.mark = 5
    store_all(ours)
    for turn in range(2):
        assert_same_step(step_of(eager, batch(), seed=turn), step_of(ours, batch(), seed=turn))


def caught(model: Asks, x: Tensor) -> float:
    try:
        return 1 / x.norm().item()
    except Exception:
        return 1.0


def suppressed(model: Asks, x: Tensor) -> float:
    with suppress(Exception):
        return float(x.detach().numpy().max())
    return 1.0


def the_same_noise(model: Asks, x: Tensor) -> Tensor:
    before = model.generator.get_state()
    first = torch.rand(6, generator=model.generator)
    model.generator.set_state(before)
    return first + torch.rand(6, generator=model.generator)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a look at a value, and the refusal caught": (caught, "depends on the values of its tensors"),
    "a look at all values, suppressed": (suppressed, "numpy"),
    "a generator set back": (the_same_noise, "sets the state of a random generator"),
    "the seed": (lambda m, x: torch.initial_seed() % 7, "reads its seed"),
    "is it a leaf": (lambda m, x: 2 if m.linear.weight.is_leaf else 3, "asks where a tensor comes from"),
    "has it a history": (lambda m, x: 2 if x.grad_fn is None else 3, "asks where a tensor comes from"),
    "a thread": (lambda m, x: in_a_thread(lambda: m.linear(x)), "in another thread"),
    "a compiled part": (lambda m, x: torch.compile(m.linear, backend="eager")(x), "torch.compile compiles"),
    "a backward": (lambda m, x: (m.linear(x).sum() * x.requires_grad_().sum()).backward(), "calls backward"),
    "a printed tensor": (lambda m, x: print(m.linear(x)), "the forward formats a tensor"),
    "a formatted number": (lambda m, x: float(f"{m.linear(x).sum():.1f}"), "the forward formats a tensor"),
    "a hook on a parameter": (lambda m, x: hooked(m.linear.weight), "registers a hook on a parameter"),
    "a copy of a part": (lambda m, x: copied(m.linear)(x), "copies a module or a parameter"),
}


def in_a_thread(function: Callable[[], Tensor]) -> Tensor:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def hooked(weight: Tensor) -> float:
    weight.register_hook(lambda gradient: gradient * 0.5)
    return 1.0


def copied(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module)


@pytest.mark.parametrize(("ask", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_trace_would_answer_otherwise_is_refused(ask: Callable[[Any, Tensor], Any], words: str) -> None:
    model = store_all(Asks(ask))
    with pytest.raises(remat.CaptureError, match=words):
        model(batch())


class Doubling(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(torch.cos if func is torch.sin else func, types, args, kwargs)


def test_tensors_with_functions_of_their_own_are_refused() -> None:
    model = store_all(nn.Linear(6, 6))
    with pytest.raises(remat.CaptureError, match="input 0 is a Doubling, whose __torch_function__"):
        model(batch().as_subclass(Doubling))


@pytest.mark.parametrize("make", [torch.jit.script, lambda layer: torch.jit.trace(layer, batch())])
def test_a_part_that_was_scripted_is_refused_by_name(make: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(remat.RematerializeError, match=r"part '1' is what torch.jit \(script or trace\) made"):
        store_all(nn.Sequential(nn.Linear(6, 6), make(nn.Linear(6, 6))))


class FrozenEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.encoder.eval().requires_grad_(False)
        self.head = nn.Linear(8, 4)

    def train(self, mode: bool = True) -> FrozenEncoder:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=pad))


def test_attention_that_eager_evaluates_by_its_fast_path_is_refused_with_the_way_round() -> None:
    x, pad = torch.randn(3, 4, 8), torch.tensor([[False] * 4, [False] * 2 + [True] * 2, [False] * 3 + [True]])
    model = store_all(FrozenEncoder())
    with pytest.raises(remat.CaptureError, match=r"torch.backends.mha.set_fastpath_enabled\(False\)"):
        model(x, pad)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        check_steps(FrozenEncoder, x, pad)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_model_of_which_all_is_frozen_runs_as_it_is() -> None:
    eager, ours = twins(lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)))
    store_all(ours)
    outputs = []
    for model in (eager, ours):
        model.requires_grad_(False)
        torch.manual_seed(0)
        outputs.append(model(batch()))
    assert torch.equal(*outputs)


def test_parameters_may_be_swapped_after_a_planned_step() -> None:
    model = store_all(nn.Linear(6, 6))
    model(batch()).sum().backward()
    model.zero_grad()
    torch.utils.swap_tensors(model.weight, nn.Parameter(torch.ones(6, 6)))
    assert torch.equal(model(batch()), F.linear(batch(), torch.ones(6, 6), model.bias))


# Functions that tell None from zeros.


class Penalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        return x * w, (x * w).norm()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        first, second = gradients
        if first is None:
            return None, (second * x * w * x / (x * w).norm()).sum(0)
        whole = first if second is None else first + second * x * w / (x * w).norm()
        return whole * w, (whole * x).sum(0)


class TellsNone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.w = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled, norm = Penalized.apply(self.linear(x), self.w)
        return scaled, norm, self.head(scaled.detach())


def test_a_function_that_tells_none_from_zeros_is_refused_where_it_would_meet_none() -> None:
    eager, ours = twins(TellsNone)
    store_all(ours)
    for used in ((0, 1, 2), (0, 1), (2,)):
        for model in (eager, ours):
            model.zero_grad()
            outputs = model(batch())
            torch.stack([outputs[index].sum() for index in used]).sum().backward()
        assert same_gradients(eager, ours)
    with pytest.raises(RuntimeError, match=r"set_materialize_grads\(False\)"):
        ours(batch())[1].backward()


class Again(torch.autograd.Function):
    """Runs a part of the model again in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.part = part
        return part(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.part(x), gradients[0])
        return x.grad, None


def test_a_backward_that_reads_a_parameter_through_a_module_is_refused() -> None:
    model = store_all(Asks(lambda m, x: Again.apply(m.linear(x), m.linear)))
    with pytest.raises(remat.CaptureError, match="a backward reads a tensor that isn't part of the step"):
        model(batch())


# What differs, as docs/semantics.md says.


class ByLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (2 if gradients[0].is_contiguous() else 4)


def test_a_branch_on_the_layout_of_a_gradient_is_the_traces() -> None:
    eager, ours = twins(lambda: Asks(lambda m, x: 1.0))
    eager.forward = lambda x: ByLayout.apply(eager.linear(x))  # type: ignore[method-assign]
    ours.forward = lambda x: ByLayout.apply(ours.linear(x))  # type: ignore[method-assign]
    store_all(ours)
    for model in (eager, ours):
        model(batch()).sum().backward()
    assert torch.equal(eager.linear.bias.grad, 2 * ours.linear.bias.grad)


def test_the_clock_is_that_of_the_trace() -> None:
    model = store_all(Asks(lambda m, x: time.perf_counter()))
    assert torch.equal(model(batch()), model(batch()))


@torch.library.custom_op("rematerialize_tests::noisy", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def noisy(x: Tensor) -> Tensor:
    return x * torch.rand_like(x)


@noisy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


noisy.register_autograd(lambda ctx, gradient: gradient)


def test_a_custom_op_that_draws_and_says_so_is_as_in_eager() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            for _ in range(3):
                h = F.dropout(noisy(h.tanh()), 0.5).exp()
            return h

    check_steps(Noisy, batch())


# Kernels.


def test_complex_products_are_rounded_as_in_eager() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(self.linear(x)).abs()

    for turn in range(4):
        check_steps(Spectrum, torch.randn(6, 6, generator=torch.Generator().manual_seed(turn)))


def _divided_in_place(x: Tensor, divisor: Tensor) -> Tensor:
    y = x * 2
    y.div_(divisor)
    return y * y


@pytest.mark.parametrize(
    "of",
    [
        lambda x, y: x / y,
        _divided_in_place,
        lambda x, y: (y.exp() - 1) / y * x,
        lambda x, y: x.prod(0) + y.prod(),
    ],
    ids=["quotient", "in place", "chained", "product"],
)
def test_complex_quotients_are_rounded_as_in_eager(of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The last elements of a complex division, which fill no vector, are rounded otherwise in place."""

    class Quotient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
            self.y = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

        def forward(self, scale: Tensor) -> Tensor:
            return torch.view_as_real(of(self.x, self.y)) * scale

    for turn in range(6):
        check_steps(Quotient, torch.randn(1, generator=torch.Generator().manual_seed(turn)))


@pytest.mark.parametrize("shape", [(1, 1, 6, 6), (1, 2, 3, 6), (2, 1, 3, 6)])
def test_attention_of_a_value_to_itself_is_planned(shape: tuple[int, ...]) -> None:
    class ToItself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            v = self.linear(x).view(shape)
            return F.scaled_dot_product_attention(v, v, v)

    check_steps(ToItself, batch())


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 2, 1, 0)])
def test_a_convolutions_bias_gets_its_gradient_in_the_order_of_what_arrives(order: tuple[int, ...]) -> None:
    eager, ours = twins(lambda: nn.Conv2d(3, 4, 1))
    store_all(ours)
    x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    for model in (eager, ours):
        out = model(x).permute(order)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        (out.contiguous() * weights).sum().backward()
    assert same_gradients(eager, ours)


def test_an_output_that_is_marked_as_a_conjugate_takes_a_plain_gradient() -> None:
    class Conjugate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return torch.complex(h, h.sin()).conj()

    eager, ours = twins(Conjugate)
    store_all(ours)
    for model in (eager, ours):
        model(batch()).backward(torch.complex(batch(), batch() * 2))
    assert same_gradients(eager, ours)


@pytest.mark.parametrize("dims", [(None, 0), (0, None), (0, 1)])
def test_two_products_of_one_value_have_their_own_gradients(dims: tuple[int | None, ...]) -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.arange(1.0, 7.0).view(2, 3))

        def forward(self, x: Tensor) -> list[Tensor]:
            h = self.w * x
            return [h.prod() if dim is None else h.prod(dim) for dim in dims]

    check_steps(Products, torch.ones(2, 3))


def test_no_module_keeps_a_type_of_its_own() -> None:
    remat.plan(Asks(kinds), (batch(),), budget="100%")
    assert "type" not in globals()
