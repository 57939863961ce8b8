r"""Chain DP over segments: nested recomputation at any depth.

Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, "Optimal checkpointing for heterogeneous chains"
(2019; rotor). Generalized: a stage is a segment of any graph with several options instead of two,
what two nested checkpoints share is counted once, and the fixed memory of the backward (gradients so
far) bounds each stage. Within its model (prefix cuts, memory rounded to slots) it is optimal; outside
of it the judge decides, so slots are rounded to nearest rather than up.

With M the memory for all but what outer levels hold, x_s the crossing set of segment s:

    C(s, t, M) = min of
        min over options o:   time_o + C(s+1, t, M - kept_o)                      if both peaks fit
        min over s < k <= t:  transit(s..k) + C(k, t, M - |x_s \ x_k|) + C(s, k-1, M)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rematerialize.solve.native import FlatStep, chain_fill
from rematerialize.solve.reaches import Reaches
from rematerialize.solve.segments import Segmentation
from rematerialize.solve.step import Plan, Step

SLOTS = 180
SEGMENTS = 64
PLANS = 30  # plans realized per table
LARGE = 800  # ops beyond which fewer are
MAX_STRETCH = 30  # longer plans than this many times the step's ops are not worth having


def chain(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield plans spread over the memory slots, then again on finer slots near the least memory.

    O(segments^3 x slots) for the tables, O(length) per plan.
    """
    if step.forwards == 0 or step.forwards == len(step.names):
        return
    reaches = Reaches(step)
    flat, parts = reaches.flat, Segmentation(reaches, SEGMENTS)
    full = lowest = step.peak_bytes(step.store_all())
    reach = full
    for _ in range(3):
        tables = ChainTables(flat, parts, reach)
        for plan in tables.spread(PLANS if len(step.names) < LARGE else PLANS // 3):
            lowest = min(lowest, flat.peak_bytes(plan))
            yield plan
        if lowest * 5 // 4 > reach * 2 // 3:
            break
        reach = lowest * 5 // 4


class ChainTables:
    """The filled tables: ``cost[s, t, m]`` in seconds, ``choice[s, t, m]`` (option, or k + options)."""

    def __init__(self, flat: FlatStep, parts: Segmentation, reach: int, *, slots: int = SLOTS) -> None:
        self.step = flat.step
        self.flat = flat
        self.parts = parts
        self.segments = self.parts.segments
        self.count = len(self.segments)
        self.slots = slots
        self.slot_bytes = max(reach / slots, 1.0)
        shape = (self.count + 1, self.count, slots + 1)
        self.cost = np.full(shape, np.inf)
        self.choice = np.full((self.count, self.count, slots + 1), -1, dtype=np.int32)
        self.shift = self._distances()
        self.options = max(len(s.options) for s in self.segments)
        if not chain_fill(self.slot_bytes, self.options, self._tables()):
            self._fill()

    def _tables(self) -> dict[str, np.ndarray]:
        """Return what the compiled recurrence reads and writes."""
        options = [option for segment in self.segments for option in segment.options]
        peaks = np.array([s.moving_peak_bytes for s in self.segments], dtype=np.float64)
        rise = np.zeros((self.count, self.count))
        for low, segment in enumerate(self.segments):  # peak of the transit from low up to k, x_low held all along
            rise[low, low] = segment.transit_peak_bytes
            rise[low, low + 1 :] = peaks[low + 1 :] + self.shift[low, low + 1 :] * self.slot_bytes
            rise[low, low:] = np.maximum.accumulate(rise[low, low:])
        return {
            "first_option": np.cumsum([0, *(len(s.options) for s in self.segments)], dtype=np.int64),
            "kept": np.array([self._round(o.kept_bytes) for o in options], dtype=np.int64),
            "forward_peak": np.array([o.forward_peak_bytes for o in options], dtype=np.float64),
            "backward_peak": np.array([o.backward_peak_bytes for o in options], dtype=np.float64),
            "time_s": np.array([o.time_s for o in options], dtype=np.float64),
            "base": np.array(self.parts.base_bytes, dtype=np.float64),
            "shift": np.ascontiguousarray(self.shift),
            "transit_s": np.concatenate(([0.0], np.cumsum([s.transit_s for s in self.segments]))),
            "rise": rise,
            "cost": self.cost,
            "choice": self.choice,
        }

    def spread(self, count: int) -> Iterator[Plan]:
        """Yield about ``count`` different plans, most memory first, the least memory always among them."""
        whole = self.cost[0, self.count - 1]
        feasible = np.flatnonzero(np.isfinite(whole))
        last = -1.0
        for at in range(len(feasible) - 1, -1, -1):
            chosen = at % max(len(feasible) // count, 1) == 0
            if chosen and float(whole[feasible[at]]) != last:
                last = float(whole[feasible[at]])
                plan = self.plan(int(feasible[at]))
                if len(plan.order) <= MAX_STRETCH * len(self.step.names):
                    yield plan

    def _round(self, size: float) -> int:
        return int(size / self.slot_bytes + 0.5)

    def _distances(self) -> np.ndarray:
        """Return ``[s, k]``: slots that holding x_s costs while working above cut k."""
        crossing = sorted({v for segment in self.segments for v in segment.below})
        member = np.array([[v in s.below for v in crossing] for s in self.segments], dtype=np.float64)
        size = np.array([self.step.size_bytes[v] for v in crossing], dtype=np.float64)
        shared = (member * size) @ member.T
        held = np.rint((np.diagonal(shared)[:, None] - shared) / self.slot_bytes)
        return np.asarray(held, dtype=np.int64)

    def _fill(self) -> None:
        memory = np.arange(self.slots + 1)
        transit_s = np.concatenate(([0.0], np.cumsum([s.transit_s for s in self.segments])))
        peaks = [s.moving_peak_bytes for s in self.segments]
        for low in range(self.count - 1, -1, -1):
            segment = self.segments[low]
            kept = np.array([self._round(o.kept_bytes) for o in segment.options])[:, None]
            # Peak of the transit from low up to k, x_low held all along.
            rise = np.maximum.accumulate(
                [segment.transit_peak_bytes]
                + [peaks[k] + self.shift[low, k] * self.slot_bytes for k in range(low + 1, self.count)]
            )
            for high in range(low, self.count):
                base = self.parts.base_bytes[high]
                need = np.array(
                    [self._round(max(o.forward_peak_bytes + base, o.backward_peak_bytes)) for o in segment.options]
                )[:, None]
                time_s = np.array([o.time_s for o in segment.options])[:, None]
                above = self.cost[low + 1, high] if high > low else np.zeros(self.slots + 1)
                at = memory[None, :] - kept
                table = np.where((at >= 0) & (memory >= need), above[np.maximum(at, 0)], np.inf) + time_s
                best = table.argmin(axis=0)
                cost = table[best, memory]
                if high > low:
                    ks = np.arange(low + 1, high + 1)
                    at = memory[None, :] - self.shift[low, ks][:, None]
                    upper = np.take_along_axis(self.cost[ks, high], np.maximum(at, 0), axis=1)
                    floor = np.rint((rise[: high - low] + base) / self.slot_bytes)[:, None]
                    upper = np.where((at >= 0) & (memory >= floor), upper, np.inf)
                    split = upper + self.cost[low, ks - 1] + (transit_s[ks] - transit_s[low])[:, None]
                    k = split.argmin(axis=0)
                    value = split[k, memory]
                    best = np.where(value < cost, self.options + ks[k], best)
                    cost = np.minimum(cost, value)
                self.cost[low, high] = cost
                self.choice[low, high] = np.where(np.isinf(cost), -1, best)

    def plan(self, slot: int) -> Plan:
        """Return the plan of the whole chain at a memory slot. O(its length)."""
        order: list[int] = []
        split = -1
        reached = 0  # segments below have run once
        stack: list[tuple[str, int, int, int]] = [("solve", 0, self.count - 1, slot)]
        while stack:
            kind, low, high, memory = stack.pop()
            segment = self.segments[low]
            if kind == "solve":
                choice = int(self.choice[low, high, memory])
                assert choice >= 0, "the table has no plan here"
                if choice < self.options:
                    stack.append(("backward", low, choice, 0))
                    if high > low:
                        kept = self._round(segment.options[choice].kept_bytes)
                        stack.append(("solve", low + 1, high, memory - kept))
                    stack.append(("forward", low, choice, 0))
                else:
                    k = choice - self.options
                    stack.append(("solve", low, k - 1, memory))
                    stack.append(("solve", k, high, memory - int(self.shift[low, k])))
                    stack.extend(("transit", at, 0, 0) for at in range(k - 1, low - 1, -1))
            elif kind == "backward":
                if split < 0:
                    split = len(order)
                order.extend(segment.options[high].backward)
            elif low >= reached:
                reached = low + 1
                order.extend(range(segment.start, segment.stop))
            elif kind == "forward":
                order.extend(op for op in segment.options[high].forward if self.step.recomputable[op])
            else:
                order.extend(segment.transit)
        return self.flat.prune(order, split)
