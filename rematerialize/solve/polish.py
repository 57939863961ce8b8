"""Polishing a portfolio's plans: at every level the best of them is searched around; the lowest are squeezed.

Levels don't depend on each other in the first pass, so they run side by side on threads (the compiled code
lets go of the interpreter). Then neighbours exchange what they found, and levels that are slower than the line
between their neighbours are searched once more. Counted work, not the clock, ends each search, so that plans repeat.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from rematerialize.solve.descent import STRETCHES, reach, squeeze
from rematerialize.solve.native import FlatStep, Workbench
from rematerialize.solve.splice import Splicer
from rematerialize.solve.step import Plan

Job = TypeVar("Job")
Found = TypeVar("Found")
THREADS = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
RESTART = 10_000  # moves after which a search starts again from its best plan
HARD, HARDEST = 3, 9  # how much more levels near the minimum of a small step get, and the minimum itself
DEEP = 4  # how much more the lowest plans of a small step get for going lower still
ABOVE = 5  # levels next to the minimum of a small step from which descents to it start
BULGE, BULGES = 0.001, 2  # how far, in shares of the time, a level may be off the line between its neighbours
THRESHOLDS = (0.03, 0.3, 0.003)  # how much slower a plan may be to go on from, restart by restart
PATIENT = (0.003, 0.01, 0.03, 0.1)  # thresholds of the searches of a round at the minimum
SMALL = 400  # ops up to which quality goes before a second's wait
EXCHANGED = 800  # ops up to which levels try what a higher one found: descents take long
MEDIUM = 3_000  # ops up to which every level is searched
LARGE = 12_000  # ops beyond which levels are searched once, without restarts
LONG = 6  # plans longer than this many times the step's ops aren't searched around: too slow
LONGEST = 100  # the same for small steps where no other fits


@dataclass(frozen=True, slots=True)
class Point:
    """A plan that was replayed; ``peak_bytes`` is its peak or a level that it fits.

    ``rank`` tells which of the orders that the planner tries it came from.
    """

    peak_bytes: int
    time_s: float
    length: int
    solver: str
    plan: Plan
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much a step of a size gets, in moves of the local search.

    Attributes
    ----------
    starts : int
        Plans of different solvers that each level tries.
    first, second : int
        Moves per start, and for the best of a level.
    squeeze : int
        Moves for lowering the minimum, per start.
    deepest : int
        Of the lowest plans found so, how many are lowered further.
    lanes : int
        Descents through all levels near the minimum, each with its own way down.
    patient : int
        Moves of every search of a round around the lowest plan.
    rounds, idle : int
        Such rounds at most, and without gain; after one without, the next gets twice as many moves.
    spliced : int
        Of the plans that searches at a level ended with, how many are spliced; none at all without one.
    halfway : int
        Moves for a level between two others, of those that a budget asks for.
    halvings : int
        How often the room between two levels is halved towards a budget.
    exchanges : int
        How often the levels try what their neighbours found.
    stride : int
        Every how many levels are searched.
    """

    starts: int
    first: int
    second: int
    squeeze: int
    deepest: int = 0
    lanes: int = 0
    patient: int = 0
    rounds: int = 0
    idle: int = 0
    spliced: int = 0
    halfway: int
    halvings: int
    exchanges: int
    stride: int


def effort_for(ops: int) -> Effort:
    """Return the effort for a number of ops: some seconds for the smallest, about one for 1,000, then in proportion."""
    if ops <= SMALL:
        share = min(ops, 150)
        return Effort(
            starts=4,
            first=75 * share,
            second=200 * share,
            squeeze=1_800 * share,
            deepest=3,
            lanes=6,
            patient=min(4_000 * share, 60_000),
            rounds=40,
            idle=3 + (ops > 150),
            spliced=12,
            halfway=240 * share,
            halvings=7,
            exchanges=3,
            stride=1,
        )
    if ops <= MEDIUM:
        share = max(ops, 1_000) // 100
        return Effort(
            starts=4,
            first=80 * share,
            second=600 * share,
            squeeze=120 * share,
            halfway=80 * share,
            halvings=10,
            exchanges=1,
            stride=1,
        )
    work, halvings, stride = (1_000, 10, 2) if ops <= LARGE else (100, 7, 3)
    second = work * (ops // 100)
    return Effort(starts=1, first=0, second=second, squeeze=0, halfway=0, halvings=halvings, exchanges=1, stride=stride)


@dataclass(frozen=True, slots=True)
class _Squeeze:
    """A search for lower peaks: from where, with closer and wider layouts in turn or not, and how hard."""

    start: Point
    varied: bool = False
    seed: int = 1
    stride: float = 0.08
    times: int = 1


class Polisher:
    """Local search for one step.

    Parameters
    ----------
    flat : FlatStep
    replay : callable
        Plan and solver name to Point.
    late : callable
        Whether the time limit has passed.
    """

    def __init__(self, flat: FlatStep, replay: Callable[[Plan, str], Point], late: Callable[[], bool]) -> None:
        self._flat = flat
        self._replay = replay
        self._late = late
        self.ops = len(flat.step.names)
        self.effort = effort_for(self.ops)
        self.descends = self.ops <= EXCHANGED
        self.longest = (LONG if self.ops <= SMALL else LONG // 3) * self.ops
        self._free: list[Workbench] = []
        self._splicer = Splicer(flat.step)
        self._tried: dict[int, list[Point]] = {}  # by level, what searches ended with
        self._front: list[Point] = []  # of all plans that levels were given and that they got

    def lower(self, lowest: Sequence[Point], turn: int) -> list[Point]:
        """Return plans of lower peak that descents from some of the lowest plans find, each turn by other ways."""
        jobs = [
            _Squeeze(start, varied=True, seed=9_001 + 100 * turn + at, stride=0.04) for at, start in enumerate(lowest)
        ]
        return self._squeezed(jobs) if self.effort.deepest else []

    def squeeze(self, points: Sequence[Point], others: Sequence[Point] = ()) -> list[Point]:
        """Return plans of lower peak, from the lowest of every order and of the solvers that got lowest, and others."""
        if not self.effort.squeeze:
            return []
        ranked = sorted((point for point in points if point.length <= self.longest), key=by_peak)
        orders = {point.rank: point for point in reversed(ranked)}
        solvers = {point.solver: point for point in reversed(ranked)}
        lowest = sorted(solvers.values(), key=by_peak)[: self.effort.starts]
        if self.ops <= MEDIUM:
            lowest += [point for point in orders.values() if point not in lowest]
        lowest += others

        found = self._squeezed([_Squeeze(start) for start in lowest])
        if self.effort.deepest:
            found += self._squeezed([_Squeeze(start, varied=True, seed=1_001) for start in lowest])
            ways: dict[tuple[str, int], Point] = {}
            for point in sorted([*lowest, *found], key=by_peak):
                ways.setdefault((point.solver, point.rank), point)
            deepest = sorted(ways.values(), key=by_peak)[: self.effort.deepest]
            again = [_Squeeze(start, varied=True, seed=5_001, stride=0.04, times=DEEP) for start in deepest]
            found += self._squeezed(again)
        return found

    def _squeezed(self, jobs: Sequence[_Squeeze]) -> list[Point]:
        def run(job: _Squeeze) -> list[Point]:
            start, found = job.start, []
            with self._bench(2 * start.length + 2 * self.ops, varied=job.varied) as bench:
                work = job.times * self.effort.squeeze
                for plan in squeeze(bench, start.plan, work=work, finest=0.0005, stride=job.stride, seed=job.seed):
                    found.append(replace(self._replay(plan, start.solver), rank=start.rank))
                    if self._late():
                        break
            return found

        return [point for found in side_by_side(run, jobs) for point in found]

    def levels(self, points: Sequence[Point], levels: Sequence[int], tops: Sequence[Point] = ()) -> list[Point]:
        """Return the best plan found for each level that has a start, highest first.

        ``tops`` are plans with much memory from which to go down to the lowest levels once more.
        """
        short = [point for point in points if point.length <= self.longest]
        limit = self.ops * (0 if self.ops > MEDIUM else LONG if self.ops > SMALL else LONGEST)
        possible = [point for point in points if point.length <= limit]

        def first(level: int) -> Point | None:
            best: Point | None = None
            # Near the least memory there may be none but long ones.
            lowest = starts(possible, level)[:1]
            moves = self.effort.first * (HARD if self.ops <= SMALL and level == ranked[-1] else 1)
            for start in starts(short, level)[: self.effort.starts] or lowest:
                if self._late():
                    break
                found = self.at(start, level, work=self._affordable(moves, start))
                if best is None or found.time_s < best.time_s:
                    best = found
            return best

        def second(job: tuple[Point, int]) -> Point:
            work = self.effort.second
            if job[0].length > self.longest:
                work = self._affordable(work, job[0])
            elif self.ops <= SMALL and job[1] <= steep:
                work *= HARDEST if job[1] == ranked[-1] else HARD
                twice = max(2 * self.ops, 1)  # a round of moves takes in proportion to a plan's length
                work = work * min(max(job[0].length, twice), 2 * twice) // twice
            elif SMALL < self.ops <= LARGE and job[1] == ranked[-1]:
                work *= HARD
            elif self.ops > SMALL and job[1] > easy:
                work //= HARD
            return job[0] if self._late() else self.at(job[0], job[1], work=work, seed=2)

        ranked = sorted({*levels}, reverse=True)
        self._tried = {level: [] for level in ranked} if self.effort.spliced else {}
        self._front = [*fronts([*self._front, *short])]
        steep = steep_below(ranked[-1], ranked[0])
        easy = ranked[0] * 6 // 10  # with so much room the first pass is within 0.3 % of the lower bound
        found = [(point, level) for point, level in zip(side_by_side(first, ranked), ranked, strict=True) if point]
        if self.effort.second:
            found = [(point, level) for point, (_, level) in zip(side_by_side(second, found), found, strict=True)]
        plans, within = [point for point, _ in found], [level for _, level in found]
        if self.effort.lanes and tops:
            plans = self._lanes(plans, within, steep, tops)
        plans = self._spliced(plans, within)
        for _ in range(self.effort.exchanges):
            plans = self._exchanged(plans, within)
        for turn in range(BULGES if self.ops <= SMALL else 0):
            plans = self._flattened(plans, within, turn)
            plans = self._spliced(plans, within, 0 if turn == 0 else len(plans) - 1)
        plans = self._spliced(self._patiently(plans, within), within)
        self._front = [*fronts([*self._front, *plans])]
        self._tried, self._splicer = {}, Splicer(self._flat.step)  # together they are some megabytes
        return plans

    def _spliced(self, plans: Sequence[Point], levels: Sequence[int], first: int = 0) -> list[Point]:
        """Splice each level's plan, from some level down, from all there are and what searches at it ended with."""
        plans = list(plans)
        # A time limit that passes early leaves no plans, whose last is then at -1.
        for at in range(max(first, 0), len(plans)) if self.effort.spliced else ():
            tried = sorted(self._tried[levels[at]], key=by_time)[: self.effort.spliced]
            pool = [point.plan for point in [*plans, *tried, *self._front] if point.length <= self.longest]
            found = self._splicer.splice([*dict.fromkeys([plans[at].plan, *pool])], levels[at])
            if found is not None:
                plans[at] = self.better(plans[at], replace(self._replay(found, plans[at].solver), rank=plans[at].rank))
        return plans

    def _patiently(self, plans: Sequence[Point], levels: Sequence[int]) -> list[Point]:
        """Search around the lowest plan again and again: at the minimum many small changes lie between good plans."""
        plans, idle = list(plans), 0
        for turn in range(self.effort.rounds if plans else 0):
            start = plans[-1]
            plans[-1] = self.round(start, levels[-1], self.effort.patient << idle, seed=41 + 10 * turn)
            plans = self._spliced(plans, levels, len(plans) - 1)
            idle = 0 if plans[-1].time_s < start.time_s else idle + 1
            if idle == self.effort.idle:
                break
        return plans

    def round(self, start: Point, level: int, moves: int, *, seed: int) -> Point:
        """Return the best of several searches from one plan, without restarts."""

        def run(way: int) -> Point:
            with self._bench(2 * start.length + self.ops) as bench:
                if self._late() or not bench.load(start.plan):
                    return start
                work = self._affordable(moves, start)
                bench.improve(level, work, threshold=PATIENT[way], seed=seed + way)
                return self._noted(bench, level, start)

        return min([start, *side_by_side(run, range(len(PATIENT)))], key=lambda point: point.time_s)

    def _lanes(self, plans: Sequence[Point], levels: Sequence[int], steep: int, tops: Sequence[Point]) -> list[Point]:
        """Go down to the lowest levels from several plans above them, level by level: each may end elsewhere."""
        first = sum(level > steep for level in levels)
        heads = [*plans[max(first - 3, 0) : first : 2], *tops]

        def run(lane: int) -> list[Point | None]:
            at, found = heads[lane % len(heads)], []
            for level in levels[first:]:
                lower = None if self._late() else self.down(at, level, work=self.effort.second, seed=31 + lane)
                at = lower or at
                found.append(lower)
            return found

        plans = list(plans)
        for lane in side_by_side(run, range(self.effort.lanes)):
            plans[first:] = map(self.better, plans[first:], lane)
        return plans

    def _flattened(self, plans: Sequence[Point], levels: Sequence[int], turn: int) -> list[Point]:
        """Search once more at the lowest level, and where a plan is slower than those beside it let expect."""
        if len(plans) < 2:
            return list(plans)

        def run(at: int) -> Point:
            above, point, level = plans[at - 1], plans[at], levels[at]
            work, seed, lowest = self.effort.second, 20 * turn, at + 1 == len(plans)
            if lowest:
                work *= HARD if point.length <= self.longest else 1
            elif not self._bulges(plans[at - 1 : at + 2], levels[at - 1 : at + 2], BULGE * plans[0].time_s):
                return point
            if self._late():
                return point
            found = self.better(point, self.down(above, level, work=work, seed=11 + seed))
            for higher in range(max(at - ABOVE, 0), at - 1) if lowest else ():
                other = self.down(plans[higher], level, work=work // 2, seed=11 + seed + at - higher)
                found = self.better(found, other)
            if not lowest:
                found = self.better(found, self.at(plans[at + 1], level, work=work, seed=12 + seed))
            return self.better(found, self.at(point, level, work=work, seed=13 + seed))

        return [plans[0], *side_by_side(run, range(1, len(plans)))]

    @staticmethod
    def _bulges(plans: Sequence[Point], levels: Sequence[int], by_s: float) -> bool:
        """Whether the second of three plans is that much slower than the line between the others."""
        share = (levels[1] - levels[2]) / (levels[0] - levels[2])
        return plans[1].time_s > plans[2].time_s + share * (plans[0].time_s - plans[2].time_s) + by_s

    def _exchanged(self, plans: Sequence[Point], levels: Sequence[int]) -> list[Point]:
        """Let every level, highest first, try what the levels above and then below it found."""
        plans = list(plans)

        def work(at: int) -> int:
            return self.effort.first if plans[at].length <= self.longest else 0

        for at in range(1, len(plans)) if self.descends else ():
            if not self._late():
                plans[at] = self.better(plans[at], self.down(plans[at - 1], levels[at], work=work(at)))
        for at in range(len(plans) - 2, -1, -1):
            lower = plans[at + 1]
            if (work(at) or lower.time_s < plans[at].time_s) and not self._late():
                plans[at] = self.better(plans[at], self.at(lower, levels[at], work=work(at) // 2, seed=3))
        return plans

    def raised(self, lower: Sequence[Point], levels: Sequence[Point]) -> list[Point]:
        """Return faster plans for levels, from the lowest up to where none is, by what was found below them since."""
        best, found = min(lower, key=lambda point: point.time_s, default=None), []
        for point in sorted(levels, key=by_peak):
            if best is None or point.peak_bytes < best.peak_bytes or self._late():
                continue
            other = self.at(best, point.peak_bytes, work=self.effort.second, seed=7)
            if other.time_s >= point.time_s:
                break
            best = other
            found.append(other)
        return found

    def _affordable(self, work: int, start: Point) -> int:
        """Return fewer moves where none but long plans fit: a move takes as long as the plan has executions of an op,
        and there are more of them in proportion.
        """
        return work if start.length <= self.longest else work * self.longest // (2 * start.length)

    @staticmethod
    def better(point: Point, other: Point | None) -> Point:
        """Return the faster of two plans, the first when neither is."""
        return other if other is not None and other.time_s < point.time_s else point

    def down(self, start: Point, level: int, *, work: int, seed: int = 5) -> Point | None:
        """Return a plan within a level that a descent and a search from a plan above it find."""
        with self._bench(2 * start.length + self.ops) as bench:
            if not reach(bench, start.plan, level, stretches=STRETCHES[:1], work=work, seed=seed):
                return None
            bench.spend(level)
            self._improve(bench, level, work, seed=seed)
            return self._noted(bench, level, start)

    def _improve(self, bench: Workbench, level: int, work: int, *, seed: int) -> None:
        for turn, part in enumerate(_turns(work) if self.ops <= LARGE else (work,)):
            bench.improve(level, part, threshold=THRESHOLDS[turn % len(THRESHOLDS)], seed=seed + turn)

    def at(self, start: Point, level: int, *, work: int, seed: int = 1) -> Point:
        """Return the best plan within a level that a search from a plan within it finds."""
        with self._bench(2 * start.length + self.ops) as bench:
            if not bench.load(start.plan):
                return start
            bench.spend(level, rounds=20 if self.ops <= SMALL else 4 if self.ops <= MEDIUM else 2)
            self._improve(bench, level, work, seed=seed)
            return self._noted(bench, level, start)

    def _noted(self, bench: Workbench, level: int, start: Point) -> Point:
        """Return the plan on a bench, replayed: a bench rounds sizes, and its sums of times drift."""
        point = self._replay(bench.plan(), start.solver)
        if level in self._tried:
            self._tried[level].append(point)
        return point

    def _bench(self, length: int, *, varied: bool = True) -> _Borrowed:
        most = self.ops <= SMALL
        return _Borrowed(self._free, self._flat, length, most=most, varied=varied and most)


class _Borrowed:
    """A bench from the pool, or a new one when none is long enough."""

    def __init__(self, free: list[Workbench], flat: FlatStep, length: int, *, most: bool, varied: bool) -> None:
        self._free = free
        self._bench = next((b for b in list(free) if b.length >= length), None)
        if self._bench is not None:
            try:
                free.remove(self._bench)
            except ValueError:  # another thread took it
                self._bench = None
        if self._bench is None:
            self._bench = Workbench(flat, length, varied=most)
        self._bench.limit(length, varied=varied)  # whichever bench was free, plans repeat

    def __enter__(self) -> Workbench:
        assert self._bench is not None
        return self._bench

    def __exit__(self, *exception: object) -> None:
        assert self._bench is not None
        self._free.append(self._bench)


def side_by_side(function: Callable[[Job], Found], jobs: Iterable[Job]) -> list[Found]:
    """Return what a function makes of each job, in their order, worked on by several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, jobs))


def _turns(work: int) -> list[int]:
    """Split the work of one search into restarts from its best plan: variety is worth more than length."""
    count = max(work // RESTART, min(work, 1))
    return [work // count] * count if count else []


def steep_below(least: int, most: int) -> int:
    """Return the level from which plans differ most down to the least memory."""
    return max(least * 150 // 100, least + (most - least) * 15 // 100)


def by_peak(point: Point) -> tuple[int, float, int]:
    """Sort key: low peaks first, then fast ones, then short ones."""
    return point.peak_bytes, point.time_s, point.length


def by_time(point: Point) -> tuple[float, int, tuple[int, ...], int]:
    """Sort key: fast plans first, and no two different ones alike: threads end in any order."""
    return point.time_s, point.peak_bytes, point.plan.order, point.plan.split


def starts(points: Iterable[Point], level: int) -> list[Point]:
    """Return the fastest plan of each solver within a level, two of the solver that leads."""
    chosen: list[Point] = []
    count: dict[str, int] = {}
    seen: set[float] = set()
    for point in sorted(points, key=lambda p: (p.time_s, p.peak_bytes)):
        taken = count.get(point.solver, 0)
        if point.peak_bytes <= level and taken < 1 + (not chosen) and point.time_s not in seen:
            count[point.solver] = taken + 1
            seen.add(point.time_s)
            chosen.append(point)
    return chosen


def fronts(points: Iterable[Point]) -> Iterator[Point]:
    """Yield the Pareto front of peak and time, by rising peak."""
    best = float("inf")
    for point in sorted(points, key=by_peak):
        if point.time_s < best:
            best = point.time_s
            yield point
