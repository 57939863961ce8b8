"""One case, eager and wrapped at the plan's minimum: the same bits, or a refusal of our own in a line.

Two steps are compared: the second one starts where the first left gradients, buffers and the plan.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rematerialize as remat
from benchmarks.conformance.cases import SEED, Case, detached
from benchmarks.conformance.records import Verdict
from rematerialize.api import choose
from rematerialize.budget import read_budget
from rematerialize.errors import RematerializeError
from rematerialize.prepare import bind_inputs, check_model, prepare, shared_costs

STEPS = 2
LONGEST_MESSAGE = 700


def judge(case: Case) -> Verdict:
    """Return what became of a case: "pass", "refused", "failed", or "skipped" where eager has no training step."""

    def verdict(status: Any, reason: str = "", detail: str = "") -> Verdict:
        return Verdict(case.name, case.index, case.dtype, status, reason, detail)

    try:
        made = case.make()
        eager = _steps(*copied(made))
    except NothingToTrain:
        return verdict("skipped", "no output requires grad")
    except Exception as error:
        return verdict("skipped", "eager raises", _line(error))
    # What two eager runs don't agree on, nobody can repeat.
    allowed = set(_differences(eager, _steps(*copied(made))))
    try:
        wrapped, args, kwargs = copied(made)
        ours = _steps(at_minimum(wrapped, args, kwargs), args, kwargs)
    except RematerializeError as error:
        text = str(error)
        if "\n" in text or not text or len(text) > LONGEST_MESSAGE:
            return verdict("failed", "refused without one clear line", _line(error))
        return verdict("refused", type(error).__name__, text)
    except Exception as error:
        return verdict("failed", "an error that isn't ours", _line(error))
    wrong = sorted(set(_differences(eager, ours)) - allowed)
    if wrong:
        return verdict("failed", "differs from eager", ", ".join(wrong))
    return verdict("pass", "", "eager isn't repeatable: " + ", ".join(sorted(allowed)) if allowed else "")


def at_minimum(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """Wrap at the plan's minimum, where the most is recomputed; costs are measured once, not timed."""
    shared_costs().time_limit_s = 0.0
    checked = check_model(model)
    example: Any = args
    if kwargs:
        example = {**dict(zip(_positional(model, len(args)), args, strict=True)), **kwargs}
    inputs = bind_inputs(checked.forward, example)
    prepared = prepare(checked, checked.forward, inputs)
    plan = choose(checked, prepared, read_budget(None, prepared.planner.minimum()))
    return remat.wrap(checked, plan=plan)


def _positional(model: nn.Module, count: int) -> list[str]:
    import inspect

    return list(inspect.signature(model.forward).parameters)[:count]


class NothingToTrain(Exception):
    """No output of the eager step requires grad."""


@dataclass(frozen=True, slots=True)
class Shown:
    """All that the steps show: by name, tensors or plain values."""

    values: dict[str, Any]


def copied(made: tuple[nn.Module, tuple[Any, ...], dict[str, Any]]) -> Any:
    """Return the module and its call again, nothing shared with the first."""
    model, args, kwargs = made
    args, kwargs = detached((args, kwargs))
    return copy.deepcopy(model), args, kwargs


def _steps(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shown:
    values: dict[str, Any] = {}
    for turn in range(STEPS):
        torch.manual_seed(SEED + turn)
        output = model(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(output)
        values[f"structure of outputs, step {turn}"] = str(spec)
        for at, leaf in enumerate(leaves):
            values[f"output {at}, step {turn}"] = _kept(leaf)
            if isinstance(leaf, Tensor):
                values[f"requires_grad of output {at}, step {turn}"] = leaf.requires_grad
        loss = loss_of(leaves)
        values[f"loss, step {turn}"] = _kept(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            values[f"gradient of {name}, step {turn}"] = _kept(parameter.grad)
        for at, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
            if isinstance(leaf, Tensor):
                values[f"gradient of input {at}, step {turn}"] = _kept(leaf.grad)
                values[f"input {at}, step {turn}"] = _kept(leaf)
        for name, buffer in model.named_buffers():
            values[f"buffer {name}, step {turn}"] = _kept(buffer)
        values[f"generator state, step {turn}"] = torch.get_rng_state()
    return Shown(values)


def _kept(value: Any) -> Any:
    """A copy that shows the layout, too; what has no strides stands for itself."""
    if not isinstance(value, Tensor):
        return value
    return copy.deepcopy(value.detach())


def loss_of(leaves: list[Any]) -> Tensor:
    """A scalar that every differentiable output takes part in, with a gradient that isn't constant."""
    parts = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not parts:
        raise NothingToTrain
    losses = []
    generator = torch.Generator().manual_seed(SEED)
    for part in parts:
        if part.layout != torch.strided:
            part = part.to_dense()
        weight = torch.empty_like(part.detach())
        weight.copy_(torch.randn(part.shape, generator=generator, dtype=torch.float64))
        product = part * weight
        losses.append((product.real if product.is_complex() else product).sum().double())
    return torch.stack(losses).sum()


def _differences(left: Shown, right: Shown) -> Iterator[str]:
    for name in left.values.keys() | right.values.keys():
        if name not in left.values or name not in right.values or not _same(left.values[name], right.values[name]):
            yield name


def _same(left: Any, right: Any) -> bool:
    """Type, layout and bits; any NaN is as good as another."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return type(left) is type(right) and bool(left == right or left != left)
    if (left.dtype, left.shape, left.layout) != (right.dtype, right.shape, right.layout):
        return False
    if left.layout != torch.strided:
        return _same(left.to_dense(), right.to_dense())
    if strides_of(left) != strides_of(right):
        return False
    if left.is_complex():
        left, right = torch.view_as_real(left.resolve_conj()), torch.view_as_real(right.resolve_conj())
    left, right = left.resolve_neg().contiguous(), right.resolve_neg().contiguous()
    if not left.is_floating_point():
        return torch.equal(left, right)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    equal = (left.view(integer) == right.view(integer)) | (left.isnan() & right.isnan())
    return bool(equal.all())


def strides_of(tensor: Tensor) -> list[int]:
    """Return the strides that say where an element is: not those of a single index."""
    if not tensor.numel():
        return []
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
