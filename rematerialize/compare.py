"""One target, every way of stepping it: eager, per-block checkpointing, torch's own budget, and plans of ours.

Correctness gates every figure: a contestant's loss, gradients, buffers and generator are compared with eager's before
its peak is measured, and what isn't eager's step is marked. Times are taken in turns, a new order every round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rematerialize.api import choose
from rematerialize.budget import BudgetRequest, read_budget
from rematerialize.errors import BudgetError
from rematerialize.harness import (
    Comparison,
    Stepper,
    StepResult,
    buffer_state,
    clear_gradients,
    compare_steps,
    measure_step_peak,
    restore_buffers,
    run_step,
    time_interleaved,
)
from rematerialize.prepare import PreparedStep, home_of, prepare_example
from rematerialize.targets.factory import blame
from rematerialize.targets.load import Target
from rematerialize.torch_budget import TORCH_BUDGETS, PeerError, compiled_under, one_line
from rematerialize.trial import planned_forward, undisturbed
from rematerialize.units import format_bytes

ROUNDING = 1e-5  # relative: another order of the same float32 sums
SEED = 1
STORE_ALL, PER_BLOCK = "store-all", "per block"

Status = Literal["ok", "wrong gradients", "buffers differ", "doesn't fit", "failed"]
Make = Callable[[bool], Target]  # make(per_block): the target anew, with the same parameters


@dataclass(frozen=True, slots=True)
class Cell:
    """One contestant.

    Attributes
    ----------
    name : str
    status : str
        "ok": eager's step, bit for bit or up to rounding. "wrong gradients", "buffers differ" (generator included):
        it ran, and did something else. "doesn't fit", "failed": it didn't run.
    detail : str
        How far off it is, how it was made, or why it failed.
    peak_bytes, step_s, ratio : optional
        Measured peak in the activation scope, median time of a step, and over store-all's; None if it didn't run.
    """

    name: str
    status: Status
    detail: str = ""
    peak_bytes: int | None = None
    step_s: float | None = None
    ratio: float | None = None


class Contest:
    """Contestants of one target, entered one by one and then timed together.

    Parameters
    ----------
    target : Target
        With real tensors.
    make : callable
        ``make(per_block)`` returns the target anew, with the same parameters.
    say : callable, optional
        Told every cell as it is made.
    cost_cache : Path, optional
        Where measured costs are kept.
    """

    def __init__(
        self,
        target: Target,
        make: Make,
        say: Callable[[Cell], None] | None = None,
        cost_cache: Path | None = None,
    ) -> None:
        self.make = make
        self.cost_cache = cost_cache
        self.say = say or (lambda cell: None)
        self.target = target
        self.eager = _stepper(self.target)
        self.device = str(home_of(self.target.model))
        self.start: dict[str, Tensor] = buffer_state(self.target.model)
        self.cells: dict[str, Cell] = {}
        self.steppers: dict[str, Stepper] = {}
        with blame(f"a step of {self.target.name}"):
            self.reference: StepResult = run_step(self.eager, seed=SEED, buffers=self.start)
        self.prepared: PreparedStep | None = None
        self.enter(STORE_ALL, lambda: self.eager)

    def enter(self, name: str, prepare: Callable[[], Stepper]) -> Cell:
        """Prepare, check and measure one contestant; whatever it raises becomes its cell."""
        try:
            stepper = prepare()
            cell = self._checked(name, stepper)
            self.steppers[name] = stepper
        except BudgetError as error:
            cell = Cell(name, "doesn't fit", f"the smallest that works is {error.minimum_bytes:,} B")
        except PeerError as error:
            cell = Cell(name, "failed", str(error))
        except Exception as error:  # a contestant's failure is a result, not the end of the contest
            cell = Cell(name, "failed", one_line(error))
        clear_gradients(self.target.model)
        self.cells[name] = cell
        self.say(cell)
        return cell

    def _checked(self, name: str, stepper: Stepper) -> Cell:
        comparison = compare_steps(self.reference, run_step(stepper, seed=SEED, buffers=self.start))
        restore_buffers(stepper.module, self.start)
        peak = measure_step_peak(stepper, seed=SEED, device=self.device).peak_bytes
        restore_buffers(stepper.module, self.start)
        notes = [] if comparison.exact else [comparison.describe()]
        notes += [stepper.note] if stepper.note else []
        return Cell(name, judged(comparison), "; ".join(notes), peak)

    def per_block(self) -> Stepper:
        """Activation checkpointing as people place it."""
        twin = self.make(True)
        return replace(_stepper(twin), note=twin.note)

    def torch_budget(self, budget: float) -> Stepper:
        """Torch's own budget."""
        return compiled_under(lambda: _stepper(self.make(False)), budget)

    def ours(self, request: BudgetRequest | Literal["minimum"]) -> Stepper:
        """A plan of this package; the step is captured once for all of them."""
        if self.prepared is None:
            self.prepared = prepare_example(self.target.model, self.target.inputs, cost_cache=self.cost_cache)
        if request == "minimum":
            request = read_budget(None, self.prepared.minimum())
        made = choose(self.target.model, self.prepared, request)
        plan = replace(made, prepared=self.prepared)
        note = ""
        if made.origin.whole:
            besides = made.besides_bytes
            held, allowed = format_bytes(made.peak_bytes + besides), format_bytes(made.budget_bytes + besides)
            note = f"{held} of {allowed} with what is resident or reserved"
        return replace(self.eager, call=planned_forward(self.target.model, plan, self.target.inputs), note=note)

    def time(self, rounds: int) -> tuple[Cell, ...]:
        """Time all that can step, in turns, and return the finished cells."""
        steps = {name: partial(stepper.step, SEED) for name, stepper in self.steppers.items()}
        wait = torch.cuda.synchronize if self.device.startswith("cuda") else None
        timings = time_interleaved(steps, reference=STORE_ALL, rounds=rounds, synchronize=wait)
        for name, timing in timings.items():
            self.cells[name] = replace(self.cells[name], step_s=timing.median_s, ratio=timing.ratio)
        restore_buffers(self.target.model, self.start)
        clear_gradients(self.target.model)
        return tuple(self.cells.values())


def _stepper(target: Target) -> Stepper:
    return Stepper(target.model, target.inputs, target.loss_of)


def judged(comparison: Comparison) -> Status:
    """Is it eager's step?"""
    if comparison.within(ROUNDING):
        return "ok"
    return "wrong gradients" if comparison.max_relative > ROUNDING else "buffers differ"


def compare(
    target: Target,
    make: Make,
    requests: Sequence[tuple[str, BudgetRequest]] = (),
    *,
    rounds: int = 5,
    say: Callable[[Cell], None] | None = None,
    cost_cache: Path | None = None,
) -> tuple[Cell, ...]:
    """Run every contestant on one target.

    Parameters
    ----------
    target : Target
        With real tensors; left as it was.
    make : callable
        ``make(per_block)`` returns the target anew, with the same parameters every time.
    requests : sequence of (name, BudgetRequest)
        Budgets for plans of ours; without any: half of store-all's peak, the peak of per-block checkpointing, and
        the least that works.
    rounds : int
        Of timing.
    say : callable, optional
        Told every cell before it is timed.
    cost_cache : Path, optional
        Where measured costs are kept.

    Returns
    -------
    tuple of Cell
        Store-all first.
    """
    with undisturbed(target.model):
        return _contested(Contest(target, make, say, cost_cache), requests, rounds)


def _contested(contest: Contest, requests: Sequence[tuple[str, BudgetRequest]], rounds: int) -> tuple[Cell, ...]:
    per_block = contest.enter(PER_BLOCK, contest.per_block)
    for budget in TORCH_BUDGETS:
        contest.enter(f"torch {budget:g}", partial(contest.torch_budget, budget))
    for name, request in requests:
        contest.enter(f"ours {name}", partial(contest.ours, request))
    if not requests:
        contest.enter("ours 50%", partial(contest.ours, read_budget(None, "50%")))
        if per_block.peak_bytes is not None:
            same = read_budget(None, per_block.peak_bytes)
            contest.enter("ours at per block's peak", partial(contest.ours, same))
        contest.enter("ours minimum", partial(contest.ours, "minimum"))
    return contest.time(rounds)
