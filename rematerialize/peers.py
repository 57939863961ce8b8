"""The peers on the zoo, each as something that can do a step: eager, per-block checkpointing, torch's budget, ours."""

from __future__ import annotations

from rematerialize.api import Plan, choose, plan
from rematerialize.budget import read_budget
from rematerialize.harness import Stepper
from rematerialize.torch_budget import TORCH_BUDGETS, PeerError, compiled_under, one_line
from rematerialize.trial import planned_forward
from rematerialize.zoo.spec import ModelSpec, Scale

__all__ = ["TORCH_BUDGETS", "Ours", "PeerError", "eager", "one_line", "per_block", "torch_budget"]


def eager(spec: ModelSpec, scale: Scale, *, seed: int = 0) -> Stepper:
    """Return the model as its author wrote it."""
    model, inputs = spec.build(scale, seed=seed)
    return Stepper(model, inputs, spec.loss_of)


def per_block(spec: ModelSpec, scale: Scale, *, seed: int = 0) -> Stepper:
    """Return the twin with `torch.utils.checkpoint` around each natural block.

    Raises
    ------
    PeerError
        When the model has no such twin.
    """
    if spec.per_block is None:
        raise PeerError(spec.per_block_reason)
    model, inputs = spec.build(scale, seed=seed, per_block=True)
    return Stepper(model, inputs, spec.loss_of)


def torch_budget(spec: ModelSpec, scale: Scale, budget: float, *, seed: int = 0) -> Stepper:
    """Return the model compiled under torch's own `activation_memory_budget`.

    Raises
    ------
    PeerError
        When no way of compiling it runs a step.
    """
    return compiled_under(lambda: eager(spec, scale, seed=seed), budget)


class Ours:
    """One model captured once, stepping under any number of plans of this package.

    All its steppers share the module: what one step does to its buffers, the next one finds.
    """

    def __init__(self, spec: ModelSpec, scale: Scale, *, seed: int = 0) -> None:
        self.loss_of = spec.loss_of
        self.module, self.inputs = spec.build(scale, seed=seed)
        self.store_all = plan(self.module, self.inputs, activation_budget="100%")

    def plan(self, activation_budget: int | str) -> Plan:
        """Return the plan for a budget; "minimum" is the smallest that works."""
        prepared = self.store_all.prepared
        assert prepared is not None
        minimum = activation_budget == "minimum"
        asked = self.store_all.minimum_bytes if minimum else activation_budget
        return choose(self.module, prepared, read_budget(None, asked))

    def stepper(self, activation_budget: int | str | Plan) -> Stepper:
        """Return the step under a budget or a plan."""
        given = activation_budget
        made = given if isinstance(given, Plan) else self.plan(given)
        return Stepper(self.module, self.inputs, self.loss_of, planned_forward(self.module, made, self.inputs))
