"""The largest batch that trains within a budget, with everything stored and with a plan.

Found without running anything: each batch that is tried is captured on fake tensors and costed by formula. Memory is
close to affine in the batch, so the search is a secant search between a batch that fits and one that doesn't. On the
device itself the answer is then checked with measured workspace, its neighbours included, and by one real step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from rematerialize.api import choose
from rematerialize.budget import device_bytes, free_bytes, read_budget
from rematerialize.cost import DEVICES
from rematerialize.cost_cache import device_name
from rematerialize.errors import BudgetError, CaptureError, RematerializeError
from rematerialize.prepare import PreparedStep, home_of, prepare_example
from rematerialize.report.table import plan_table
from rematerialize.targets.inputs import batch_of, resized
from rematerialize.trial import planned_peak
from rematerialize.units import format_bytes

LARGEST = 2**20
_HERE = "2-core CPU"  # whose formulas stand in where only sizes matter

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Need:
    """What a batch needs, resident tensors and reserve included.

    Attributes
    ----------
    batch : int
    store_all_bytes, minimum_bytes : int
        Peak with everything stored, and the smallest budget that works.
    """

    batch: int
    store_all_bytes: int
    minimum_bytes: int


@dataclass(frozen=True, slots=True)
class MaxBatch:
    """The answer. ``print`` shows it.

    Attributes
    ----------
    budget_bytes : int
    without, with_plan : int
        The largest batch that fits with everything stored, and with a plan; 0 if not even 1 does.
    tried : tuple of Need
        By rising batch, the next larger ones that don't fit among them.
    device : str
    confirmed_peak_bytes : int or None
        Measured peak of one real step at ``with_plan``, resident tensors and reserve included; None where no step ran.
    overhead : float or None
        Predicted recomputation at ``with_plan`` under the budget.
    """

    budget_bytes: int
    without: int
    with_plan: int
    tried: tuple[Need, ...]
    device: str
    confirmed_peak_bytes: int | None = None
    overhead: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON-ready data."""
        return asdict(self)

    def rows(self, size: Callable[[int], str] = format_bytes) -> list[tuple[str, str]]:
        """Names and values of the summary; ``size`` formats bytes."""
        needs = {need.batch: need for need in self.tried}
        rows = [("budget", size(self.budget_bytes)), ("largest batch, everything stored", f"{self.without:,}")]
        if self.without in needs:
            rows.append(("  it needs", size(needs[self.without].store_all_bytes)))
        if self.without + 1 in needs:
            rows.append((f"  {self.without + 1:,} would need", size(needs[self.without + 1].store_all_bytes)))
        rows.append(("largest batch, rematerialized", f"{self.with_plan:,}"))
        if self.with_plan in needs:
            rows.append(("  it needs at least", size(needs[self.with_plan].minimum_bytes)))
        if self.with_plan + 1 in needs:
            rows.append((f"  {self.with_plan + 1:,} would need", size(needs[self.with_plan + 1].minimum_bytes)))
        if self.overhead is not None:
            rows.append(("  its recomputation", f"{100 * self.overhead:.1f}%"))
        if self.confirmed_peak_bytes is not None:
            rows.append(("  measured in one step", size(self.confirmed_peak_bytes)))
        rows.append(("device", self.device))
        return rows

    def __str__(self) -> str:
        return plan_table("Largest batch within the budget", self.rows())

    __repr__ = __str__


def max_batch(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    budget: int | str | None = None,
    activation_budget: int | str | None = None,
    batch_dim: int = 0,
    reserve: int | str = 0,
    optimizer: Any = None,
    device: str | None = None,
    confirm: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> MaxBatch:
    """Find the largest batch that fits.

    Parameters
    ----------
    model : nn.Module
        In training mode. It may consist of fake tensors when ``device`` is one of the table.
    example_inputs : tuple or dict
        One call; tensors whose size along ``batch_dim`` is the batch are resized.
    budget, activation_budget
        As in ``plan``, but a share only of a device's memory.
    batch_dim : int
    reserve, optimizer, device
        As in ``plan``.
    confirm : bool
        On a device that is here: measure workspace at the answer and its neighbours, and run one step.
    tell : callable
        Gets a line of text per batch that is tried.

    Raises
    ------
    RematerializeError
        If the budget is a share of store-all's peak, which depends on the batch.
    """
    return _Search(model, example_inputs, batch_dim, device, reserve, optimizer, budget, activation_budget, tell).run(
        confirm
    )


class _Search:
    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        batch_dim: int,
        device: str | None,
        reserve: int | str,
        optimizer: Any,
        budget: int | str | None,
        activation_budget: int | str | None,
        tell: Callable[[str], None],
    ) -> None:
        self.model, self.inputs, self.batch_dim, self.tell = model, example_inputs, batch_dim, tell
        self.here = device not in DEVICES
        self.device = device
        self.request = read_budget(budget, activation_budget, reserve, optimizer, model)
        if self.request.activation_budget is not None and self.request.activation_budget.size_bytes is None:
            raise RematerializeError(
                "an activation budget for the largest batch must be a size such as '8GiB': a share of what storing "
                "everything takes grows with the batch"
            )
        self.needs: dict[int, Need] = {}

    def run(self, confirm: bool) -> MaxBatch:
        start = batch_of(self.inputs, self.batch_dim)
        first = self.prepared(start)
        budget_bytes = self.budget_bytes(first)
        self.tell(f"looking for the largest batch within {format_bytes(budget_bytes)}")
        self.needs[start] = self.need(first, start)
        without = self.largest(start, budget_bytes, lambda need: need.store_all_bytes)
        with_plan = self.largest(max(start, without), budget_bytes, lambda need: need.minimum_bytes)
        peak, overhead = None, None
        if self.here and confirm and with_plan:
            with_plan, without, peak, overhead = self.confirmed(with_plan, without, budget_bytes)
        elif with_plan:
            overhead = choose(self.model, self.prepared(with_plan), self.request).overhead
        tried = tuple(sorted(self.needs.values(), key=lambda need: need.batch))
        return MaxBatch(budget_bytes, without, with_plan, tried, first_name(first, self.here), peak, overhead)

    def budget_bytes(self, prepared: PreparedStep) -> int:
        """The budget in the scope in which it was given."""
        if self.request.activation_budget is not None:
            assert self.request.activation_budget.size_bytes is not None
            return self.request.activation_budget.size_bytes
        assert self.request.budget is not None
        whole = prepared.device_bytes
        if self.here:
            home = home_of(self.model)
            whole = free_bytes(home) + prepared.resident_bytes if self.request.is_auto else device_bytes(home)
        return self.request.budget.resolve(whole)

    def besides(self, prepared: PreparedStep) -> int:
        """What a step holds besides what it allocates, in the budget's scope."""
        return 0 if self.request.activation_budget is not None else prepared.resident_bytes + self.request.reserve_bytes

    def prepared(self, batch: int, *, measured: bool = False) -> PreparedStep:
        """The captured step at a batch, costs by formula unless ``measured``."""
        device = self.device if measured else (_HERE if self.here else self.device)
        try:
            return prepare_example(self.model, resized(self.inputs, batch, self.batch_dim), device=device)
        except CaptureError as error:
            raise CaptureError(f"at batch {batch}: {error}") from error

    def need(self, prepared: PreparedStep, batch: int) -> Need:
        besides = self.besides(prepared)
        need = Need(batch, prepared.planner.store_all().peak_bytes + besides, prepared.minimum() + besides)
        self.tell(
            f"batch {batch}: {format_bytes(need.store_all_bytes)} stored, {format_bytes(need.minimum_bytes)} least"
        )
        return need

    def at(self, batch: int) -> Need:
        if batch not in self.needs:
            self.needs[batch] = self.need(self.prepared(batch), batch)
        return self.needs[batch]

    def largest(self, start: int, budget_bytes: int, bytes_of: Callable[[Need], int]) -> int:
        """The largest batch within the budget: a secant search, halved where the secant stalls."""
        low, high = 0, 0  # low fits (0 always does), high doesn't; high == 0: none known
        guess, stalled = start, 0
        while not high or high - low > 1:
            if bytes_of(self.at(guess)) <= budget_bytes:
                low = guess
                if guess >= LARGEST:
                    break
            else:
                high = guess
            guess = self.guess(low, high, budget_bytes, bytes_of)
            stalled += 1
            if high and stalled % 4 == 0:
                guess = (low + high) // 2
            if high:
                guess = min(max(guess, low + 1), high - 1) if high - low > 1 else low
        return low

    def guess(self, low: int, high: int, budget_bytes: int, bytes_of: Callable[[Need], int]) -> int:
        """Where the line through the two batches nearest to the budget meets it; twice as much as one batch says."""
        known = sorted(self.needs.values(), key=lambda need: abs(bytes_of(need) - budget_bytes))
        if len(known) == 1 or bytes_of(known[0]) == bytes_of(known[1]):
            return min(2 * low, LARGEST) if not high else (low + high) // 2
        first, second = known[0], known[1]
        slope = (bytes_of(second) - bytes_of(first)) / (second.batch - first.batch)
        if slope <= 0:
            return min(2 * max(low, 1), LARGEST) if not high else (low + high) // 2
        found = int(first.batch + (budget_bytes - bytes_of(first)) / slope)
        if not high:
            return min(max(found, low + 1), LARGEST)
        return found if found > low else low + 1

    def confirmed(self, with_plan: int, without: int, budget_bytes: int) -> tuple[int, int, int | None, float | None]:
        """The answers with measured workspace, then one real step at the larger."""
        steps: dict[int, PreparedStep] = {}

        def measured(batch: int) -> Need:
            if batch not in steps:
                steps[batch] = self.prepared(batch, measured=True)
                self.needs[batch] = self.need(steps[batch], batch)
            return self.needs[batch]

        found = []
        for batch, bytes_of in ((without, _stored), (with_plan, _least)):
            while batch and bytes_of(measured(batch)) > budget_bytes:
                batch -= 1
            while bytes_of(measured(batch + 1)) <= budget_bytes:
                batch += 1
            found.append(batch)
        without, with_plan = found
        if not with_plan:
            return 0, without, None, None
        try:
            made = choose(self.model, steps[with_plan], self.request)
        except BudgetError:
            return with_plan, without, None, None
        self.tell(f"running one step at batch {with_plan}")
        peak = planned_peak(self.model, resized(self.inputs, with_plan, self.batch_dim), made)
        return with_plan, without, peak + self.besides(steps[with_plan]), made.overhead


def first_name(prepared: PreparedStep, here: bool) -> str:
    """The device for readers."""
    return device_name(home_of(prepared.model)) if here else f"{prepared.device_name} (computed)"


def _stored(need: Need) -> int:
    return need.store_all_bytes


def _least(need: Need) -> int:
    return need.minimum_bytes
