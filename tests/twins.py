"""A model and its wrapped twin: the same start, the same steps, compared bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rematerialize as remat
from rematerialize.api import choose
from rematerialize.budget import read_budget
from rematerialize.prepare import bind_inputs, prepare
from rematerialize.runtime import TrainingStep
from rematerialize.wrapper import RematerializedForward

SEED = 11


def at_minimum(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Wrap at the plan's minimum, where the most is recomputed; one capture."""
    inputs = bind_inputs(model.forward, args or kwargs)
    prepared = prepare(model, model.forward, inputs)
    plan = choose(model, prepared, read_budget(None, prepared.planner.minimum()))
    return remat.wrap(model, plan=plan)


def store_all(model: nn.Module) -> nn.Module:
    return remat.wrap(model, activation_budget="100%")


def run_by(model: nn.Module, step: TrainingStep) -> nn.Module:
    """The model with one emitted step for a forward."""

    def forward(*args: Any) -> Any:
        return step([*(slot.read() for slot in step.captured.slots), *args])

    model.forward = forward  # type: ignore[method-assign]
    return model


def planner_of(model: nn.Module) -> RematerializedForward:
    forward = vars(model)["forward"]
    assert isinstance(forward, RematerializedForward)
    return forward


def plans_of(model: nn.Module) -> list[remat.Plan]:
    return list(remat.plans_of(model))


def tensors_in(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def total(output: Any) -> Tensor:
    """A scalar that every differentiable output takes part in, with a gradient that isn't constant."""
    parts = [leaf for leaf in tensors_in(output) if leaf.requires_grad]
    losses = [(part * part.detach().abs().add(0.5)).abs().sum() for part in parts]
    return torch.stack(losses).sum()


@dataclass(frozen=True, slots=True)
class Step:
    """All that one step shows: outputs, gradients, buffers, and where it left the generator."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    generator: Tensor


def step_of(
    model: nn.Module,
    *args: Any,
    loss_of: Callable[[Any], Tensor] = total,
    seed: int | None = SEED,
    **kwargs: Any,
) -> Step:
    """One forward and backward; gradients add to what is there."""
    if seed is not None:
        torch.manual_seed(seed)
    output = model(*args, **kwargs)
    loss_of(output).backward()
    return Step(
        [leaf.detach().clone() for leaf in tensors_in(output)],
        gradients_of(model),
        {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        torch.get_rng_state(),
    )


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in model.named_parameters()
    }


def same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and left.stride() == right.stride() and torch.equal(left, right)


def same_gradients(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = gradients_of(left), gradients_of(right)
    return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)


def differences(eager: Step, ours: Step) -> Iterator[str]:
    if len(eager.outputs) != len(ours.outputs):
        yield f"{len(ours.outputs)} outputs, eager {len(eager.outputs)}"
    for index, (left, right) in enumerate(zip(eager.outputs, ours.outputs, strict=False)):
        if not same(left, right):
            yield f"output {index}"
    for kind, a, b in (
        ("gradient", eager.gradients, ours.gradients),
        ("buffer", eager.buffers, ours.buffers),
    ):
        if a.keys() != b.keys():
            yield f"{kind} names"
        for name in a.keys() & b.keys():
            if not same(a[name], b[name]):
                yield f"{kind} of {name}"
    if not torch.equal(eager.generator, ours.generator):
        yield "generator state"


def assert_same_step(eager: Step, ours: Step) -> None:
    assert list(differences(eager, ours)) == []


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Two equal models, neither wrapped."""
    torch.manual_seed(1)
    eager = make()
    return eager, copy.deepcopy(eager)


def check_steps(make: Callable[[], nn.Module], *args: Any, steps: int = 2, **kwargs: Any) -> nn.Module:
    """Some steps of a model and of its twin wrapped at the minimum are the same; returns the twin."""
    eager, ours = twins(make)
    ours = at_minimum(ours, *args, **kwargs)
    for turn in range(steps):
        assert_same_step(
            step_of(eager, *args, seed=SEED + turn, **kwargs), step_of(ours, *args, seed=SEED + turn, **kwargs)
        )
    return ours
