"""The constraint program of `exact`: computations and retention intervals at staged positions.

Variables: for each forward op up to C computations (present, start) and, for each of their outputs, the
last position at which that instance is read. Constraints: a consumer reads a computation that started
earlier and is retained until then; what is computed again is no longer read (a use reads the newest);
the sizes retained at any position fit (one cumulative). The module imports nothing of ortools: the caller
hands it over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import floor, gcd, lcm
from typing import Any

from rematerialize.solve.step import Plan, Step

TICKS = 1 << 31  # resolution of the makespan
SAFE_AREA = 1 << 60  # bytes x positions that CP-SAT may add up


@dataclass(slots=True)
class Run:
    """One computation of a forward op as variables (constants where nothing is to be decided)."""

    present: Any
    start: Any
    ends: dict[int, Any]  # value -> last position at which this instance is read


@dataclass(slots=True)
class Read:
    """Which computation of a producer a consumer reads at a position."""

    op: int  # consumer; -1 for the caller, who reads the gradients at the end
    copy: int
    producer: int
    chosen: list[Any]  # one literal per copy of the producer


class RetentionModel:
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
        self.runs: dict[int, list[Run]] = {}
        self.reads: list[Read] = []
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

    def _last_use(self, value: int) -> int:
        """Return the last position at which anything may read a forward value."""
        if value in self.late:
            return self.end
        places = [self.at(self.rank.get(op, self.step.forwards), self.last_stage[op]) for op in self.step.users[value]]
        return max(places, default=0)

    def _computations(self, op: int, copies: int) -> list[Run]:
        cp, step, rank = self.cp, self.step, self.rank[op]
        stages = range(1, self.last_stage[op] + 1) if step.recomputable[op] else range(0)
        runs: list[Run] = []
        for copy in range(copies if stages else 1):
            forced = copy == 0 and (not stages or not step.held_outputs.isdisjoint(step.outputs[op]))
            present = cp.new_int_var(int(forced), 1, "")
            start, places = rank, [rank]
            if copy:
                places = [self.at(rank, stage) for stage in stages]
                start = cp.new_int_var_from_domain(self.domain(places), "")
            tops = {value: max(places[-1], self._last_use(value)) for value in step.outputs[op]}
            run = Run(present, start, {value: cp.new_int_var(places[0], top, "") for value, top in tops.items()})
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

    def _retain(self, run: Run, end: Any, size: int) -> None:
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
            self.reads.append(Read(op, copy, producer, chosen))

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
        common = lcm(*(time.denominator for time in times))
        self.ticks_per_s = Fraction(common, gcd(*(int(time * common) for time in times)) or 1)  # rounds nothing
        if total:
            self.ticks_per_s = min(self.ticks_per_s, Fraction(TICKS) / total)
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
        """Hint the solution that a plan is, less the computations that have no place in the formulation."""
        starts = self._places(hint)
        ends = {(op, copy): dict.fromkeys(run.ends, starts[op][copy]) for op in starts for copy, run in self._of(op)}
        for read in self.reads:
            position = self.end
            if read.op >= 0:
                position = starts[read.op][read.copy] if read.op in starts else self._moment(read.op)
            past = [copy for copy, _ in enumerate(read.chosen) if 0 <= starts[read.producer][copy] < position]
            for copy, literal in enumerate(read.chosen):
                self.cp.add_hint(literal, copy in past[-1:])
            for copy in past[-1:]:
                for value in ends[read.producer, copy]:
                    if value in (self.step.inputs[read.op] if read.op >= 0 else self.late):
                        ends[read.producer, copy][value] = max(ends[read.producer, copy][value], position)
        for op, places in starts.items():
            for copy, run in self._of(op):
                self.cp.add_hint(run.present, places[copy] >= 0)
                if places[copy] >= 0:
                    if copy:
                        self.cp.add_hint(run.start, places[copy])
                    for value, end in run.ends.items():
                        self.cp.add_hint(end, ends[op, copy][value])

    def _of(self, op: int) -> Iterator[tuple[int, Run]]:
        return enumerate(self.runs[op])

    def _places(self, plan: Plan) -> dict[int, list[int]]:
        """Return the position of each computation of each forward op in a plan, -1 where there is none."""
        starts = {op: [-1] * len(runs) for op, runs in self.runs.items()}
        filled, stage = dict.fromkeys(self.runs, 0), 0
        for at, op in enumerate(plan.order):
            stage = max(stage, at >= plan.split)
            if op >= self.step.forwards:
                stage += 1
                continue
            copy, place = filled[op] + (stage > 0), self.at(self.rank[op], stage)
            if copy < len(starts[op]) and stage <= self.last_stage[op] and place > starts[op][filled[op]]:
                starts[op][copy], filled[op] = place, copy
        return starts
