"""Batches of random recipes in several processes, tallied in the order of their seeds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.fuzz.check import Outcome, check, quick_costs
from benchmarks.fuzz.recipe import Recipe
from benchmarks.fuzz.strategies import recipes

CHUNK = 250  # examples per Hypothesis run: it draws small ones first
MEMORY_BYTES = 8 << 30  # of a process: what needs more is a failure with a recipe, and not the machine's end
TOLD = 50  # failures that are kept
AHEAD = 4  # batches given out per process: they are counted in order, and one may hold recipes of a minute each
AGAIN = 3  # more checks of one that failed: some depend on what the process did before, or on nothing known


@dataclass(slots=True)
class Tally:
    """What a run found. Coverage counts valid examples that have a piece at all, and the solver."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    invalid: Counter[str] = field(default_factory=Counter)
    pieces: Counter[str] = field(default_factory=Counter)
    solvers: Counter[str] = field(default_factory=Counter)
    recomputing: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")  # seconds, recipe
    next_seed: int = 0

    def add(self, recipe: Recipe, outcome: Outcome, seconds: float) -> None:
        self.outcomes[outcome.status] += 1
        self.slowest = max(self.slowest, (round(seconds, 1), repr(recipe)))
        if outcome.status == "invalid":
            self.invalid[outcome.detail[:80]] += 1
            return
        self.pieces.update({piece.name for piece in recipe.walk()})
        self.solvers[recipe.solver] += 1
        self.recomputing += outcome.recomputed > 0
        if outcome.status == "refused":
            self.reasons[outcome.detail] += 1
        if outcome.status == "failed" and len(self.failures) < TOLD:
            self.failures.append({"detail": outcome.detail, "recipe": repr(recipe)})

    def take(self, other: Tally) -> None:
        """Add what a later batch found."""
        for name in ("outcomes", "reasons", "invalid", "pieces", "solvers"):
            getattr(self, name).update(getattr(other, name))
        self.recomputing += other.recomputing
        self.failures = (self.failures + other.failures)[:TOLD]
        self.slowest = max(self.slowest, other.slowest)
        self.next_seed = other.next_seed

    @property
    def examples(self) -> int:
        """Examples that eager can do: the others show nothing."""
        return self.outcomes.total() - self.outcomes["invalid"]


def bounded(recipe: Recipe) -> Outcome:
    """`check`, where running out of the process's memory is a failure."""
    try:
        return check(recipe)
    except MemoryError:
        return Outcome("failed", f"more than {MEMORY_BYTES:,} bytes of memory")


def batch(first: int, deadline: float, notes: Path | None = None) -> Tally:
    """Check the recipes of one Hypothesis run, until ``deadline`` (`time.time`).

    ``notes`` is a folder for the recipe that each process is at, should it die of it.
    """
    tally = Tally(next_seed=first + 1)
    seen: set[Recipe] = set()

    @seed(first)
    @settings(
        max_examples=CHUNK,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(recipes())
    def run(recipe: Recipe) -> None:
        if recipe in seen or time.time() > deadline:
            return
        seen.add(recipe)
        if notes is not None:
            (notes / str(os.getpid())).write_text(repr(recipe), encoding="utf-8")
        start = time.perf_counter()
        outcome = bounded(recipe)
        tally.add(recipe, outcome, time.perf_counter() - start)
        if outcome.status == "failed":
            again = Counter(bounded(recipe).status for _ in range(AGAIN))
            print(f"FAILED {outcome.detail}; at once again: {dict(again)}\n  {recipe!r}", flush=True)

    run()
    return tally


def fuzz(examples: int, limit_s: float, jobs: int, every: Callable[[Tally], None], tally: Tally) -> None:
    """Check recipes into a tally until it has at least so many valid ones, or the time is over.

    Batches are counted in the order of their seeds, so that a record can go on where it stopped.

    Raises
    ------
    BrokenProcessPool
        When a process dies (eager's kernels can crash): it names the recipes that were being checked.
    """
    deadline = time.time() + limit_s
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(jobs, spawn, initializer=quiet_start, max_tasks_per_child=4) as pool,
    ):
        notes = Path(folder)
        ahead = deque(pool.submit(batch, tally.next_seed + k, deadline, notes) for k in range(AHEAD * jobs))
        while ahead and tally.examples < examples:
            try:
                tally.take(ahead.popleft().result())
            except BrokenProcessPool as error:
                error.add_note(f"checked when a process died, the last of each process: {_noted(notes)}")
                raise
            if time.time() < deadline:
                ahead.append(pool.submit(batch, tally.next_seed + AHEAD * jobs - 1, deadline, notes))
            every(tally)
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _noted(notes: Path) -> str:
    """The recipes in a folder, the latest first: one process dies, and takes the others with it."""
    files = sorted(notes.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
    return "; ".join(file.read_text(encoding="utf-8") for file in files)


def quiet_start() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    quick_costs()
