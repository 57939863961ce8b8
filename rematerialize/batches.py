"""The largest batch that trains within a budget, with everything stored and with a plan.

Found without running anything: each batch that is tried is captured on fake tensors and costed by formula. Memory is
close to affine in the batch, so the search is a secant search between a batch that fits and one that doesn't. On the
way a batch's least memory is what other batches' plans need, replayed for its sizes, since to search for the smallest
budget takes far longer; only the answer and the next larger batch are searched. On the device itself the answer is then
checked with measured workspace, its neighbours included, and by real steps: one under the plan, and eager's own around
the answer with everything stored, since eager may hold what a captured step reuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from rematerialize.api import choose
from rematerialize.budget import BudgetRequest, device_bytes, free_bytes, read_budget
from rematerialize.cost_cache import device_name
from rematerialize.device_table import DEVICES
from rematerialize.errors import CaptureError, RematerializeError, ScheduleError, ran_out_of_memory
from rematerialize.ir import TrainingGraph
from rematerialize.prepare import PreparedStep, home_of, prepare_example
from rematerialize.report.batches import EagerStep, MaxBatch, Need
from rematerialize.simulate import simulate
from rematerialize.targets.inputs import batch_of, flat_tensors, resized
from rematerialize.trial import eager_peak, planned_peak
from rematerialize.units import format_bytes, format_percent, parse_overhead

LARGEST = 2**20
ROUGHLY = 16  # a guess that is this part of a batch from it is near enough where costs are measured afterwards
_HERE = "2-core CPU"  # whose formulas stand in where only sizes matter

Inputs = tuple[Any, ...] | dict[str, Any]
Runs = tuple[tuple[str, ...], tuple[str, ...]]  # the ops of a forward and of a backward


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
    max_overhead: float | str | None = None,
    cost_cache: str | Path | None = None,
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
        On a device that is here: measure workspace at the answer and its neighbours, run one step under the plan, and
        steps of the model as it is until the largest batch that fits is known.
    max_overhead : float or str, optional
        Also find the largest batch whose plan recomputes no more than this share of the step's time ("25%"): the
        largest of all is often a slow one.
    cost_cache : str or Path, optional
        As in ``plan``.
    tell : callable
        Gets a line of text per batch that is tried.

    Raises
    ------
    RematerializeError
        If the budget is a share of store-all's peak, which depends on the batch.
    """
    request = read_budget(budget, activation_budget, reserve, optimizer, model)
    if request.activation_budget is not None and request.activation_budget.size_bytes is None:
        raise RematerializeError(
            "an activation budget for the largest batch must be a size such as '8GiB': a share of what storing "
            "everything takes grows with the batch"
        )
    limit = None if max_overhead is None else parse_overhead(max_overhead, name="max_overhead")
    here = device not in DEVICES
    step = _Step(model, example_inputs, batch_dim, request, device, cost_cache)
    start = batch_of(example_inputs, batch_dim)
    measured = here and confirm
    computed = _Needs(step, _HERE if here else device, tell, quick=measured)
    budget_bytes = step.budget_bytes(computed.prepared(start), here)
    tell(f"looking for the largest batch within {format_bytes(budget_bytes)}")
    without, with_plan = computed.largest_both(start, start, budget_bytes, exactly=not measured)
    found, peak = computed, None
    if measured:
        tell("the same with what ops really take here")
        found = _Needs(step, device, tell)
        without, with_plan = found.largest_both(max(without, 1), max(with_plan, 1), budget_bytes, exactly=True)
    overhead = None
    if with_plan:
        made = choose(model, found.prepared(with_plan), request)
        overhead = made.overhead
        if measured:
            tell(f"running one step at batch {with_plan}")
            peak = planned_peak(model, resized(example_inputs, with_plan, batch_dim), made)
            peak += found.besides(with_plan)
    within = None
    if limit is not None:
        tell(f"the same recomputing at most {format_percent(limit)}")
        within = found.largest_within(limit, without, with_plan)
    eager: tuple[EagerStep, ...] = ()
    if measured and with_plan:
        tell(f"running eager's steps from batch {max(without, 1)}")
        without, eager = _largest_of_eager(step, found, max(without, 1), budget_bytes)
    name = device_name(home_of(model)) if here else f"{device} (computed)"
    return MaxBatch(budget_bytes, without, with_plan, found.tried(), name, peak, overhead, limit, within, eager)


def _largest_of_eager(step: _Step, needs: _Needs, start: int, budget_bytes: int) -> tuple[int, tuple[EagerStep, ...]]:
    """The largest batch at which a real step of the model as it is fits, and the steps that show it.

    Upwards by strides that double from 1, since a step far too large may take the machine's memory; downwards to where
    the line through the steps measured so far meets the budget.
    """

    def inputs_bytes(batch: int) -> int:
        tensors = flat_tensors(resized(step.inputs, batch, step.batch_dim))
        return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())

    besides = needs.besides(start)
    whole = step.request.budget is not None
    ran: dict[int, int | None] = {}
    low, high, stride, guess = 0, LARGEST + 1, 1, start
    while high - low > 1:
        try:
            more = besides + (inputs_bytes(guess) - inputs_bytes(start) if whole else 0)
            ran[guess] = more + eager_peak(step.model, resized(step.inputs, guess, step.batch_dim))
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            ran[guess] = None
        peak = ran[guess]
        needs.tell(f"batch {guess:,}: eager took {'more than there is' if peak is None else format_bytes(peak)}")
        if peak is not None and peak <= budget_bytes:
            low = guess
        else:
            high = guess
        if high > LARGEST:
            guess, stride = low + stride, 2 * stride
            continue
        known = {batch: size for batch, size in ran.items() if size is not None}
        crossing = _crossing(known, budget_bytes)
        if crossing is None or len(ran) % 3 == 0:
            crossing = high * budget_bytes // known[high] if len(known) == 1 and high in known else (low + high) // 2
        guess = min(max(crossing, low + 1), high - 1)
    return low, tuple(EagerStep(batch, ran[batch]) for batch in sorted(ran))


@dataclass(frozen=True, slots=True)
class _Step:
    """The step whose batch is sought, and the budget."""

    model: nn.Module
    inputs: Inputs
    batch_dim: int
    request: BudgetRequest
    device: str | None
    cost_cache: str | Path | None

    def budget_bytes(self, prepared: PreparedStep, here: bool) -> int:
        """The budget in the scope in which it was given."""
        if self.request.activation_budget is not None:
            return self.request.activation_budget.resolve(0)
        assert self.request.budget is not None
        whole = prepared.device_bytes
        if here:
            home = home_of(self.model)
            whole = free_bytes(home) + prepared.resident_bytes if self.request.is_auto else device_bytes(home)
        return self.request.budget.resolve(whole)

    def besides(self, prepared: PreparedStep) -> int:
        """What a step holds besides what it allocates, in the budget's scope."""
        return 0 if self.request.activation_budget is not None else prepared.resident_bytes + self.request.reserve_bytes


class _Needs:
    """What batches need, by computed or by measured costs; each batch is captured once, and searched if it has to be.

    A plan of one batch is one of another, too, as long as both have the same ops. Those of least memory are kept, by
    the way to run the step that they are of. ``quick``: nothing is searched, the first recomputes whole blocks.
    """

    def __init__(self, step: _Step, device: str | None, tell: Callable[[str], None], *, quick: bool = False) -> None:
        self.step, self.device, self.tell, self.quick = step, device, tell, quick
        self.known: dict[int, Need] = {}
        self._lowest: list[tuple[int, Runs]] = []
        self._besides: dict[int, int] = {}
        self._graphs: dict[int, tuple[TrainingGraph | None, ...]] = {}
        self._kept: dict[int, PreparedStep] = {}

    def prepared(self, batch: int) -> PreparedStep:
        """The captured step at a batch; the last two are kept: the answer and the next batch, in the end."""
        if batch not in self._kept:
            inputs = resized(self.step.inputs, batch, self.step.batch_dim)
            try:
                prepared = prepare_example(self.step.model, inputs, device=self.device, cost_cache=self.step.cost_cache)
            except CaptureError as error:
                raise CaptureError(f"at batch {batch}: {error}") from error
            self._kept = dict([*self._kept.items()][-1:]) | {batch: prepared}
            self._besides[batch] = self.step.besides(prepared)
            self._graphs[batch] = tuple(None if way is None else way.graph for way in prepared.ways())
        return self._kept[batch]

    def besides(self, batch: int) -> int:
        """What a batch's step holds besides what it allocates, in the budget's scope."""
        if batch not in self._besides:
            self.prepared(batch)
        return self._besides[batch]

    def at(self, batch: int) -> Need:
        """What a batch needs: its least memory as other plans have it, searched where none of them can be replayed."""
        if batch not in self.known:
            prepared = self.prepared(batch)
            least = self._replayed(batch)
            if least is None and self.quick:
                blocks = prepared.full_checkpointing()
                self._lowest.append((0, (blocks.forward, blocks.backward)))
                least = blocks.peak_bytes
            if least is None:
                return self.searched(batch)
            self._note(batch, min(least, prepared.planner.store_all().peak_bytes), searched=False)
        return self.known[batch]

    def searched(self, batch: int) -> Need:
        """The same with the smallest budget that works."""
        if batch not in self.known or not self.known[batch].searched:
            prepared = self.prepared(batch)
            self._note(batch, prepared.minimum(), searched=True)
            self._lowest += [(way, one.planner.lowest()) for way, one in enumerate(prepared.ways()) if one is not None]
            for other, need in self.known.items():
                least = self._replayed(other)
                if not need.searched and least is not None:
                    least_bytes = min(need.minimum_bytes, least + self.besides(other))
                    self.known[other] = replace(need, minimum_bytes=least_bytes)
        return self.known[batch]

    def _replayed(self, batch: int) -> int | None:
        """The least that a plan of another batch needs at this one; None where it has other ops."""
        peaks = []
        for way, runs in self._lowest:
            graph = self._graphs[batch][way]
            if graph is not None:
                with suppress(ScheduleError):
                    peaks.append(simulate(graph, *runs).peak_bytes)
        return min(peaks, default=None)

    def _note(self, batch: int, least_bytes: int, *, searched: bool) -> None:
        besides = self.besides(batch)
        stored_bytes = self.prepared(batch).planner.store_all().peak_bytes + besides
        need = self.known[batch] = Need(batch, stored_bytes, least_bytes + besides, searched)
        least = f"{'at least' if searched else 'at most'} {format_bytes(need.minimum_bytes)} with a plan"
        self.tell(f"batch {batch:,}: everything stored {format_bytes(stored_bytes)}, {least}")

    def tried(self) -> tuple[Need, ...]:
        """By rising batch."""
        return tuple(sorted(self.known.values(), key=lambda need: need.batch))

    def largest_both(self, stored_from: int, least_from: int, budget_bytes: int, *, exactly: bool) -> tuple[int, int]:
        """The largest batch with everything stored, and the largest with a plan; not exactly, a good guess of both."""
        without = self.largest(stored_from, budget_bytes, lambda need: need.store_all_bytes, exactly=exactly)
        guess = _crossing({batch: need.minimum_bytes for batch, need in self.known.items()}, budget_bytes) or least_from
        start = max(min(guess, 2 * least_from) if exactly else least_from, without, 1)
        while True:
            found = self.largest(start, budget_bytes, lambda need: need.minimum_bytes, exactly=exactly)
            # The answer fits already, by what another batch's plan needs: first whether the next one does.
            unsure = [batch for batch in (found + 1, found) if batch and not self.at(batch).searched]
            if not exactly or not unsure:
                return without, found
            self.searched(unsure[0])
            start = max(found, 1)

    def largest(self, start: int, budget_bytes: int, bytes_of: Callable[[Need], int], *, exactly: bool = True) -> int:
        """The largest batch within the budget: it fits, and the next one doesn't.

        Each guess is where the line through the two known batches nearest to the budget meets it, held inside the
        bracket; every third halves the bracket, so that it closes whatever the curve. Where that need not be exact, a
        guess beside a batch that is known ends the search.
        """
        low, high = 0, LARGEST + 1
        guess, tries = start, 0
        while high - low > 1:
            size = bytes_of(self.at(guess))
            if size <= budget_bytes:
                low = guess
            else:
                high = guess
            tries += 1
            known = {batch: bytes_of(need) for batch, need in self.known.items()}
            # From one batch alone: as if all of its memory grew with it, which never goes too far up.
            crossing = _crossing(known, budget_bytes) or guess * budget_bytes // max(size, 1)
            if not exactly and low and crossing - low <= max(1, low // ROUGHLY):
                return low
            guess = (low + high) // 2 if high <= LARGEST and tries % 3 == 0 else crossing
            guess = min(max(guess, low + 1), high - 1)
        return low

    def largest_within(self, max_overhead: float, low: int, high: int) -> int:
        """The largest batch between one that fits as it is and one that fits with a plan that costs no more."""
        while high > low:
            middle = (low + high + 1) // 2
            overhead = choose(self.step.model, self.prepared(middle), self.step.request).overhead
            self.tell(f"batch {middle:,}: recomputes {format_percent(max(overhead, 0.0))}")
            if overhead <= max_overhead:
                low = middle
            else:
                high = middle - 1
        return low


def _crossing(known: Mapping[int, int], budget_bytes: int) -> int | None:
    """The batch at which the line through the two known ones nearest to the budget meets it."""
    nearest = sorted(known, key=lambda batch: abs(known[batch] - budget_bytes))[:2]
    if len(nearest) < 2:
        return None
    first, second = nearest
    slope = (known[second] - known[first]) / (second - first)
    return int(first + (budget_bytes - known[first]) / slope) if slope > 0 else None
