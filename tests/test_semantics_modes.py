"""Modes, shapes, threads, interrupts and failures: what they leave behind, and that the next step is eager's."""

from __future__ import annotations

import copy
import gc
import itertools
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rematerialize as remat
from rematerialize import measure, prepare, synthetic, timing
from rematerialize.capture import step as capture_step
from rematerialize.torch_private import allocation_events
from tests.twins import (
    assert_same_step,
    at_minimum,
    plans_of,
    same,
    step_of,
    store_all,
    total,
    twins,
)

pytestmark = pytest.mark.usefixtures("quick_plans")


class Net(nn.Module):
    """Linear layers, dropout, a batch norm, a buffer that counts, a cache that the forward fills."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(0.2)
        self.register_buffer("calls", torch.zeros(()))
        self.cache: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.cache["mask"] = torch.ones(x.shape[-1])
        hidden = self.drop(self.norm(self.first(x)).tanh())
        return (self.second(hidden) * self.cache["mask"]).tanh()


def batch(rows: int = 8) -> Tensor:
    return torch.linspace(-2, 2, rows * 16).reshape(rows, 16).sin()


# Shapes.


def test_a_last_smaller_batch_trains_by_a_plan_of_its_own() -> None:
    eager, ours = twins(Net)
    ours = remat.wrap(ours, activation_budget="95%", max_plans=2)
    for turn, rows in enumerate((8, 8, 3, 8, 3, 5, 8)):
        assert_same_step(step_of(eager, batch(rows), seed=turn), step_of(ours, batch(rows), seed=turn))
    assert len(plans_of(ours)) == 2


def test_a_batch_whose_minimum_is_above_the_budget_is_refused_and_leaves_the_model_usable() -> None:
    eager, ours = twins(Net)
    minimum = remat.plan(copy.deepcopy(eager), (batch(),), activation_budget="100%").minimum_bytes
    ours = remat.wrap(ours, activation_budget=minimum, example_inputs=(batch(),))
    assert_same_step(step_of(eager, batch(), seed=1), step_of(ours, batch(), seed=1))
    before = _state(ours)
    with pytest.raises(remat.BudgetError) as refused:
        ours(batch(64))
    assert _changes(before, _state(ours)) == []
    assert refused.value.minimum_bytes > minimum
    assert_same_step(step_of(eager, batch(), seed=2), step_of(ours, batch(), seed=2))


# Modes.


@pytest.mark.parametrize("between", ["eval", "no_grad", "inference_mode", "frozen"])
def test_training_goes_on_after_other_modes(between: str) -> None:
    eager, ours = twins(Net)
    ours = at_minimum(ours, batch())
    found = []
    for model in (eager, ours):
        steps = [step_of(model, batch(), seed=1)]
        if between == "eval":
            model.eval()
            steps.append(step_of(model, batch(), seed=2))
            model.train()
        elif between == "frozen":
            model.first.requires_grad_(False)
            with _no_plan_check(model):
                steps.append(step_of(model, batch(), seed=2))
            model.first.requires_grad_(True)
        else:
            with getattr(torch, between)():
                torch.manual_seed(3)
                steps.append(model(batch()))
        steps.append(step_of(model, batch(), seed=4))
        found.append(steps)
    for expected, got in zip(*found, strict=True):
        if isinstance(expected, Tensor):
            assert same(expected, got)
        else:
            assert_same_step(expected, got)


class _no_plan_check:
    """A model wrapped by a plan takes that plan only: another signature goes by a budget."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = vars(model).get("forward")
        self.model = model

    def __enter__(self) -> None:
        if self.forward is not None:
            remat.unwrap(self.model)
            store_all(self.model)

    def __exit__(self, *exc: object) -> None:
        if self.forward is not None:
            vars(self.model)["forward"] = self.forward


def test_an_input_made_in_inference_mode_is_refused_in_eagers_words() -> None:
    eager, ours = twins(Net)
    store_all(ours)
    with torch.inference_mode():
        x = batch()
    for model in (eager, ours):
        with pytest.raises((RuntimeError, remat.CaptureError), match=r"(?i)inference tensors? cannot be saved"):
            total(model(x)).backward()
    ours.load_state_dict(eager.state_dict())
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


# Hooks of inner modules.


def test_hooks_of_inner_modules_are_told_of_and_torchs_own_are_not() -> None:
    hooked = store_all(Net())
    hooked.second.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(UserWarning, match=r"'second'.*not at every step"):
        hooked(batch())
    plain = Net()
    torch.nn.utils.spectral_norm(plain.second)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        store_all(plain)(batch())


def test_a_hook_for_all_modules_plans_again() -> None:
    eager, ours = twins(lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh()))
    store_all(ours)
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))

    def halve(module: nn.Module, args: Any, output: Tensor) -> Any:
        return output * 0.5 if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(halve)
    try:
        assert_same_step(step_of(eager, batch()), step_of(ours, batch()))
    finally:
        handle.remove()
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


# Threads.


def test_one_model_plans_and_trains_in_several_threads() -> None:
    """While one thread captures, the model holds the trace's tensors: no other step may read them."""
    make: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))  # noqa: E731
    eager, ours = twins(make)
    store_all(ours)
    expected = {rows: eager(batch(rows)) for rows in range(2, 8)}
    ours(batch(2))
    failures: list[object] = []

    def work(rows: tuple[int, ...]) -> None:
        try:
            for count in rows:
                output = ours(batch(count))
                torch.autograd.grad(total(output), list(ours.parameters()))
                if not same(output, expected[count]):
                    failures.append(f"{count} rows differ")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in ((2, 3, 2, 4, 2), (2, 2, 5, 2, 6, 2, 7))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# Failures, and what they leave behind.


def _state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"random": torch.get_rng_state(), "grad mode": torch.is_grad_enabled()}
    found["compiling"] = torch.compiler.is_compiling()
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        found[f"{name}: attributes"] = [(key, id(value)) for key, value in own.items()]
        found[f"{name}: cache"] = dict(own.get("cache", {}))
        found[f"{name}: train"] = module.training
        for table in (module._parameters, module._buffers, module._modules):
            for key, value in table.items():
                found[f"{name}.{key}"] = (id(value), value.clone() if isinstance(value, Tensor) else None)
                if isinstance(value, Tensor):
                    found[f"{name}.{key}.grad"] = value.grad
    return found


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)

    return [key for key in before.keys() | now.keys() if not equal(before.get(key), now.get(key))]


def _raise(kind: type[BaseException]) -> Callable[..., Any]:
    def raising(*args: Any, **kwargs: Any) -> Any:
        raise kind("stop")

    return raising


PLACES: dict[str, tuple[Any, str]] = {
    "before the trace": (capture_step, "tensor_slots"),
    "after the trace": (prepare, "normalize"),
    "kernels": (prepare, "group_kernels"),
    "costs": (measure, "_measure"),
    "a cost": (synthetic, "_synthetic"),
    "a time": (timing, "_time_in_turns"),
    "solver": (prepare, "Planner"),
    "emission": (prepare, "emit"),
}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("place", PLACES)
def test_planning_that_is_stopped_leaves_the_model_as_it_was(
    place: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, ours = twins(Net)
    prepare.shared_costs.cache_clear()
    store_all(ours)
    before = _state(ours)
    with monkeypatch.context() as patched:
        patched.setattr(*PLACES[place], _raise(kind))
        with pytest.raises(kind) as stopped:
            ours(batch())
    assert _changes(before, _state(ours)) == []
    if kind is torch.OutOfMemoryError and "cost" in place:
        assert "one at a time" in "".join(stopped.value.__notes__)
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


@pytest.mark.parametrize("call", [0, 1])
def test_a_forward_that_is_interrupted_during_the_trace_leaves_the_model_as_it_was(call: int) -> None:
    calls = itertools.count()

    class Interrupted(Net):
        def forward(self, x: Tensor) -> Tensor:
            result = super().forward(x)
            if next(calls) == call:
                raise KeyboardInterrupt
            return result

    eager, ours = twins(Net)
    ours.__class__ = Interrupted
    store_all(ours)
    before = _state(ours)
    with pytest.raises(KeyboardInterrupt):
        ours(batch())
    assert _changes(before, _state(ours)) == []
    ours.__class__ = Net  # a forward that counts its calls is refused
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


@pytest.mark.parametrize("part", range(3))
def test_an_interrupt_at_any_line_of_a_capture_leaves_the_model_as_it_was(part: int) -> None:
    """Lines of this package while it captures, every so many of them; the exits of context managers among them."""
    eager, ours = twins(Net)
    lines = _interrupted(copy.deepcopy(ours), at=None)
    for at in range(part * lines // 3, (part + 1) * lines // 3, max(1, lines // 30)):
        before = _state(ours)
        _interrupted(ours, at=at)
        assert _changes(before, _state(ours)) == [], at
    store_all(ours)
    assert_same_step(step_of(eager, batch()), step_of(ours, batch()))


def _interrupted(model: nn.Module, at: int | None) -> int:
    """Capture with a KeyboardInterrupt at the ``at``-th line of capture/step.py and capture/purity.py."""
    seen = 0
    files = ("capture/step.py", "capture/purity.py")

    def trace(frame: types.FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.endswith(files) or "FunctionCaches" in frame.f_code.co_qualname:
            return None
        if event == "line":
            seen += 1
            if seen - 1 == at:
                raise KeyboardInterrupt
        return trace

    inputs = prepare.bind_inputs(model.forward, (batch(),))
    sys.settrace(trace)
    try:
        capture_step.capture(model, model.forward, inputs)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return seen


class Failing(Exception):
    pass


@pytest.mark.parametrize("wrapped", [store_all, lambda model: at_minimum(model, batch(64))])
def test_a_backward_that_raises_leaves_nothing_behind(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    eager, ours = twins(Net)
    ours = wrapped(ours)
    fail = True

    def hook(gradient: Tensor) -> None:
        if fail:
            raise Failing

    for model in (eager, ours):
        model.second.weight.register_hook(hook)
    with pytest.raises(Failing):
        total(ours(batch(64))).backward()  # plans
    ours.zero_grad()
    with allocation_events() as read:
        for _ in range(8):
            output = ours(batch(64))
            loss = total(output)
            seen = weakref.ref(output)
            with pytest.raises(Failing):
                loss.backward()
            del output, loss
            gc.collect()
            assert seen() is None
            ours.zero_grad()
    assert sum(read()) < 8 * batch(64).nbytes / 2  # not one activation per step
    fail = False
    ours.load_state_dict(eager.state_dict())
    assert_same_step(step_of(eager, batch(64)), step_of(ours, batch(64)))


def test_a_model_that_is_dropped_goes_with_its_plans() -> None:
    ours = at_minimum(Net(), batch())
    step_of(ours, batch())
    seen = [weakref.ref(ours), weakref.ref(ours.first.weight)]
    del ours
    gc.collect()
    deadline = time.monotonic() + 2
    while any(one() is not None for one in seen) and time.monotonic() < deadline:
        gc.collect()
    assert [one() for one in seen] == [None, None]
