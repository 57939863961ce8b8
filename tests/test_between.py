"""Budgets between levels: whatever searches find, overhead never rises with the budget, in any order of questions."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from rematerialize.solve.between import Between
from rematerialize.solve.polish import SMALL, Effort, Point, effort_for
from rematerialize.solve.step import Plan

NOTHING = Plan((), 0)


class LuckyPolisher:
    """Searches that find anything at all, the same again for the same question.

    Parameters
    ----------
    luck : int
        A seed.
    gain : float
        How much faster, at most, a plan that is found may be than the one that the search starts from.
    """

    def __init__(self, luck: int, gain: float = 0.6, *, ops: int = 50, longest: int = 10) -> None:
        self.luck, self.gain, self.ops, self.longest = luck, gain, ops, longest
        self.effort: Effort = effort_for(ops)

    def at(self, start: Point, level: int, *, work: int, seed: int = 1) -> Point:
        assert start.peak_bytes <= level, "a search starts within its level"
        chance = random.Random(f"{self.luck} {start.peak_bytes} {start.time_s} {level} {work} {seed}").random()
        return replace(start, peak_bytes=level, time_s=start.time_s * (1 - self.gain * max(chance - 0.4, 0)))

    def down(self, start: Point, level: int, *, work: int, seed: int = 5) -> Point | None:
        chance = random.Random(f"{self.luck} {start.peak_bytes} {start.time_s} {level} {work} {seed}").random()
        return None if chance < 0.3 else replace(start, peak_bytes=level, time_s=start.time_s * (0.5 + chance))

    def round(self, start: Point, level: int, moves: int, *, seed: int) -> Point:
        return self.at(start, level, work=moves, seed=seed)

    @staticmethod
    def better(point: Point, other: Point) -> Point:
        return other if other.time_s < point.time_s else point


def point(peak_bytes: int, time_s: float, length: int = 1) -> Point:
    return Point(peak_bytes, time_s, length, "test", NOTHING)


def between(levels: list[Point], polisher: LuckyPolisher, found: list[Point] | None = None) -> Between:
    return Between(polisher, levels, found or levels, levels[-1:], lambda: False)  # type: ignore[arg-type]


def answer(asked: Between, levels: list[Point], budget: int) -> float:
    return asked.plan(sum(level.peak_bytes <= budget for level in levels) - 1, budget).time_s


@st.composite
def fronts(draw: st.DrawFn) -> list[Point]:
    """Levels by rising peak and falling time, some of plans too long to be searched around."""
    peaks = sorted(draw(st.sets(st.integers(10, 90), min_size=2, max_size=7)))
    times = sorted(draw(st.sets(st.integers(100, 300), min_size=len(peaks), max_size=len(peaks))), reverse=True)
    long = draw(st.integers(0, 2))
    return [
        point(peak, float(time), 99 if at < long else 1)
        for at, (peak, time) in enumerate(zip(peaks, times, strict=True))
    ]


@given(fronts(), st.integers(0, 10**6), st.sampled_from([0.05, 0.6]), st.randoms(use_true_random=False))
def test_overhead_never_rises_and_the_order_of_questions_makes_no_difference(
    levels: list[Point], luck: int, gain: float, shuffler: random.Random
) -> None:
    budgets = list(range(levels[0].peak_bytes, levels[-1].peak_bytes + 3))
    rising = between(levels, LuckyPolisher(luck, gain))
    times = [answer(rising, levels, budget) for budget in budgets]
    assert times == sorted(times, reverse=True)
    shuffler.shuffle(mixed := [*budgets])
    other = between(levels, LuckyPolisher(luck, gain))
    found = {budget: answer(other, levels, budget) for budget in mixed}
    assert [found[budget] for budget in budgets] == times


@given(fronts(), st.integers(0, 10**6))
def test_an_answer_fits_its_budget_and_is_no_slower_than_the_level_below(levels: list[Point], luck: int) -> None:
    asked = between(levels, LuckyPolisher(luck))
    for budget in range(levels[0].peak_bytes, levels[-1].peak_bytes):
        index = sum(level.peak_bytes <= budget for level in levels) - 1
        plan = asked.plan(index, budget)
        assert plan.peak_bytes <= budget
        assert plan.time_s <= levels[index].time_s


class OneFind(LuckyPolisher):
    """Searches that find one plan: at any level from 70 bytes on, from a plan below 70."""

    def at(self, start: Point, level: int, *, work: int, seed: int = 1) -> Point:
        lucky = level >= 70 and start.peak_bytes < 70
        return point(70, 112.0) if lucky else start

    def down(self, start: Point, level: int, *, work: int, seed: int = 5) -> Point | None:
        return None


def test_a_plan_that_is_faster_than_the_level_above_makes_that_level_faster() -> None:
    levels = [point(40, 200.0), point(80, 120.0), point(90, 110.0), point(100, 100.0)]
    asked = between(levels, OneFind(0))
    assert [answer(asked, levels, budget) for budget in (60, 72, 80, 85)] == [200.0, 112.0, 112.0, 112.0]


def test_levels_of_larger_steps_stay_as_they_are() -> None:
    levels = [point(40, 200.0), point(80, 120.0), point(90, 110.0), point(100, 100.0)]
    asked = between(levels, OneFind(0, ops=SMALL + 1))
    assert answer(asked, levels, 80) == 120.0


class SecondFind(LuckyPolisher):
    """Searches that find one plan from the lowest level, and from that plan another."""

    def at(self, start: Point, level: int, *, work: int, seed: int = 1) -> Point:
        if start.time_s == 300.0 and level >= 65:
            return point(65, 150.0)
        return point(85, 112.0) if start.time_s == 150.0 and level >= 85 else start

    def down(self, start: Point, level: int, *, work: int, seed: int = 5) -> Point | None:
        return None


def test_a_level_is_searched_from_what_was_found_at_the_one_below() -> None:
    levels = [point(30, 300.0), point(70, 200.0), point(90, 120.0), point(95, 110.0), point(100, 100.0)]
    asked = between(levels, SecondFind(0))
    assert [answer(asked, levels, budget) for budget in (70, 90, 95)] == [150.0, 112.0, 110.0]
