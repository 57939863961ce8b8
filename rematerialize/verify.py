"""A plan against eager: the same loss, gradients, buffers and generator, and the peak that was promised.

Steps are run by `harness`, which shares nothing with what made the plan. Equal means bit for bit. Two kinds of plans
are equal up to rounding only: those that split a fused recurrence over time, whose weight gradients add up in another
order, and, when the caller allows it, those of a step that the capture itself rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from rematerialize.api import choose
from rematerialize.budget import BudgetRequest
from rematerialize.harness import (
    Comparison,
    Stepper,
    buffer_state,
    compare_steps,
    measure_step_peak,
    restore_buffers,
    run_step,
    weightless_loss,
)
from rematerialize.plans import Plan
from rematerialize.prepare import home_of, matching_variant, prepare_example
from rematerialize.targets.factory import blame
from rematerialize.targets.load import Target
from rematerialize.trial import planned_forward, settle, undisturbed

ROUNDING = 2e-6  # of a tensor's largest magnitude: what float32 sums of some thousand terms differ by in another order
_RESTLESS = 1e-3  # an eager step that doesn't repeat itself excuses at most this
PEAK_TOLERANCE = 0.01  # between the predicted and the measured peak, plus the next line
PEAK_SLACK_BYTES = 64 * 1024

Verdict = Literal["equal", "equal up to rounding", "kept", "close", "off", "DIFFERENT", "EXCEEDED"]
_FAILED = frozenset({"DIFFERENT", "EXCEEDED"})


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a verification.

    Attributes
    ----------
    what : str
        What was compared.
    verdict : str
        In capitals when it breaks the promise.
    detail : str
        How it was found, or how far off it is.
    """

    what: str
    verdict: Verdict
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the promise was kept."""
        return self.verdict not in _FAILED


@dataclass(frozen=True, slots=True)
class Verification:
    """What became of a plan's promises.

    Attributes
    ----------
    plan : Plan
        What was held against eager.
    findings : tuple of Finding
    eager_peak_bytes, planned_peak_bytes : int
        Measured, in the activation scope, a gradient for every output included.
    max_relative : float
        Over loss and gradients of all steps, relative to the largest magnitude of each of eager's tensors.
    """

    plan: Plan
    findings: tuple[Finding, ...]
    eager_peak_bytes: int
    planned_peak_bytes: int
    max_relative: float

    @property
    def passed(self) -> bool:
        """Whether all promises were kept."""
        return all(finding.passed for finding in self.findings)


def verify(
    target: Target,
    plan: Plan | BudgetRequest,
    *,
    steps: int = 1,
    seed: int = 0,
    rounding: bool = False,
    size: Callable[[int], str] = "{:,} B".format,
    cost_cache: Path | None = None,
) -> Verification:
    """Run eager and planned steps from the same state and compare all that they leave behind.

    Parameters
    ----------
    target : Target
        With real tensors; left as it was.
    plan : Plan or BudgetRequest
        Made for this target, in this process or another; or a budget to plan for now.
    steps : int
        How many, at seeds ``seed``, ``seed + 1`` and so on; each begins with the buffers that the one before left.
    rounding : bool
        Accept differences up to `ROUNDING` whatever the plan.
    size : callable
        Writes bytes.
    cost_cache : Path, optional
        Where measured costs are kept.

    Returns
    -------
    Verification

    Raises
    ------
    PlanMismatchError
        If the plan belongs to another model, input shape or torch version.
    BudgetError
        If nothing fits the budget.
    """
    settle(target.model, target.inputs)
    prepared = prepare_example(target.model, target.inputs, cost_cache=cost_cache)
    if isinstance(plan, BudgetRequest):
        plan = choose(target.model, prepared, plan)
    splits = matching_variant(prepared, plan.graph) is prepared.finer  # masks drawn as bytes change no value
    eager = Stepper(target.model, target.inputs, target.loss_of)
    forward = planned_forward(target.model, replace(plan, prepared=prepared), target.inputs)
    ours = replace(eager, call=forward)
    start = buffer_state(target.model)
    with undisturbed(target.model):
        runs = _run(f"a step of {target.name}", eager, ours, start, range(seed, seed + steps))
        peaks = [_peak(stepper, start, seed) for stepper in (eager, ours)]
    findings = [*_step_findings(runs, splits, rounding), *_peak_findings(plan, peaks[1], size)]
    return Verification(plan, tuple(findings), peaks[0], peaks[1], runs.max_relative)


@dataclass(frozen=True, slots=True)
class _Runs:
    """Each planned step against eager's, eager's first against itself, and whether all of its losses are numbers."""

    comparisons: tuple[Comparison, ...]
    repeats: Comparison
    finite: bool

    @property
    def max_relative(self) -> float:
        return max(one.max_relative for one in self.comparisons)


def _run(who: str, eager: Stepper, ours: Stepper, start: dict[str, Tensor], seeds: range) -> _Runs:
    comparisons, finite = [], True
    state = start
    with blame(who):
        first, again = (run_step(eager, seed=seeds[0], buffers=state) for _ in range(2))
    for seed in seeds:
        reference = run_step(eager, seed=seed, buffers=state)
        comparisons.append(compare_steps(reference, run_step(ours, seed=seed, buffers=state)))
        finite = finite and bool(reference.loss.isfinite())
        state = reference.buffers
    return _Runs(tuple(comparisons), compare_steps(first, again), finite)


def _peak(stepper: Stepper, start: dict[str, Tensor], seed: int) -> int:
    """The model's own peak: the loss asks for a gradient of every output, as the plan assumes, and holds nothing."""
    restore_buffers(stepper.module, start)
    device = str(home_of(stepper.module))
    return measure_step_peak(replace(stepper, loss_of=weightless_loss), seed=seed, device=device).peak_bytes


def _step_findings(runs: _Runs, splits: bool, rounding: bool) -> list[Finding]:
    comparisons, repeats = runs.comparisons, runs.repeats
    findings = []
    if not runs.finite:
        findings.append(Finding("eager", "off", "its loss isn't a finite number: little is compared"))
    if not repeats.exact:
        detail = f"it doesn't repeat itself: {repeats.describe()}; bits can't be compared"
        findings.append(Finding("eager", "off", detail))
    excused = _excuse(runs, splits, rounding)
    way = "; that is rounding: --up-to-rounding accepts it" if runs.max_relative <= ROUNDING else ""
    worst = max(comparisons, key=lambda one: one.gradients_relative)
    for what, equal, apart in (
        (
            "loss",
            [one.loss_equal for one in comparisons],
            f"up to {max(one.loss_relative for one in comparisons):.1e} apart, relative to eager's",
        ),
        (
            "gradients",
            [one.gradients_equal for one in comparisons],
            f"up to {worst.gradients_relative:.1e} apart ({worst.worst_gradient})",
        ),
    ):
        if excused and not all(equal):
            findings.append(Finding(what, "equal up to rounding", f"{apart}: {excused}"))
        else:
            findings.append(_counted(what, equal, "bit for bit", f", {apart}{way}"))
    for what, equal in (
        ("buffers", [one.buffers_equal for one in comparisons]),
        ("generator", [one.generators_equal for one in comparisons]),
    ):
        findings.append(_counted(what, equal, "as eager leaves them"))
    return findings


def _excuse(runs: _Runs, splits: bool, rounding: bool) -> str:
    """Why values may differ by as much as they do; an empty string if they may not."""
    bound = max(ROUNDING, min(runs.repeats.max_relative, _RESTLESS))
    if not (splits or rounding or not runs.repeats.exact) or runs.max_relative > bound:
        return ""
    why = "since this plan's recurrences run split over time" if splits else "of the largest magnitude"
    return f"{bound:.0e} allowed, {why}"


def _counted(what: str, equal: Sequence[bool], how: str, more: str = "") -> Finding:
    steps = f"{len(equal)} step{'s' if len(equal) > 1 else ''}"
    if all(equal):
        return Finding(what, "equal", f"{how}, {steps}")
    return Finding(what, "DIFFERENT", f"in {list(equal).count(False)} of {steps}{more}")


def _peak_findings(plan: Plan, measured: int, size: Callable[[int], str]) -> list[Finding]:
    """The budget in the scope in which it was asked for, the prediction in that of the step's own allocations."""
    over = measured - plan.budget_bytes
    besides = plan.besides_bytes
    kept = f"{size(measured + besides)} measured, {size(plan.budget_bytes + besides)} allowed"
    kept += f", {size(besides)} of both resident or reserved" if besides else ""
    budget = Finding("peak and budget", "kept", kept) if over <= 0 else Finding("peak and budget", "EXCEEDED", kept)
    off = abs(plan.peak_bytes - measured)
    near = off <= PEAK_TOLERANCE * measured + PEAK_SLACK_BYTES
    detail = f"{size(measured)} measured, {size(plan.peak_bytes)} predicted"
    prediction = Finding("peak and prediction", "equal" if not off else "close" if near else "off", detail)
    return [budget, prediction]
