"""A training step seen as a chain of stages (`rematerialize.solve.problem`).

The forward is cut where as few values as possible cross: one where that gives stages fine enough, which is
what a network written as a sequence of modules hands from one to the next. What a network hands to all its
modules (a mask, rotary embeddings, the encoder's output) is no part of that: it stays once it is made.
Whatever the chain's model leaves out is left to the judge: an order of stages is always a valid order of
ops, and its peak is computed from the step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rematerialize.solve.native import FlatStep
from rematerialize.solve.problem import Action, Chain
from rematerialize.solve.step import Plan, Step

WIDEST = 3  # most values that may cross a cut
COARSER = 2  # fewer may cross, if that makes the largest stage no larger than by this factor
SHARED_USERS, SHARED_SPAN = 3, 4  # a value that this many ops read over a quarter of the forward is for all stages
LONGEST = 30  # plans that run more forward ops than this many times the step's are not worth having
MOST_OPS = 600_000  # but of long steps shorter ones are


class Stages:
    """Ops of a step as a chain of at most ``limit`` stages.

    O(edges) and O(limit x values that cross).

    Parameters
    ----------
    step : Step
    limit : int
    forward, backward : sequence of int, optional
        The ops to take, in an executable order; all by default. What ops outside read of them crosses the
        end of the chain; what ops outside made for them is there before.
    flat : FlatStep, optional
        The step as arrays, where somebody has made them already.

    Attributes
    ----------
    cuts : list of int
        Stage l has the positions cuts[l] .. cuts[l+1]-1 of ``forward``.
    crossing : list of frozenset of int
        The values a_0 .. a_n.
    chain : Chain
    lasting_bytes : int
        Gradients still in memory when all of ``backward`` is done.
    """

    def __init__(
        self,
        step: Step,
        limit: int,
        forward: Sequence[int] | None = None,
        backward: Sequence[int] | None = None,
        *,
        flat: FlatStep | None = None,
    ) -> None:
        self.step = step
        self.flat = flat or FlatStep(step)
        self.forward = range(step.forwards) if forward is None else forward
        self.backward = range(step.forwards, len(step.names)) if backward is None else backward
        self._at = {op: at for at, op in enumerate(self.forward)}
        self._back_at = {op: at for at, op in enumerate(self.backward)}
        self._levels = self._backward_levels()
        reach = {v: self._reach_of(v) for op in self.forward for v in step.outputs[op] if not step.permanent(v)}
        self._shared = self._for_all_stages(reach)
        self._reach = {v: last for v, last in reach.items() if v not in self._shared}
        self.cuts = self._choose(limit)
        self.crossing = self._crossing()
        lows = [-level for level in self._levels]  # rises
        self.bounds = [bisect_right(lows, -cut) for cut in self.cuts]
        self.bounds[0] = len(self.backward)
        self.chain = self._measure()
        self._runs = self._spell()

    def ops(self, action: Action, again: bool) -> NDArray[np.int64]:
        """Return the ops of an action; ``again`` leaves out those that run only once."""
        first, later, after = self._runs[action.stage]
        return after if action.kind == "B" else later if again else first

    def _spell(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Return the ops of each stage: all, those that can run again, and the backward's."""
        ops, after = np.array(self.forward, dtype=np.int64), np.array(self.backward, dtype=np.int64)
        again = np.array(self.step.recomputable, dtype=bool)[ops]
        again &= np.array([self._shared.isdisjoint(self.step.outputs[op]) for op in self.forward], dtype=bool)
        found = []
        for stage, (start, stop) in enumerate(pairwise(self.cuts)):
            run = ops[start:stop]
            found.append((run, run[again[start:stop]], after[self.bounds[stage + 1] : self.bounds[stage]]))
        return found

    def worthwhile(self, actions: Sequence[Action]) -> bool:
        """Whether a schedule isn't much longer than the step: `LONGEST` times, or less where ops are many."""
        sizes = [stop - start for start, stop in pairwise(self.cuts)]
        length = sum(sizes[action.stage] for action in actions if action.kind != "B")
        ops = len(self.step.names)
        return length <= max(min(LONGEST * ops, MOST_OPS), 4 * ops)

    def plan(self, actions: Iterable[Action]) -> Plan:
        """Return the plan of a schedule of all stages, without what nobody reads. O(length)."""
        runs: list[NDArray[np.int64]] = []
        length, split, reached = 0, -1, 0
        for action in actions:
            stage = action.stage
            first, later, after = self._runs[stage]
            if action.kind == "B":
                run = after
                if split < 0:
                    split = length
            elif stage < reached:
                run = later
            else:
                run, reached = first, stage + 1
            length += len(run)
            runs.append(run)
        return self.flat.prune(np.concatenate(runs), split)

    def _backward_levels(self) -> list[int]:
        """Return for each backward op the highest forward position that it or a later one reads, else -1."""
        levels, highest = [], -1
        for op in reversed(self.backward):
            for value in self.step.inputs[op]:
                at = self._at.get(self.step.producer[value], -1)
                if at > highest and not self.step.permanent(value):
                    highest = at
            levels.append(highest)
        levels.reverse()
        return levels

    def _reach_of(self, value: int) -> int:
        """Return the last forward position that can ask for a value, the end if an op outside does."""
        reach = -1
        for user in self.step.users[value]:
            if user in self._at:
                reach = max(reach, self._at[user])
            elif user in self._back_at:
                reach = max(reach, self._levels[self._back_at[user]])
            else:
                return len(self.forward)
        return reach

    def _for_all_stages(self, reach: Mapping[int, int]) -> frozenset[int]:
        """Return the values that ops all over the forward read, of ops that make nothing else."""
        step, shared = self.step, set()
        for op in self.forward:
            for value in step.outputs[op] if len(step.outputs[op]) == 1 else ():
                readers = [self._at[user] for user in step.users[value] if user in self._at]
                span = max(readers, default=0) - self._at[op]
                if value in reach and len(readers) >= SHARED_USERS and span * SHARED_SPAN > len(self.forward):
                    shared.add(value)
        return frozenset(shared)

    def _stays(self, value: int) -> bool:
        """Whether no chain decides over a forward value once it is made."""
        return value in self._shared or self.step.permanent(value)

    def _choose(self, limit: int) -> list[int]:
        """Return the ends of the stages: few values cross, few bytes, and those saved for the backward anyway."""
        count, size = len(self.forward), self.step.size_bytes
        number, total = [0] * (count + 2), [0] * (count + 2)
        for value, reach in self._reach.items():
            at = self._at[self.step.producer[value]]
            if reach > at:
                spare = not any(user >= self.step.forwards for user in self.step.users[value])
                for change, amount in ((number, 1), (total, size[value] << spare)):
                    change[at + 1] += amount
                    change[reach + 1] -= amount
        for at in range(1, count + 1):
            number[at] += number[at - 1]
            total[at] += total[at - 1]
        by_width = [[at for at in range(1, count) if number[at] <= width] for width in range(1, WIDEST + 1)]
        widest = [max(b - a for a, b in pairwise([0, *cuts, count])) for cuts in by_width]
        narrow = next(cuts for cuts, ops in zip(by_width, widest, strict=True) if ops <= COARSER * widest[-1])
        parts = min(limit - 1, len(narrow))
        edges = [len(narrow) * part // parts for part in range(parts + 1)] if parts > 0 else []
        chosen = [min(narrow[low:high], key=lambda at: (total[at], at)) for low, high in pairwise(edges)]
        return [0, *chosen, count]

    def _crossing(self) -> list[frozenset[int]]:
        found: list[list[int]] = [[] for _ in self.cuts]
        for value, reach in self._reach.items():
            first = bisect_right(self.cuts, self._at[self.step.producer[value]])
            for cut in range(first, bisect_right(self.cuts, reach)):
                found[cut].append(value)
        return [frozenset(values) for values in found]

    def _measure(self) -> Chain:
        step = self.step
        running, between = self._gradients()
        self.lasting_bytes = between[-1]
        before = sum(step.size_bytes[v] for op in self.forward for v in step.outputs[op] if self._stays(v))
        forward_s, backward_s, saved, transit_peak, saving_peak, backward_peak = [], [], [], [], [], []
        for stage, (start, stop) in enumerate(pairwise(self.cuts)):
            ops = self.forward[start:stop]
            after = self.backward[self.bounds[stage + 1] : self.bounds[stage]]
            made = {v for op in ops for v in step.outputs[op] if not self._stays(v)}
            keep = made.intersection(self.crossing[stage + 1].union(*(step.inputs[op] for op in after)))
            forward_s.append(step.duration_s(ops))
            backward_s.append(step.duration_s(after))
            saved.append(sum(step.size_bytes[v] for v in keep))
            transit_peak.append(self._peak(ops, made & self.crossing[stage + 1]))
            saving_peak.append(self._peak(ops, keep))
            low = between[self.bounds[stage + 1]]
            backward_peak.append(max(running[self.bounds[stage + 1] : self.bounds[stage]], default=low))
        return Chain(
            tuple(forward_s),
            tuple(backward_s),
            tuple(sum(step.size_bytes[v] for v in values) for values in self.crossing),
            tuple(saved),
            (*(between[bound] for bound in self.bounds[:-1]), before if len(self._at) == step.forwards else between[0]),
            tuple(transit_peak),
            tuple(saving_peak),
            tuple(backward_peak),
        )

    def _peak(self, ops: Sequence[int], survivors: set[int]) -> int:
        """Return the peak of what a run of ops makes on the way to the survivors."""
        step, size = self.step, self.step.size_bytes
        wanted, run = set(survivors), []
        for op in reversed(ops):
            if not wanted.isdisjoint(step.outputs[op]):
                wanted.update(step.inputs[op])
                run.append(op)
        run.reverse()
        last = {v: at for at, op in enumerate(run) for v in (*step.outputs[op], *step.inputs[op])}
        made: set[int] = set()
        live = peak = 0
        for at, op in enumerate(run):
            fresh = [v for v in step.outputs[op] if not self._stays(v)]
            made.update(fresh)
            live += sum(size[v] for v in fresh)
            peak = max(peak, live + step.transient_bytes[op])
            for value in {*step.inputs[op], *fresh}:
                if value in made and last[value] == at and value not in survivors:
                    live -= size[value]
        return peak

    def _gradients(self) -> tuple[list[int], list[int]]:
        """Return memory of all that no plan decides, while each backward op runs and before each (and after all)."""
        step, count = self.step, len(self.backward)
        delta, ends = [0] * (count + 1), [0] * (count + 2)
        lows = [-level for level in self._levels]
        made = {v for op in self.forward for v in step.outputs[op]}
        read = {v for op in self.backward for v in (*step.inputs[op], *step.outputs[op])}
        for value in sorted(made | read):
            producer, users = step.producer[value], step.users[value]
            last = max((self._back_at[u] for u in users if u in self._back_at), default=-1)
            birth = self._back_at.get(producer, 0)
            if producer in self._at:
                if not self._stays(value):
                    continue
                # Ops run again may read it as long as their level isn't done with.
                last = max(last, bisect_right(lows, -self._at[producer]) - 1)
            elif 0 <= producer < step.forwards:
                continue
            lasting = value in step.held_gradients or value in step.held_outputs
            lasting = lasting or (producer in self._back_at and any(u not in self._back_at for u in users))
            delta[birth] += step.size_bytes[value]
            if not lasting:
                ends[max(last, birth) + 1] += step.size_bytes[value]
        live, running, between = 0, [], []
        for at, op in enumerate(self.backward):
            live -= ends[at]
            between.append(live)
            live += delta[at]
            running.append(live + step.transient_bytes[op])
        between.append(live - ends[count])
        if count:
            between[0] = delta[0] - sum(step.size_bytes[v] for v in step.outputs[self.backward[0]])
        return running, between


def thin(count: int, most: int) -> list[int]:
    """Return at most ``most`` indices below ``count``, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({at * (count - 1) // (most - 1) for at in range(most)})
