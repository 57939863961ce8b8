"""The best plans that anything has ever found for the small graphs, and what CP-SAT has proved about them.

A plan is good for every budget from its peak up, and a lower bound for every budget from its own down, so
both outlive the budgets that they were made for. Plans are kept in full: a test replays each of them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.solver.records import RESULTS
from rematerialize.ir import TrainingGraph
from rematerialize.simulate import simulate

FORMAT = "rematerialize.solver-known/1"
FILE = RESULTS / "known.json.gz"


@dataclass(frozen=True, slots=True)
class KnownPlan:
    """A replayed plan; ``order`` counts the graph's ops, ``split`` of them run in the forward."""

    peak_bytes: int
    time_s: float
    by: str
    split: int
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """No schedule of CP-SAT's formulation within the budget is faster; inf (null in the file): none fits."""

    budget_bytes: int
    bound_s: float


class Known:
    """What is known of one graph.

    Parameters
    ----------
    graph : TrainingGraph
    data : dict, optional
        What `to_dict` gave; of another graph it counts for nothing.
    """

    def __init__(self, graph: TrainingGraph, data: dict[str, Any] | None = None) -> None:
        self.graph = graph
        self.digest = hashlib.sha256(json.dumps(graph.to_dict()).encode()).hexdigest()[:16]
        self._index = {op.name: at for at, op in enumerate(graph.ops)}
        self.plans: list[KnownPlan] = []
        self.bounds: list[Bound] = []
        if data and data["digest"] == self.digest:
            self.plans = [KnownPlan(**{**plan, "order": tuple(plan["order"])}) for plan in data["plans"]]
            self.bounds = [
                Bound(b["budget_bytes"], float("inf") if b["bound_s"] is None else b["bound_s"]) for b in data["bounds"]
            ]

    def to_dict(self) -> dict[str, Any]:
        bounds = [asdict(b) | {"bound_s": None if b.bound_s == float("inf") else b.bound_s} for b in self.bounds]
        return {"digest": self.digest, "plans": [asdict(plan) for plan in self.plans], "bounds": bounds}

    def best(self, budget_bytes: int) -> KnownPlan | None:
        """Return the fastest plan within a budget."""
        fitting = (plan for plan in self.plans if plan.peak_bytes <= budget_bytes)
        return min(fitting, key=lambda plan: plan.time_s, default=None)

    def bound_s(self, budget_bytes: int) -> float:
        """Return the highest proved bound that holds for a budget; 0 if none does."""
        return max((b.bound_s for b in self.bounds if b.budget_bytes >= budget_bytes), default=0.0)

    def add(self, forward: Sequence[str], backward: Sequence[str], by: str) -> None:
        """Replay a schedule and keep it if nothing kept is at least as good; on a tie the older stays."""
        result = simulate(self.graph, forward, backward)
        order = tuple(self._index[name] for name in (*forward, *backward))
        plan = KnownPlan(result.peak_bytes, result.time_s, by, len(forward), order)
        if any(old.peak_bytes <= plan.peak_bytes and old.time_s <= plan.time_s for old in self.plans):
            return
        keep = (old for old in self.plans if old.peak_bytes < plan.peak_bytes or old.time_s < plan.time_s)
        self.plans = sorted((*keep, plan), key=lambda old: old.peak_bytes)

    def prove(self, budget_bytes: int, bound_s: float) -> None:
        """Keep a bound if nothing kept says at least as much."""
        if bound_s > self.bound_s(budget_bytes):
            keep = (b for b in self.bounds if b.budget_bytes > budget_bytes or b.bound_s > bound_s)
            self.bounds = sorted((*keep, Bound(budget_bytes, bound_s)), key=lambda b: b.budget_bytes)

    def names(self, plan: KnownPlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the op names of a plan's forward and backward."""
        names = [self.graph.ops[at].name for at in plan.order]
        return tuple(names[: plan.split]), tuple(names[plan.split :])


def load(path: Path = FILE) -> dict[str, dict[str, Any]]:
    """Return what `Known` takes, by the graph's name; nothing when there is no file yet."""
    if not path.exists():
        return {}
    data = json.loads(gzip.decompress(path.read_bytes()))
    if data.pop("format", None) != FORMAT:
        raise ValueError(f"{path.name} isn't a {FORMAT} file")
    graphs: dict[str, dict[str, Any]] = data["graphs"]
    return graphs


def save(graphs: dict[str, dict[str, Any]], path: Path = FILE) -> None:
    """Write all graphs; equal content gives equal bytes."""
    text = json.dumps({"format": FORMAT, "graphs": dict(sorted(graphs.items()))}, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
