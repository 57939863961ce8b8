"""Us and the peers on the zoo: correctness first, then measured peaks and interleaved times.

python -m benchmarks.compare                       # the first group at bench scale
python -m benchmarks.compare --models gpt unet --scale test --rounds 3
python -m benchmarks.compare --render              # markdown from every JSON in results/
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

import numpy
import torch

import rematerialize
from benchmarks.comparison import OURS, Cell, Comparison, ModelResult
from benchmarks.provenance import commit, device, today
from benchmarks.render import markdown
from rematerialize import peers
from rematerialize.harness import (
    PeakResult,
    Stepper,
    StepResult,
    buffer_state,
    compare_steps,
    measure_step_peak,
    run_step,
    time_interleaved,
)
from rematerialize.torch_private import forget_compiled
from rematerialize.zoo import MODELS, ModelSpec, Scale

RESULTS = Path(__file__).parent / "results"
OUR_BUDGETS = ("100%", "70%", "50%", "30%", "minimum")
SEED = 1
ROUNDING = 1e-5  # relative: another order of the same float32 sums
FEWEST_ROUNDS, MOST_ROUNDS = 3, 15


class OutOfTime(BaseException):
    """Time is up; not an Exception, so that no library's handler swallows it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block after so many seconds (main thread, POSIX)."""

    def alarm(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, alarm)
    # Again every second: raised inside a weak reference's callback, the first one would be lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True, slots=True)
class Options:
    scale: Scale
    rounds: int | None
    seconds: float
    limit_s: float


@dataclass(slots=True)
class Contest:
    """The contestants on one model, prepared one by one; those that can step are kept for timing."""

    spec: ModelSpec
    options: Options
    eager: Stepper
    reference: StepResult
    peak: PeakResult
    cells: dict[str, Cell]
    steppers: dict[str, Stepper]

    @classmethod
    def begin(cls, spec: ModelSpec, options: Options) -> Contest:
        eager = peers.eager(spec, options.scale)
        reference = run_step(eager, seed=SEED, buffers=buffer_state(eager.module))
        peak = measure_step_peak(eager, seed=SEED)
        cell = Cell("eager", "ok", peak_bytes=peak.peak_bytes, peak_ratio=1.0)
        return cls(spec, options, eager, reference, peak, {"eager": cell}, {"eager": eager})

    def enter(self, name: str, prepare: Callable[[], Stepper]) -> Cell:
        """Prepare, check and measure one contestant; whatever it raises becomes its cell."""
        start = time.perf_counter()
        try:
            with time_limit(self.options.limit_s):
                stepper = prepare()
                took = time.perf_counter() - start
                cell = self._checked(name, stepper, took)
                self.steppers[name] = stepper
        except OutOfTime:
            cell = Cell(name, "timeout", f"not ready after {self.options.limit_s:.0f} s")
        except rematerialize.BudgetError as error:
            cell = Cell(name, "infeasible", f"minimum {error.minimum_bytes:,} bytes")
        except peers.PeerError as error:
            cell = Cell(name, "error", without_paths(str(error)))
        except Exception as error:  # a contestant's failure is a result, not the end of the run
            cell = Cell(name, "error", without_paths(peers.one_line(error)))
        self.cells[name] = cell
        print(f"  {name}: {cell.status} {cell.detail}", file=sys.stderr, flush=True)
        return cell

    def _checked(self, name: str, stepper: Stepper, prepare_s: float) -> Cell:
        start = buffer_state(peers.eager(self.spec, self.options.scale).module)
        comparison = compare_steps(self.reference, run_step(stepper, seed=SEED, buffers=start))
        notes = [] if comparison.exact else [comparison.describe()]
        notes += [stepper.note] if stepper.note else []
        peak = measure_step_peak(stepper, seed=SEED).peak_bytes
        return Cell(
            name,
            "ok" if comparison.within(ROUNDING) else "incorrect",
            "; ".join(notes),
            peak_bytes=peak,
            peak_ratio=peak / self.peak.peak_bytes,
            prepare_s=prepare_s,
        )

    def time(self) -> int:
        """Fill in the times of all that can step; returns the rounds it took."""
        steps = {name: partial(s.step, SEED) for name, s in self.steppers.items()}
        start = time.perf_counter()
        for step in steps.values():
            step()
        fitting = int(self.options.seconds / (time.perf_counter() - start))
        rounds = self.options.rounds or min(MOST_ROUNDS, max(FEWEST_ROUNDS, fitting))
        timings = time_interleaved(steps, reference="eager", rounds=rounds, warmup=0)
        for name, timing in timings.items():
            self.cells[name] = replace(
                self.cells[name],
                time_ratio=timing.ratio,
                time_ratio_iqr=timing.ratio_iqr,
                step_s=timing.samples_s,
            )
        return rounds


def compare_model(spec: ModelSpec, options: Options) -> ModelResult:
    """Run every contestant on one model."""
    forget_compiled()
    contest = Contest.begin(spec, options)
    captured: list[peers.Ours] = []
    _enter_ours(contest, captured, [(budget, budget) for budget in OUR_BUDGETS])
    rivals = [contest.enter("per block", partial(peers.per_block, spec, options.scale))]
    for budget in peers.TORCH_BUDGETS:
        name = f"torch {budget:g}"
        if rivals[-1].status == "timeout":  # the same graph again: it would only take as long
            contest.cells[name] = Cell(name, "timeout", "not tried: the budget before took too long")
            continue
        rivals.append(contest.enter(name, partial(peers.torch_budget, spec, options.scale, budget)))
    answers = [(f"@ {rival.contestant}", rival.peak_bytes) for rival in rivals if rival.peak_bytes]
    _enter_ours(contest, captured, answers)
    rounds = contest.time()
    return ModelResult(
        model=spec.name,
        eager_peak_bytes=contest.peak.peak_bytes,
        eager_s=sorted(contest.cells["eager"].step_s)[rounds // 2],
        gradient_bytes=sum(p.numel() * p.element_size() for p in contest.eager.module.parameters()),
        rounds=rounds,
        cells=tuple(contest.cells.values()),
    )


def _enter_ours(contest: Contest, captured: list[peers.Ours], budgets: Iterable[tuple[str, int | str]]) -> None:
    """Enter our plans; the model is captured once, by the first of them."""

    def prepare(budget: int | str) -> Stepper:
        if not captured:
            captured.append(peers.Ours(contest.spec, contest.options.scale))
        return captured[0].stepper(budget)

    for name, budget in budgets:
        contest.enter(OURS + name, partial(prepare, budget))


def without_paths(text: str) -> str:
    """Keep file names, drop this machine's folders."""
    return re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-])", "", text)


def _describe(arguments: list[str], scale: Scale) -> Comparison:
    return Comparison(
        command=shlex.join(["python", "-m", "benchmarks.compare", *arguments]),
        commit=commit(),
        date=today(),
        device=device(),
        threads=torch.get_num_threads(),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "rematerialize": rematerialize.__version__,
        },
        seed=SEED,
        scale=scale,
        results=(),
    )


def render(*, check: bool) -> int:
    """Write (or only compare) the markdown of every JSON; returns the number of stale pages."""
    stale = 0
    for path in sorted(RESULTS.glob("bench*.json")):  # the folder holds records of other kinds, too
        page, text = path.with_suffix(".md"), markdown(Comparison.load(path))
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"{page.name}: {'stale' if check else 'written'}", file=sys.stderr)
            if not check:
                page.write_text(text, encoding="utf-8")
    return stale


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    first = [spec.name for spec in MODELS.values() if spec.group == "first"]
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=first, metavar="NAME")
    parser.add_argument("--scale", choices=("test", "bench"), default="bench")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: as many as --seconds allow)")
    parser.add_argument("--seconds", type=float, default=30, help="to spend on timing, per model")
    parser.add_argument("--limit", type=float, default=90, help="seconds to get one contestant ready")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="JSON file (default: results/SCALE.json)")
    parser.add_argument("--render", action="store_true", help="only write markdown from the JSON files")
    parser.add_argument("--check", action="store_true", help="only say whether the markdown is stale")
    return parser


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    asked = _parser().parse_args(arguments)
    if asked.render or asked.check:
        stale = render(check=asked.check)
        return 1 if asked.check and stale else 0
    torch.set_num_threads(asked.threads)
    options = Options(asked.scale, asked.rounds, asked.seconds, asked.limit)
    output = asked.output or RESULTS / f"{asked.scale}.json"
    comparison = _describe(arguments, asked.scale)
    for name in asked.models:
        print(name, file=sys.stderr, flush=True)
        comparison = replace(comparison, results=(*comparison.results, compare_model(MODELS[name], options)))
        comparison.save(output)  # after every model, so that a long run can be stopped
    print(markdown(comparison))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
