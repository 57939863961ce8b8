"""The largest batch within a budget: the answer, what was tried for it, and its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rematerialize.report.table import plan_table
from rematerialize.units import format_bytes, format_percent


@dataclass(frozen=True, slots=True)
class Need:
    """What a batch needs, resident tensors and reserve included.

    Attributes
    ----------
    batch : int
    store_all_bytes, minimum_bytes : int
        Peak with everything stored, and the smallest budget that works.
    searched : bool
        Whether it was searched for: if not, ``minimum_bytes`` is what another batch's plan needs at this one, an upper
        bound. The answer and the next larger batch are searched.
    """

    batch: int
    store_all_bytes: int
    minimum_bytes: int
    searched: bool = True


@dataclass(frozen=True, slots=True)
class EagerStep:
    """What a batch took in a step of the model as it is.

    Attributes
    ----------
    batch : int
    peak_bytes : int or None
        Measured, resident tensors and reserve included; None where memory ran out.
    """

    batch: int
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class MaxBatch:
    """The answer. ``print`` shows it.

    Attributes
    ----------
    budget_bytes : int
    without, with_plan : int
        The largest batch that fits with everything stored, and with a plan; 0 if not even 1 does. The first is eager's,
        by real steps, where ``eager`` isn't empty, and otherwise computed for the captured step.
    tried : tuple of Need
        By rising batch, the next larger ones that don't fit among them. Of the captured step.
    device : str
    confirmed_peak_bytes : int or None
        Measured peak of one real step at ``with_plan``, resident tensors and reserve included; None where no step ran.
    overhead : float or None
        Predicted recomputation at ``with_plan`` under the budget.
    max_overhead : float or None
        The recomputation that was asked not to be exceeded,
    within_overhead : int or None
        and the largest batch that doesn't, found by bisection.
    eager : tuple of EagerStep
        Steps of the model as it is, by rising batch: ``without`` fits, the next larger one doesn't. None ran:
        empty.
    """

    budget_bytes: int
    without: int
    with_plan: int
    tried: tuple[Need, ...]
    device: str
    confirmed_peak_bytes: int | None = None
    overhead: float | None = None
    max_overhead: float | None = None
    within_overhead: int | None = None
    eager: tuple[EagerStep, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON-ready data."""
        return asdict(self)

    def rows(self, size: Callable[[int], str] = format_bytes) -> list[tuple[str, str]]:
        """Names and values of the summary; ``size`` formats bytes."""
        needs = {need.batch: need for need in self.tried}
        rows = [("budget", size(self.budget_bytes)), *self._rows_without(size)]
        rows.append(("largest batch, rematerialized", f"{self.with_plan:,}"))
        if self.with_plan in needs:
            rows.append(("  it needs at least", size(needs[self.with_plan].minimum_bytes)))
        if self.with_plan + 1 in needs:
            rows.append((f"  {self.with_plan + 1:,} would need", size(needs[self.with_plan + 1].minimum_bytes)))
        if self.overhead is not None:
            rows.append(("  its recomputation", format_percent(max(self.overhead, 0.0))))
        if self.confirmed_peak_bytes is not None:
            rows.append(("  measured in one step", size(self.confirmed_peak_bytes)))
        if self.max_overhead is not None:
            share = format_percent(self.max_overhead)
            rows.append((f"largest batch, recomputing at most {share}", f"{self.within_overhead:,}"))
        rows.append(("device", self.device))
        return rows

    def _rows_without(self, size: Callable[[int], str]) -> list[tuple[str, str]]:
        if self.eager:
            took = {step.batch: step.peak_bytes for step in self.eager}
            rows = [("largest batch, everything stored", f"{self.without:,}")]
            if (peak := took.get(self.without)) is not None:
                rows.append(("  measured in an eager step", size(peak)))
            if self.without + 1 in took:
                peak = took[self.without + 1]
                rows.append((f"  {self.without + 1:,} takes", "more than there is" if peak is None else size(peak)))
            return rows
        needs = {need.batch: need.store_all_bytes for need in self.tried}
        rows = [("largest batch, everything stored (computed)", f"{self.without:,}")]
        if self.without in needs:
            rows.append(("  it needs", size(needs[self.without])))
        if self.without + 1 in needs:
            rows.append((f"  {self.without + 1:,} would need", size(needs[self.without + 1])))
        return rows

    def __str__(self) -> str:
        return plan_table("Largest batch within the budget", self.rows())

    __repr__ = __str__
