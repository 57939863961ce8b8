"""Plans for the budgets between the levels that were searched.

The room between two levels is halved again and again towards a budget, and the levels on both sides of it are searched
again, from below. However many budgets are asked for, and in whatever order, each gets the same plan, and overhead
never rises with the budget. Let L[i] be the plan of level i, levels rising:

- I[i], the improved plan of level i, depends on L[i - 1], L[i] and L[i + 1] alone, and is at least as fast as L[i], but
  not faster than L[i + 1].
- J[i], what one more search makes of it, depends on I[i - 1], I[i] and I[i + 1] alone, and is at least as fast as I[i],
  but not faster than I[i + 1], which is not faster than J[i + 1].
- What is found between levels i and i + 1 is at least as fast as J[i], but not faster than J[i + 1], and by halves the
  same again.

So the plans of one interval are never faster than those of the next, although neither knows what the other found.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from rematerialize.solve.polish import LARGE, SMALL, Point, Polisher, side_by_side, steep_below

HIGHER = 2  # plans of the portfolio above a level between two others from which a descent to it starts
HARD = 3  # how much more halfway plans of small steps get near the minimum, where searched levels get `polish.HARD`
CLIMB = 4  # searches from the level below up to a level that is improved: a half of the way, three quarters, ..., all
CLIFF = 0.01  # how much slower than the level above, as a share of it, a plan is searched around once more, longer
CLIMBING = 40  # the first of their turns: halvings have lower ones


class Between:
    """The refinement of a search's levels towards the budgets that are asked for.

    Parameters
    ----------
    polisher : Polisher or None
        None: levels are left as they are.
    levels : sequence of Point
        Plans of levels by rising peak, and falling time.
    found : sequence of Point
        The fastest of all plans that the search saw, in the same order.
    tops : sequence of Point
        Plans with much memory from which descents start, too.
    late : callable
        Whether the time limit has passed.
    """

    def __init__(
        self,
        polisher: Polisher | None,
        levels: Sequence[Point],
        found: Sequence[Point],
        tops: Sequence[Point],
        late: Callable[[], bool],
    ) -> None:
        self._polisher = polisher
        self._levels = levels
        self._found = found
        self._tops = tops
        self._late = late
        self._steep = steep_below(levels[0].peak_bytes, levels[-1].peak_bytes)
        self._halves: dict[tuple[int, int], Point] = {}
        self._climbed: dict[int, Point] = {}
        self._improved: dict[int, Point] = {}

    def plan(self, index: int, budget_bytes: int) -> Point:
        """Return the fastest plan within a budget that lies between level ``index`` and the next."""
        best = self._levels[index]
        if self._polisher is None or index + 1 == len(self._levels) or best.length > self._polisher.longest:
            return best
        if not self._late():
            best = self._halved(self._polisher, index, budget_bytes)
        return min(best, self._fastest_within(budget_bytes), key=lambda point: point.time_s)

    def _halved(self, polisher: Polisher, index: int, budget_bytes: int) -> Point:
        """Halve the room between two levels towards a budget; return the highest plan below it."""
        low, high = (level.peak_bytes for level in self._levels[index : index + 2])
        best, above = self._improve(polisher, index), self._improve(polisher, index + 1)
        for turn in range(polisher.effort.halvings):
            level = (low + high) // 2
            if level <= low or best.time_s <= above.time_s:
                break
            if (low, high) not in self._halves:
                self._halves[low, high] = self._search(polisher, best, above, level, turn, above.time_s)
            middle = self._halves[low, high]
            if level <= budget_bytes:
                low, best = level, middle
            else:
                high, above = level, middle
        return best

    def _improve(self, polisher: Polisher, index: int) -> Point:
        """Return the plan of a level of a small step after searches from below, the last from an improved plan there.

        What that finds would otherwise be found between the levels, and be too fast.
        """
        if index not in self._improved:
            here = self._climb(polisher, index)
            if self._is_improved(polisher, index):
                below, fastest_s = self._climb(polisher, index - 1), self._climb(polisher, index + 1).time_s
                if below.length <= polisher.longest and here.time_s > fastest_s:
                    level = self._levels[index].peak_bytes
                    again = self._search(polisher, below, here, level, CLIMBING + CLIMB, fastest_s)
                    here = polisher.better(here, again)
            self._improved[index] = here
        return self._improved[index]

    def _is_improved(self, polisher: Polisher, index: int) -> bool:
        inside = 0 < index < len(self._levels) - 1
        return polisher.ops <= SMALL and inside and self._levels[index].length <= polisher.longest

    def _climb(self, polisher: Polisher, index: int) -> Point:
        """Return the plan of a level of a small step after searches from the level below, higher and higher up to it.

        Searches from the same few plans end in the same few places; what has just become possible at a level in between
        is a start that none of them had.
        """
        here = self._levels[index]
        if not self._is_improved(polisher, index):
            return here
        if index not in self._climbed:
            below, best, fastest_s = self._levels[index - 1], here, self._levels[index + 1].time_s
            low, high = below.peak_bytes, here.peak_bytes
            for turn in range(CLIMB if below.length <= polisher.longest else 0):
                level = (low + high) // 2 if turn + 1 < CLIMB else high
                if level > low and best.time_s > fastest_s:
                    below = self._search(polisher, below, best, level, CLIMBING + turn, fastest_s)
                    best, low = polisher.better(best, below), level
            self._climbed[index] = best
        return self._climbed[index]

    def _search(self, polisher: Polisher, below: Point, above: Point, level: int, turn: int, fastest_s: float) -> Point:
        """Return the best plan found within a level between two plans, the one below where none is better.

        Searches differ by turn: where sizes are few, the levels between two others are all the same to them.
        Plans faster than ``fastest_s`` don't count. Where what they find is far from that, longer ones go on from it.
        """
        fastest = self._fastest_within(level)
        lower = [below] if fastest is below else [below, fastest]
        above_it = bisect_right(self._found, level, key=lambda point: point.peak_bytes)
        higher = self._found[above_it : above_it + HIGHER] if polisher.ops <= LARGE else []
        higher = [above, *(point for point in higher if point is not above), *self._tops]
        work = polisher.effort.halfway * (HARD if polisher.ops <= SMALL and level <= self._steep else 1)

        def run(start: Point) -> Point | None:
            if start.peak_bytes <= level:
                return polisher.at(start, level, work=2 * work, seed=4 + 20 * turn)
            return polisher.down(start, level, work=work if start is above else 0, seed=5 + 20 * turn)

        found = [point for point in side_by_side(run, [*lower, *higher]) if point is not None]
        if any(point.time_s < fastest_s for point in found):
            found += [polisher.at(start, level, work=0) for start in lower]
        best = self._best_of([below, *found], fastest_s)
        if polisher.effort.patient and best.time_s > fastest_s * (1 + CLIFF):
            found = [polisher.round(best, level, polisher.effort.patient, seed=71 + 20 * turn)]
            best = self._best_of([best, *found], fastest_s)
        return best

    @staticmethod
    def _best_of(points: Sequence[Point], fastest_s: float) -> Point:
        """Return the first of the fastest points that aren't too fast."""
        return min((point for point in points if point.time_s >= fastest_s), key=lambda point: point.time_s)

    def _fastest_within(self, budget_bytes: int) -> Point:
        """Return the fastest plan that the search saw within a budget."""
        return self._found[bisect_right(self._found, budget_bytes, key=lambda point: point.peak_bytes) - 1]
