"""Exact schedules of small steps by constraint programming: the ruler for every other solver.

Bartan, Li, Teague, Lott, Dilkina, "Moccasin: efficient tensor rematerialization for neural networks"
(ICML 2023): time is a position in a *staged* order, each op has up to C computations, each output of a
computation is retained over an interval of positions, and one cumulative constraint keeps the budget.

The staged order here: stage 0 is the forward, every forward op at most once; then one stage per backward
op, in which forward ops may run again (in one fixed topological order) before that op runs. Departures
from the paper: stage 0 recomputes nothing (this is what makes it fast); a first computation may wait for
the backward; every output of an op is freed on its own; transients, tangents, held outputs and gradients
count exactly as in `rematerialize.simulate`.

Scope of the guarantee: optimal among schedules of that form with at most C computations per op, with the
backward ops in one order. A position at which nothing runs constrains nothing: what is live there is live
at the position that ran before it, or (tangents) at the one that runs next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from math import floor, gcd, inf, lcm, nextafter
from typing import Any

from rematerialize.solve.step import Plan, Step

LARGEST = 400  # ops of a step that `exact` tries
TICKS = 1 << 31  # resolution of the makespan
SAFE_AREA = 1 << 60  # bytes x positions that CP-SAT may add up


@dataclass(frozen=True, slots=True)
class ExactResult:
    """What CP-SAT found and proved.

    Attributes
    ----------
    plan : Plan or None
        The best plan found within the budget.
    bound_s : float
        No schedule of the formulation is faster; inf if none fits.
    proven : bool
        The search ended: the plan is optimal up to ``ops / 2**31`` of the makespan, or none fits.
    """

    plan: Plan | None
    bound_s: float
    proven: bool


def exact(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield one plan per level, from the highest down; nothing without ortools or for large steps."""
    if len(step.names) > LARGEST or not find_spec("ortools"):
        return
    hint = step.store_all()
    for level in sorted(levels, reverse=True):
        found = solve_exact(step, level, hint=hint, deterministic_time_s=10.0).plan
        if found is not None:
            hint = found
            yield found


def solve_exact(
    step: Step,
    budget_bytes: int,
    *,
    copies: int = 3,
    hint: Plan | None = None,
    deterministic_time_s: float = 60.0,
    workers: int = 2,
) -> ExactResult:
    """Return the fastest plan within the budget and a lower bound, by CP-SAT. Exponential in the worst case.

    Parameters
    ----------
    step : Step
    budget_bytes : int
        Limit on the peak, inclusive.
    copies : int
        Most computations of one op, the forward's among them.
    hint : Plan, optional
        Where to start; it also sets the order of the backward ops, and of the forward ops within a stage
        (by first computation). What can't be mapped is ignored. The graph's order without one.
    deterministic_time_s : float
        Limit in CP-SAT's deterministic seconds.
    workers : int
        Threads. The result is the same on every run, interleaving them, if the limit is reached or not.

    Notes
    -----
    Times become whole ticks rounded down and the bound a float rounded down, so the bound holds. Sizes
    are divided by their common divisor. Only where bytes x positions could overflow 63 bits are they
    also rounded, sizes up and budget down: plans stay valid, bound and proof hold within that rounding.

    Raises
    ------
    ImportError
        ortools (the optional extra "exact") is not installed.
    """
    from ortools.sat.python import cp_model

    model = _Model(cp_model, step, budget_bytes, copies, hint or step.store_all())
    if hint is not None:
        model.suggest(hint)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = workers
    solver.parameters.interleave_search = workers > 1
    solver.parameters.max_deterministic_time = deterministic_time_s
    solver.parameters.random_seed = 0
    status = solver.solve(model.cp)
    if status == cp_model.INFEASIBLE:
        return ExactResult(None, inf, True)
    bound = model.once_s + Fraction(max(0, round(solver.best_objective_bound)), model.ticks_per_s)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return ExactResult(None, _floor(bound), False)
    plan = model.plan(solver)
    assert step.peak_bytes(plan) <= budget_bytes, "CP-SAT's plan replays above the budget"
    bound_s = min(_floor(bound), step.duration_s(plan.order))
    return ExactResult(plan, bound_s, status == cp_model.OPTIMAL)


def _floor(value: Fraction) -> float:
    """Return the largest float that is at most the value."""
    near = float(value)
    return near if Fraction(near) <= value else nextafter(near, -inf)


@dataclass(slots=True)
class _Run:
    """One computation of a forward op as variables (constants where nothing is to be decided)."""

    present: Any
    start: Any
    ends: dict[int, Any]  # value -> last position at which this instance is read


@dataclass(slots=True)
class _Read:
    """Which computation of a producer a consumer reads at a position."""

    op: int  # consumer; -1 for the caller, who reads the gradients at the end
    copy: int
    producer: int
    chosen: list[Any]  # one literal per copy of the producer


class _Model:
    """The formulation on a CP-SAT model; ``runs[op][0]`` is the forward's computation."""

    def __init__(self, cp_model: Any, step: Step, budget_bytes: int, copies: int, order: Plan) -> None:
        self.cp = cp_model.CpModel()
        self.domain = cp_model.Domain.from_values
        self.step = step
        first = dict.fromkeys(op for op in order.order if op < step.forwards)
        self.rank = {op: at for at, op in enumerate(first)}
        self.stage = {op: at for at, op in enumerate((op for op in order.order if op >= step.forwards), 1)}
        self.late = [v for v in step.held_gradients if 0 <= step.producer[v] < step.forwards]
        # A forward value that is a gradient may be computed again after the last backward op.
        self.stages = len(self.stage) + bool(self.late and self.stage)
        self.end = self.at(step.forwards, self.stages) - (self.stages == 0)
        self.last_stage = self._last_stages()
        self.runs: dict[int, list[_Run]] = {}
        self.reads: list[_Read] = []
        self.demands: list[tuple[Any, int]] = []
        for op in first:
            self.runs[op] = self._computations(op, copies)
        self._fixed_lives()
        for op in first:
            for copy, run in enumerate(self.runs[op]):
                self._read(op, copy, run.start, step.inputs[op], run.present)
        for op in self.stage:
            self._read(op, 0, self._moment(op), step.inputs[op], 1)
        self._read(-1, 0, self.end, self.late, 1)
        self._limit(budget_bytes)
        self._minimize(copies)

    def at(self, rank: int, stage: int) -> int:
        """Return the position of a rank in a stage; a stage's backward op has rank ``forwards``."""
        forwards = self.step.forwards
        return rank if stage == 0 else forwards + (stage - 1) * (forwards + 1) + rank

    def _moment(self, op: int) -> int:
        return self.at(self.step.forwards, self.stage[op])

    def _last_stages(self) -> dict[int, int]:
        """Return the last stage in which each forward op can be of use."""
        step, last = self.step, dict(self.stage)
        for op in reversed(self.rank):
            last[op] = max((last[user] for value in step.outputs[op] for user in step.users[value]), default=0)
            if not step.held_gradients.isdisjoint(step.outputs[op]):
                last[op] = self.stages
        return last

    def _computations(self, op: int, copies: int) -> list[_Run]:
        cp, step, rank = self.cp, self.step, self.rank[op]
        stages = range(1, self.last_stage[op] + 1) if step.recomputable[op] else range(0)
        runs: list[_Run] = []
        for copy in range(copies if stages else 1):
            forced = copy == 0 and (not stages or not step.held_outputs.isdisjoint(step.outputs[op]))
            present = cp.new_constant(1) if forced else cp.new_bool_var("")
            start, low = rank, rank
            if copy:
                start, low = (
                    cp.new_int_var_from_domain(self.domain([self.at(rank, s) for s in stages]), ""),
                    self.at(rank, 1),
                )
            run = _Run(present, start, {value: cp.new_int_var(low, self.end, "") for value in step.outputs[op]})
            for value, end in run.ends.items():
                pinned = copy == 0 and value in step.held_outputs
                self._retain(run, self.end if pinned else end, step.size_bytes[value])
            self._retain(run, start, step.transient_bytes[op])
            if copy > 1:
                cp.add_implication(present, runs[-1].present)
                cp.add(runs[-1].start < start).only_enforce_if(present)
            if copy:  # what is computed again is no longer read
                for end in runs[-1].ends.values():
                    cp.add(end < start).only_enforce_if(present)
            runs.append(run)
        return runs

    def _retain(self, run: _Run, end: Any, size: int) -> None:
        """Count a size from the run's start to the end, inclusive."""
        if size:
            length = self.cp.new_int_var(1, self.end + 1, "")
            interval = self.cp.new_optional_interval_var(run.start, length, end + 1, run.present, "")
            self.demands.append((interval, size))

    def _fixed_lives(self) -> None:
        """Count what lives at fixed positions: tangents, what the backward makes, its transients."""
        step = self.step
        births = dict.fromkeys(step.tangents, step.forwards) if self.stage else {}
        for op in self.stage:
            births |= dict.fromkeys(step.outputs[op], self._moment(op))
            self._occupy(self._moment(op), self._moment(op), step.transient_bytes[op])
        for value, birth in births.items():
            if step.producer[value] >= 0 or step.users[value] or value in step.held_gradients:
                last = max((self._moment(user) for user in step.users[value]), default=birth)
                self._occupy(birth, self.end if value in step.held_gradients else last, step.size_bytes[value])

    def _occupy(self, start: int, end: int, size: int) -> None:
        if size:
            self.demands.append((self.cp.new_fixed_size_interval_var(start, end - start + 1, ""), size))

    def _read(self, op: int, copy: int, position: Any, values: Collection[int], present: Any) -> None:
        """Let a consumer find every forward value live, in its newest instance, at a position."""
        step = self.step
        for producer in dict.fromkeys(step.producer[v] for v in values):
            if not 0 <= producer < step.forwards:
                continue
            in_forward = 0 <= op < step.forwards and copy == 0
            chosen: list[Any] = []
            for run in self.runs[producer][: 1 if in_forward else None]:
                literal = self.cp.new_bool_var("")
                self.cp.add_implication(literal, run.present)
                if chosen:
                    self.cp.add(run.start < position).only_enforce_if(literal)
                for value in values:
                    if value in run.ends:
                        self.cp.add(run.ends[value] >= position).only_enforce_if(literal)
                chosen.append(literal)
            self.cp.add(sum(chosen) == present)
            self.reads.append(_Read(op, copy, producer, chosen))

    def _limit(self, budget_bytes: int) -> None:
        """Add the cumulative constraint, in units of the common divisor and small enough to add up."""
        unit = gcd(*(size for _, size in self.demands)) or 1
        room = max(budget_bytes, -1) // unit
        sizes = [min(size // unit, room + 1) for _, size in self.demands]
        room = min(room, sum(sizes))
        coarse = sum(sizes) * (self.end + 1) // SAFE_AREA + 1
        if room < 0:
            self.cp.add_bool_or([])
        elif sizes:
            self.cp.add_cumulative([span for span, _ in self.demands], [-(-s // coarse) for s in sizes], room // coarse)

    def _minimize(self, copies: int) -> None:
        """Minimize the ticks of all computations beyond the first of each op."""
        step = self.step
        times = [Fraction(step.time_s[op]) for op in self.runs]
        self.once_s = sum(map(Fraction, step.time_s), Fraction())
        total = sum(times) * copies
        self.ticks_per_s = Fraction(TICKS) / total if total else Fraction(1)
        common = lcm(*(time.denominator for time in times))
        if self.ticks_per_s > common:  # whole multiples of a coarser tick: nothing is rounded
            self.ticks_per_s = Fraction(common, gcd(*(int(time * common) for time in times)) or 1)
        terms = []
        for op, time in zip(self.runs, times, strict=True):
            ticks = floor(time * self.ticks_per_s)
            terms += [ticks * run.present for run in self.runs[op]] + [-ticks]
            self.cp.add_bool_or([run.present for run in self.runs[op]])
        self.cp.minimize(sum(terms))

    def plan(self, solver: Any) -> Plan:
        """Return the plan of a solution."""
        found = sorted(
            (solver.value(run.start), op) for op, runs in self.runs.items() for run in runs if solver.value(run.present)
        )
        split = sum(position < self.step.forwards for position, _ in found)
        found += [(self._moment(op), op) for op in self.stage]
        return self.step.prune([op for _, op in sorted(found)], split)

    def suggest(self, hint: Plan) -> None:
        """Hint the solution that a plan is, computations that have no place in the formulation left out."""
        step, starts = self.step, {op: [-1] * len(runs) for op, runs in self.runs.items()}
        filled = dict.fromkeys(self.runs, 0)
        stage = 0
        for position, op in enumerate(hint.order):
            stage = max(stage, 1) if position >= hint.split else 0
            if op >= step.forwards:
                stage += 1
                continue
            copy = filled[op] + 1 if stage else 0
            usable = copy < len(starts[op]) and stage <= self.last_stage[op]
            start = self.at(self.rank[op], stage)
            if usable and start > starts[op][filled[op]]:
                starts[op][copy], filled[op] = start, copy
        ends = {
            (op, copy): dict.fromkeys(run.ends, starts[op][copy])
            for op, runs in self.runs.items()
            for copy, run in enumerate(runs)
        }
        for read in self.reads:
            position = (
                self.end
                if read.op < 0
                else self._moment(read.op)
                if read.op >= step.forwards
                else starts[read.op][read.copy]
            )
            past = [c for c in range(len(read.chosen)) if 0 <= starts[read.producer][c] < position]
            for copy, literal in enumerate(read.chosen):
                self.cp.add_hint(literal, bool(past) and copy == past[-1])
            if past:
                last = ends[read.producer, past[-1]]
                for value in last:
                    if read.op < 0 or value in step.inputs[read.op]:
                        last[value] = max(last[value], position)
        for op, runs in self.runs.items():
            for copy, run in enumerate(runs):
                self.cp.add_hint(run.present, starts[op][copy] >= 0)
                if starts[op][copy] < 0:
                    continue
                if copy:
                    self.cp.add_hint(run.start, starts[op][copy])
                for value, end in run.ends.items():
                    self.cp.add_hint(end, ends[op, copy][value])
