"""One case, judged: captured or refused, and if captured, the same step as eager's at both ends of the budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import rematerialize as remat
from benchmarks.captures.case import Case
from benchmarks.captures.records import Result
from rematerialize.harness import Stepper, StepResult, buffer_state, compare_steps, run_step
from rematerialize.peers import Ours, one_line

SEED = 5
STEPS = 2
ROUNDING = 2e-6  # relative to the largest magnitude of eager's tensor, where a case says that it rounds
BUDGETS = ("store-all", "minimum")


def check(case: Case, budgets: tuple[str, ...] = BUDGETS) -> Result:
    """Run a case under each budget, some steps each, and compare them with eager's."""
    try:
        eager = _steps(_eager(case))
    except Exception as error:  # whatever torch raises is its answer
        return Result(case.name, case.family, "not in eager", one_line(error, width=300))
    try:
        ours = Ours(case.spec(), "test")
    except remat.RematerializeError as error:
        return Result(case.name, case.family, "refused", str(error))
    start = _State(ours.module, ours.inputs)
    wrong = []
    exact = True
    for budget in budgets:
        start.restore()
        steps = _steps(ours.stepper(ours.store_all if budget == "store-all" else ours.plan(budget)))
        wrong += [f"{budget}, {text}" for text in _differences(case, eager, steps)]
        exact = exact and not any(_differences(case, eager, steps, exactly=True))
    return Result(
        case.name,
        case.family,
        "incorrect" if wrong else "supported",
        "; ".join(wrong) or ("" if exact else f"equal up to rounding: {case.rounds}"),
        len(ours.store_all.graph.ops),
        ours.store_all.minimum_bytes / ours.store_all.store_all_peak_bytes,
    )


def _eager(case: Case) -> Stepper:
    spec = case.spec()
    module, inputs = spec.build("test")
    return Stepper(module, inputs, spec.loss_of)


@dataclass(frozen=True, slots=True)
class _Turn:
    step: StepResult
    generators: tuple[torch.Tensor, ...]


def _steps(stepper: Stepper) -> list[_Turn]:
    """Some steps in a row: buffers and generators go on from one to the next."""
    turns = []
    for turn in range(STEPS):
        step = run_step(stepper, seed=SEED + turn)
        own = own_generators(stepper.module, stepper.inputs)
        turns.append(_Turn(step, tuple(generator.get_state() for generator in own)))
    return turns


def _differences(case: Case, eager: list[_Turn], ours: list[_Turn], exactly: bool = False) -> Iterator[str]:
    for turn, (left, right) in enumerate(zip(eager, ours, strict=True)):
        compared = compare_steps(left.step, right.step)
        if not (compared.exact or (case.rounds and not exactly and compared.within(ROUNDING))):
            yield f"step {turn}: {compared.describe()}"
        if any(not torch.equal(a, b) for a, b in zip(left.generators, right.generators, strict=True)):
            yield f"step {turn}: the state of a generator of its own differs"


def own_generators(module: nn.Module, inputs: Any) -> list[torch.Generator]:
    """The generators that a model holds, or that its call passes."""
    values = [value for part in module.modules() for value in vars(part).values()]
    values += inputs.values() if isinstance(inputs, dict) else inputs
    return [value for value in values if isinstance(value, torch.Generator)]


class _State:
    """Buffers and generators as they are now, to go back to."""

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        self.module = module
        self.buffers = buffer_state(module)
        self.generators = [(each, each.get_state()) for each in own_generators(module, inputs)]

    def restore(self) -> None:
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if buffer.layout is torch.strided:  # sparse ones can't be written to, nor are they changed
                    buffer.copy_(self.buffers[name])
        for generator, state in self.generators:
            generator.set_state(state)
