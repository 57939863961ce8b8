"""Segments of the forward and what each can do: the stages of the chain DP.

The forward order is cut where few bytes cross. The crossing set X(p) of a cut before op p holds the
values made before p that a forward op from p on, or a backward op that runs before the backward falls
below p, still reads: with X(p) in memory everything above the cut can be done without anything below.
Two nested cuts share what both need (Kusumoto et al., "A graph theoretic framework of recomputation
algorithms", NeurIPS 2019, restricted to the lower sets that are prefixes of one order), so a long
skip is paid for once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from rematerialize.solve.reaches import Reaches

MAX_OPTIONS = 8
BATCHES = 12  # steps from saving all of a large segment's values down to none


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a segment for its backward: keep some values, recompute the others there.

    Attributes
    ----------
    forward, backward : tuple of int
        Ops to run; the backward interleaves recomputations.
    kept_bytes : int
        Held between the two beyond the crossing set above the segment.
    forward_peak_bytes, backward_peak_bytes : int
        Peaks, the crossing set below included; the first without, the second with backward values.
    time_s : float
        Of both together.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    kept_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int
    time_s: float


@dataclass(slots=True)
class Segment:
    """Forward ops [start, stop), the backward ops at its level, and what can be done with them.

    ``lasting`` are values that the forward reads here for the last time although something further
    down may still hold them: whoever drops them here would not free them, so they stay counted.
    ``transit_peak_bytes`` is for passing through with ``below`` held, ``moving_peak_bytes`` without.
    """

    start: int
    stop: int
    backward: list[int]
    previous: int
    below: frozenset[int]
    above: frozenset[int]
    transit: tuple[int, ...] = ()
    transit_s: float = 0.0
    transit_peak_bytes: int = 0
    moving_peak_bytes: int = 0
    lasting: frozenset[int] = frozenset()
    options: list[Option] = field(default_factory=list)


class Segmentation:
    """The forward of a step cut into at most ``limit`` segments with their options.

    Attributes
    ----------
    segments : list of Segment
    base_bytes : list of int
        Backward values and held outputs in memory just before segment t's backward begins.
    """

    def __init__(self, reaches: Reaches, limit: int, *, options: bool = True) -> None:
        step = self.step = reaches.step
        self.level, self.reach = reaches.level, reaches.reach
        self.backward_bytes, between = reaches.backward_bytes, reaches.between
        self.crossing_bytes = reaches.crossing_bytes
        cuts = self._cuts(limit)
        sets = self._crossings(cuts)
        self.segments = [
            Segment(start, stop, [], previous, below, above)
            for previous, start, stop, below, above in zip([0, *cuts], cuts, cuts[1:], sets, sets[1:], strict=False)
        ]
        at = len(self.segments) - 1
        self.base_bytes = [between[-1]] * len(self.segments)
        position = 0
        for at in range(len(self.segments) - 1, -1, -1):
            segment = self.segments[at]
            self.base_bytes[at] = between[position]
            while position < len(self.level) and (at == 0 or self.level[position] >= segment.start):
                segment.backward.append(step.forwards + position)
                position += 1
        if not options:
            return
        for segment, following in zip(self.segments, [*self.segments[1:], None], strict=True):
            self._fill(segment, following)

    def _crossings(self, cuts: Sequence[int]) -> list[frozenset[int]]:
        """Return the crossing set of each cut. O(ops + cuts x values that cross)."""
        found, live, done = [], list[int](), 0
        for cut in cuts:
            live += [value for op in range(done, cut) for value in self.step.outputs[op]]
            live = [value for value in live if self.reach[value] >= cut]
            found.append(frozenset(live))
            done = cut
        return found

    def _cuts(self, limit: int) -> list[int]:
        """Return cut positions: in each of ``limit`` windows the one that the fewest bytes cross."""
        forwards, crossing = self.step.forwards, self.crossing_bytes
        windows = min(limit, forwards)
        cuts = {0, forwards}
        for window in range(1, windows):
            low = window * forwards // windows - forwards // windows // 2
            high = (window + 1) * forwards // windows - forwards // windows // 2
            cuts.add(min(range(low, max(high, low + 1)), key=lambda p: (crossing[p], p)))
        return sorted(cuts)

    def _fill(self, segment: Segment, following: Segment | None) -> None:
        step = self.step
        made = [v for op in range(segment.start, segment.stop) for v in step.outputs[op]]
        local = set(made)
        transit = self.closure(segment, [v for v in made if v in segment.above], segment.below)
        segment.transit = tuple(op for op in transit if step.recomputable[op])
        segment.transit_s = step.duration_s(transit)
        segment.lasting = self._lasting(segment)
        segment.transit_peak_bytes = self.peak(transit, segment.below, segment.above | segment.below)
        segment.moving_peak_bytes = self.peak(transit, segment.below, segment.above | segment.lasting)
        wanted: dict[int, None] = {}
        for op in segment.backward:
            wanted.update((v, None) for v in step.inputs[op] if v in local and not self.step.permanent(v))
        covered: set[int] = set()
        if following is not None:
            covered = {v for v in segment.above if self.reach[v] >= following.stop}
            for op in following.backward:
                covered.update(v for v in step.inputs[op] if v in segment.above)
        segment.options = self._thin(segment, list(wanted), covered)

    def _thin(self, segment: Segment, saved: list[int], covered: set[int]) -> list[Option]:
        """Return options from saving all down to nothing, the cheapest to recompute given up first."""
        options = [self._option(segment, frozenset(saved), covered)]
        batch = max(len(saved) // BATCHES, 1)
        while saved:
            have = {*segment.below, *saved}
            ranked = sorted(saved, key=lambda v: self._worth(segment, v, have))
            saved = [v for v in saved if v not in ranked[:batch]]
            options.append(self._option(segment, frozenset(saved), covered))
        options = _pareto(options)
        if len(options) <= MAX_OPTIONS:
            return options
        spread = [options[k * (len(options) - 1) // (MAX_OPTIONS - 1)] for k in range(MAX_OPTIONS)]
        return list(dict.fromkeys(spread))

    def _lasting(self, segment: Segment) -> frozenset[int]:
        step, found = self.step, []
        for value in segment.below - segment.above:
            for user in step.users[value]:
                if (user if user < step.forwards else self.level[user - step.forwards]) < segment.start:
                    found.append(value)
                    break
        return frozenset(v for v in found if step.producer[v] < segment.previous)

    def _worth(self, segment: Segment, value: int, have: set[int]) -> float:
        have.remove(value)
        ops = self.closure(segment, [value], have)
        have.add(value)
        if not all(self.step.recomputable[op] for op in ops):
            return float("inf")
        return self.step.duration_s(ops) / max(self.step.size_bytes[value], 1)

    def closure(self, segment: Segment, values: Iterable[int], have: Collection[int]) -> list[int]:
        """Return the segment's ops that make the values out of what is there, in order."""
        step = self.step
        needed: set[int] = set()
        todo = [v for v in values if v not in have]
        while todo:
            op = step.producer[todo.pop()]
            if segment.start <= op < segment.stop and op not in needed:
                needed.add(op)
                todo.extend(v for v in step.inputs[op] if v not in have and not self.step.permanent(v))
        return sorted(needed)

    def _option(self, segment: Segment, saved: frozenset[int], covered: set[int]) -> Option:
        step, size = self.step, self.step.size_bytes
        forward = self.closure(segment, [*segment.above, *saved], segment.below)
        have = {*segment.below, *saved}
        backward: list[int] = []
        read: set[int] = set()
        for op in segment.backward:
            missing = [v for v in step.inputs[op] if 0 <= step.producer[v] < step.forwards]
            again = [o for o in self.closure(segment, missing, have) if step.recomputable[o]]
            for extra in (*again, op):
                backward.append(extra)
                read.update(v for v in step.inputs[extra])
                if extra < step.forwards:
                    have.update(step.outputs[extra])
        kept = {v for v in segment.below if v in read} | (saved & read) | segment.lasting
        held = sum(size[v] for v in kept if v not in segment.above or (v in saved and v not in covered))
        return Option(
            forward=tuple(forward),
            backward=tuple(backward),
            kept_bytes=held,
            forward_peak_bytes=self.peak(forward, segment.below, segment.above | kept),
            backward_peak_bytes=self.peak(backward, frozenset(kept), frozenset()),
            time_s=step.duration_s(forward) + step.duration_s(backward),
        )

    def peak(self, ops: Sequence[int], start: Iterable[int], survivors: frozenset[int]) -> int:
        """Return the peak of recomputable forward values (plus all backward memory) over a run of ops."""
        step, size = self.step, self.step.size_bytes
        last = {value: at for at, op in enumerate(ops) for value in step.inputs[op]}
        live = {v for v in start if v in last or v in survivors}
        memory = sum(size[v] for v in live)
        peak = memory
        for at, op in enumerate(ops):
            if op >= step.forwards:
                peak = max(peak, memory + self.backward_bytes[op - step.forwards])
            else:
                fresh = [v for v in step.outputs[op] if v not in live and not self.step.permanent(v)]
                live.update(fresh)
                memory += sum(size[v] for v in fresh)
                peak = max(peak, memory + step.transient_bytes[op])
                for value in fresh:
                    if value not in last and value not in survivors:
                        live.remove(value)
                        memory -= size[value]
            for value in step.inputs[op]:
                if last[value] == at and value in live and value not in survivors:
                    live.remove(value)
                    memory -= size[value]
        return peak


def _pareto(options: list[Option]) -> list[Option]:
    """Keep options that are better in some of kept bytes, peaks and time."""
    kept: list[Option] = []
    for option in options:
        mine = (option.kept_bytes, option.forward_peak_bytes, option.backward_peak_bytes, option.time_s)
        for other in kept:
            theirs = (other.kept_bytes, other.forward_peak_bytes, other.backward_peak_bytes, other.time_s)
            if all(a <= b for a, b in zip(theirs, mine, strict=True)):
                break
        else:
            kept.append(option)
    return kept
