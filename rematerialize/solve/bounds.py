"""Lower bounds on the peak and on the makespan of every valid schedule, fast enough for any step.

Valid means what the format says: any number of recomputations anywhere, backward ops in any order that
their dependencies allow. Both bounds rest on `rematerialize.solve.necessity`; the second is the dual of a
linear program, see `rematerialize.solve.relaxation`.
"""

from __future__ import annotations

from math import inf

from rematerialize.solve.necessity import Necessity
from rematerialize.solve.relaxation import SAFETY, Relaxation
from rematerialize.solve.step import Step

MOMENTS = 4096  # most ops at which necessities are measured,
MEASURED = 40_000_000  # and most of them times ops
EXPANSIONS = 400_000  # values that all windows together follow upstream


def minimum_bytes_bound(step: Step) -> int:
    """Return a number of bytes that no valid schedule's peak is below.

    Notes
    -----
    The largest of these, each a lower bound on the memory while some op runs in any schedule:

    1. Each op's first run: what is live for certain then, its other inputs and outputs, its transient.
    2. The first op after the split: all that is live across it for certain.
    3. The last op: all held outputs and gradients. The last backward op is one that no backward op
       reads from: all that the backward and the split hold, and the least that such an op adds.
    4. A backward op b reads a recomputable x, and a <= b is a backward op before it, or the split. Either
       x is live while a runs, or x is computed between them: then its producer's inputs, outputs and
       transient are live together with all that is live for certain from a to b, and its inputs were in
       turn live while a ran or computed between them. By induction
       L(x) = min(memory at a with x, max(memory of its producer's run, max over its inputs y of L(y)))
       is a bound. What is not followed upstream counts nothing.

    On steps of many ops (see `MOMENTS`, `MEASURED`), 1 and 4 are taken at the ops with the largest operands only.
    O((values + edges) x moments / machine word).
    """
    return _minimum(step, Necessity(step))


def _minimum(step: Step, need: Necessity) -> int:
    if not step.names:
        return 0
    moments = _largest(step, need)
    nodes = [need.node(op) for op in moments]
    windows = {op: _latest_before(need, op) for op in moments if op >= need.split and need.reads(op)}
    pairs = [(start, need.node(op)) for op, start in windows.items()]
    starts = [(start, start) for start in windows.values()]
    totals: list[int] = need.measure(
        [*((node, node) for node in nodes), (need.split, need.split), *starts, *pairs]
    ).total.tolist()
    memory = [total + need.own(op) for op, total in zip(moments, totals, strict=False)]
    best = max([*memory, _end(step, need)])
    if step.forwards < len(step.names):
        best = max(best, totals[len(moments)])
    offset = len(moments) + 1
    upstream = _upstream(need)
    for at, (op, start) in enumerate(windows.items()):
        within = totals[offset + len(starts) + at]
        if within + max(upstream[value] for value in need.reads(op)) <= best:
            continue  # computing it all again is no worse than what is known
        at_start = totals[offset + at] + (need.own(_op(need, start)) if start != need.split else 0)
        best = _window(need, op, start, at_start, within, best, upstream, EXPANSIONS // len(windows))
    return best * need.unit


def makespan_bound(step: Step, budget_bytes: int, *, effort: float = 1.0, fits: bool = False) -> float:
    """Return a time in seconds that no valid schedule within the budget is below; inf if none fits.

    Notes
    -----
    The best of what `Relaxation` offers; the proof is in its docstring and in `rematerialize.solve.closure`.
    inf is returned only where `minimum_bytes_bound`, or what must be live at a moment of the relaxation,
    exceeds the budget. The result is lowered by a relative 1e-9, far more than its sums are rounded.
    ``effort`` scales the size of the linear program and the iterations spent on it; ``fits`` says that some
    schedule is known to fit, so that the least memory need not be looked for. Below 1 ms per op on steps of a
    thousand ops and more.
    """
    need = Necessity(step)
    if not step.names:
        return 0.0
    if not fits and _minimum(step, need) > budget_bytes:
        return inf
    return max(sum(step.time_s) * (1 - SAFETY), Relaxation(need, budget_bytes, effort).bound_s())


def _op(need: Necessity, node: int) -> int:
    return node - (node > need.split)


def _largest(step: Step, need: Necessity) -> list[int]:
    """Return the ops whose operands are the largest, at most MOMENTS, in the graph's order."""
    ops = range(len(step.names))
    return sorted(sorted(ops, key=need.operands, reverse=True)[: min(MOMENTS, MEASURED // len(ops) + 1)])


def _latest_before(need: Necessity, op: int) -> int:
    return max(need.before[need.node(op)], default=need.split)


def _end(step: Step, need: Necessity) -> int:
    """Return what the last op, and the last backward op, finds live (claim 3)."""
    backward = range(step.forwards, len(step.names))
    ends = sum(need.sizes[value] for value in need.ends if backward or step.producer[value] >= 0)
    late = sum(need.sizes[value] for value in step.held_gradients - need.ends)
    sinks = [op for op in backward if not any(step.users[value] for value in step.outputs[op])]
    added = (
        need.own(op) + sum(need.sizes[v] for v in step.inputs[op] if need.single[v] and v not in need.ends)
        for op in sinks
    )
    return ends + max(late, min(added, default=0))


def _upstream(need: Necessity) -> list[int]:
    """Return for each value the largest run, of its producer or of what that reads, if all is computed again."""
    step, most = need.step, [0] * len(need.sizes)
    for op in range(step.forwards):
        if step.recomputable[op]:
            run = max([need.own(op, again=True), *(most[value] for value in need.reads(op, again=True))])
            for value in step.outputs[op]:
                most[value] = run
    return most


def _window(
    need: Necessity, op: int, start: int, at_start: int, within: int, best: int, upstream: list[int], limit: int
) -> int:
    """Return the better of a bound and claim 4 for one backward op."""
    step = need.step
    there = frozenset(need.reads(_op(need, start))) if start != need.split else frozenset[int]()

    def kept(value: int) -> int:
        return at_start + (0 if value in there else need.sizes[value])

    def raises(value: int) -> bool:
        return min(kept(value), within + upstream[value]) > best

    stack = [value for value in need.reads(op) if raises(value)]
    seen, follow = set(stack), list[int]()
    while stack and len(follow) < limit:
        follow.append(stack.pop())
        fresh = [v for v in need.reads(step.producer[follow[-1]], again=True) if v not in seen and raises(v)]
        seen.update(fresh)
        stack += fresh
    least: dict[int, int] = {}
    for value in sorted(follow, key=lambda v: step.producer[v]):
        maker = step.producer[value]
        again = max([within + need.own(maker, again=True), *(least.get(v, 0) for v in need.reads(maker, again=True))])
        least[value] = min(kept(value), again)
    return max([best, *(least.get(value, 0) for value in need.reads(op))])
