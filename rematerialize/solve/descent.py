"""Local search over whole schedules: greedy descent in memory, retention back up, oscillation.

Starting from a valid plan, the peak is lowered step by step with the `drop` that costs the least time
per byte-slot of excess that it removes; at every level the memory left over is spent again with the
`retain` that saves the most time per priced byte-slot. Going a little below a level and coming back
up (strategic oscillation, Glover 1989) leaves the local optima of either move. A heuristic without a
guarantee; all memory is exact, and no time is ever lost to it: only better plans are reported.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from rematerialize.solve.step import Plan, Step
from rematerialize.solve.workbench import Move, Workbench

PRICE_POWER = 16.0  # how much more a nearly full slot costs than an empty one
STRETCH = 0.25  # inputs smaller than this times the value are kept rather than recomputed
LARGE = 2500  # ops beyond which squeezing stops early
MAX_ROUNDS = 40  # of drops in one descent
MAX_STRETCH = 25  # give up beyond this many times the step's ops


def descent(step: Step, levels: Sequence[int]) -> Iterator[Plan]:
    """Yield one plan per level, from store-all downwards until stuck. O(levels x drops x ops)."""
    plan = step.store_all()
    longest = MAX_STRETCH * len(plan.order)
    for level in sorted(levels, reverse=True):
        bench = Workbench(step, plan)
        if not descend(bench, level, max_length=longest):
            break
        spend(bench, level)
        plan = bench.plan()
        yield plan


def oscillate(step: Step, plan: Plan, level: int, depths: Sequence[float]) -> Plan:
    """Go below a level by each fraction in turn and come back up; keep what got faster."""
    longest = MAX_STRETCH * len(step.names)
    best_s = step.duration_s(plan.order)
    for depth in depths:
        bench = Workbench(step, plan)
        if descend(bench, int(level * (1 - depth)), max_length=longest):
            spend(bench, level)
            if bench.time_s < best_s * (1 - 1e-9):
                plan, best_s = bench.plan(), bench.time_s
    return plan


def squeeze(step: Step, plan: Plan) -> Iterator[Plan]:
    """Yield plans of ever lower peak, by descents of a shrinking stride, until stuck."""
    stride, least = 0.08, 0.002 if len(step.names) < LARGE else 0.02
    peak = step.peak_bytes(plan)
    work = 50_000 + 20 * len(step.names)
    while stride > least and peak > 0 and work > 0:
        bench = Workbench(step, plan)
        target = int(peak * (1 - stride))
        longest = len(plan.order) + 2 * len(step.names)
        fits = descend(bench, target, max_length=longest, max_work=work)
        work -= bench.work + bench.length
        if fits:
            spend(bench, target)
            plan = bench.plan()
            peak = bench.peak_bytes()
            yield plan
        else:
            stride /= 2.5


def spend(bench: Workbench, budget: int) -> bool:
    """Retain what fits the budget, best ratio first, until nothing does. True if anything did."""
    changed = False
    while _spend_once(bench, budget):
        changed = True
    return changed


def _spend_once(bench: Workbench, budget: int) -> bool:
    full = np.maximum(bench.memory, 0) / max(budget, 1)
    prices = np.concatenate(([0.0], np.cumsum(full**PRICE_POWER + 1e-6 * (full > 0))))
    heap = [(-_ratio(bench.retention(slot), prices), slot) for runs in bench.runs for slot in runs[1:]]
    heapq.heapify(heap)
    applied = False
    while heap:
        stale, slot = heapq.heappop(heap)
        if bench.op_at[slot] < 0:
            continue
        move = bench.retention(slot)
        if not bench.fits(move, budget):
            continue
        ratio = -_ratio(move, prices)
        if heap and ratio > heap[0][0] and ratio > stale * 0.999:
            heapq.heappush(heap, (ratio, slot))
            continue
        bench.retain(slot, move)
        applied = True
    return applied


def _ratio(move: Move, prices: np.ndarray) -> float:
    cost = 0.0
    for start, stop, size in move.ranges:
        if stop - start > 1:
            cost += size * float(prices[stop] - prices[start])
    return move.gain_s / cost if cost > 0 else float("inf")


def descend(bench: Workbench, target: int, *, max_length: int, max_work: int = 1 << 40) -> bool:
    """Drop until the peak is at most the target. False when stuck."""
    stalled, left = 0, float("inf")
    for _ in range(MAX_ROUNDS):
        if bench.peak_bytes() <= target:
            return True
        bench.work += bench.length
        if bench.work > max_work or bench.length > max_length or stalled > 2:
            return False
        if not _descend_once(bench, target):
            return False
        excess = float(np.maximum(bench.memory - target, 0).sum())
        stalled = stalled + 1 if excess > 0.98 * left else 0
        left = excess
    return bench.peak_bytes() <= target


def _descend_once(bench: Workbench, target: int) -> bool:
    step = bench.step
    excess = np.maximum(bench.memory - target, 0)
    total = np.concatenate(([0], np.cumsum(excess)))
    nonzero = np.flatnonzero(excess)
    first, last = int(nonzero[0]), int(nonzero[-1])
    found: list[tuple[float, int, int, int]] = []
    for op, runs in enumerate(bench.runs):
        if not step.recomputable[op]:
            continue
        for slot in runs:
            if slot > last:
                break
            for value, readers in bench.readers[slot].items():
                size = step.size_bytes[value]
                if not readers or size == 0 or readers[-1] < first or value in step.held_outputs:
                    continue
                low = slot
                for reader in readers:
                    if reader >= bench.slots:
                        break
                    relief = int(total[reader] - total[low + 1])
                    if relief > 0:
                        found.append((step.time_s[op] / (size * float(relief)), value, slot, reader))
                    low = reader
    ranked = []
    for _, value, slot, reader in found:
        ops = bench.missing(value, reader, STRETCH)
        if ops is not None:
            low = _previous_use(bench, slot, value, reader)
            priced = float(total[reader] - total[low + 1]) * step.size_bytes[value]
            ranked.append((step.duration_s(ops) / priced, value, slot, reader))
    ranked.sort()
    done = 0
    for _, value, slot, reader in ranked:
        if value in bench.readers.get(slot, ()) and reader in bench.readers[slot][value]:
            done += _try_drop(bench, value, slot, reader, target)
            if done and (done >= 8 + len(ranked) // 16 or bench.peak_bytes() <= target):
                break
    if len(found) > len(ranked) and (not done or done < 4):
        bench.respace()
        return True if done else len(ranked) < len(found)
    return done > 0


def _previous_use(bench: Workbench, slot: int, value: int, reader: int) -> int:
    readers = bench.readers[slot][value]
    at = readers.index(reader)
    return readers[at - 1] if at else slot


def _try_drop(bench: Workbench, value: int, slot: int, reader: int, target: int) -> bool:
    """Drop if that lowers the excess over the target; undo it otherwise."""
    low = _previous_use(bench, slot, value, reader)
    window = bench.memory[low + 1 : reader]
    relief = int(np.minimum(np.maximum(window - target, 0), bench.step.size_bytes[value]).sum())
    if relief == 0:
        return False
    ops = bench.missing(value, reader, STRETCH)
    if ops is None:
        return False
    before = float(np.maximum(bench.memory - target, 0).sum())
    bench.drop(ops, reader)
    after = float(np.maximum(bench.memory - target, 0).sum())
    if after < before:
        return True
    made = bench.before(bench.step.producer[value], reader)
    bench.retain(made, bench.retention(made))
    return False
