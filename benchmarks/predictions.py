"""What the command line predicts beside what it measures, for every built-in model: peaks, step times, and the wait.

    python -m benchmarks.predictions [--runs N] [--threads N] [--resume] [MODEL ... [-o FILE]]
    python -m benchmarks.predictions --render [--check]

Every run is a process of its own with an empty cost cache, as a user's first one: ``frontier --measure`` for the
predictions, ``plan`` and the same through the library for the wait. Models by name are a quick look: the record is
only written with ``-o``. The record is of one thread, where the machine allows no better: a hypervisor that puts two
processors on one core for some seconds makes steps of two threads half as slow again, whatever is predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.process import in_fresh_process
from benchmarks.provenance import provenance
from benchmarks.records import Record, resumed
from rematerialize.report.table import markdown_table
from rematerialize.units import format_percent, format_seconds
from rematerialize.zoo import MODELS

FILE = Path(__file__).parent / "results" / "predictions.json"
POINTS = 3
PLANS = ("store all", "half-way", "minimum")
BUDGET = "80%"  # of the plan that is waited for; every model has one
PROMISED_TIME, PROMISED_PEAK = 0.15, 0.01
LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One plan of one model: a figure per run, predicted and measured."""

    peak_bytes: tuple[int, ...]
    measured_peak_bytes: tuple[int, ...]
    step_s: tuple[float, ...]
    measured_step_s: tuple[float, ...]

    def peaks_off(self) -> list[float]:
        """By how much each run's peak is predicted too high; 0.01 is one percent."""
        return [a / b - 1 for a, b in zip(self.peak_bytes, self.measured_peak_bytes, strict=True)]

    def times_off(self) -> list[float]:
        """The same of its step's time."""
        return [a / b - 1 for a, b in zip(self.step_s, self.measured_step_s, strict=True)]

    @property
    def time_off(self) -> float:
        return statistics.median(self.times_off())


@dataclass(frozen=True, slots=True)
class ModelPredictions:
    """One built-in model, its plans by falling budget from store-all to the minimum.

    Attributes
    ----------
    command_s : tuple of float
        Seconds of ``plan`` from the start of its process to the end, per run.
    work_s : tuple of float
        Seconds of capture, costs and search together in a process of their own, per run.
    target_s : tuple of float
        Seconds there of what is the target's own, per run: importing torch, what it traces with and the model's
        library, and building the model.
    """

    FORMAT: ClassVar[str] = "rematerialize.predictions/2"
    model: str
    ops: int
    plans: tuple[PlannedStep, ...]
    command_s: tuple[float, ...]
    work_s: tuple[float, ...]
    target_s: tuple[float, ...]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelPredictions:
        def frozen(fields: dict[str, Any]) -> dict[str, Any]:
            return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

        return cls(**{**frozen(data), "plans": tuple(PlannedStep(**frozen(plan)) for plan in data["plans"])})

    @property
    def wait(self) -> float:
        """How many times as long as its work the command takes, once the target is there."""
        command_s, work_s, target_s = map(statistics.median, (self.command_s, self.work_s, self.target_s))
        return (command_s - target_s) / work_s

    @property
    def whole_wait(self) -> float:
        """The same from the start of Python."""
        return statistics.median(self.command_s) / statistics.median(self.work_s)


def measure(name: str, runs: int) -> ModelPredictions:
    """Run one model.

    Raises
    ------
    RuntimeError
        If a command fails, or takes more than ten minutes.
    """
    curves, commands, bare = [], [], []
    for _ in range(runs):
        curves.append(_command("frontier", f"zoo:{name}", "--points", str(POINTS), "--measure"))
        start_s = time.perf_counter()
        _command("plan", f"zoo:{name}", "--activation-budget", BUDGET)
        commands.append(time.perf_counter() - start_s)
        bare.append(_checked(in_fresh_process("benchmarks.predictions", "--child", name, limit_s=LIMIT_S)))
    points = zip(*(zip(curve["points"], curve["measured"], strict=True) for curve in curves), strict=True)
    plans = tuple(
        PlannedStep(
            peak_bytes=tuple(point["peak_bytes"] for point, _ in found),
            measured_peak_bytes=tuple(real["peak_bytes"] for _, real in found),
            step_s=tuple(real["predicted_step_s"] for _, real in found),
            measured_step_s=tuple(real["step_s"] for _, real in found),
        )
        for found in points
    )
    return ModelPredictions(
        model=name,
        ops=curves[0]["points"][0]["ops"],
        plans=plans,
        command_s=tuple(commands),
        work_s=tuple(seconds["work_s"] for seconds in bare),
        target_s=tuple(seconds["target_s"] for seconds in bare),
    )


def _command(name: str, target: str, *options: str) -> dict[str, Any]:
    """What a command prints with ``--json``, without anything measured before."""
    with tempfile.TemporaryDirectory() as cache:
        common = ("--json", "-q", "--cost-cache", cache)
        return _checked(in_fresh_process("rematerialize", name, target, *options, *common, limit_s=LIMIT_S))


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if (status := answer.get("status")) is not None:
        raise RuntimeError(f"a command ended with {status}")
    return answer


def bare_seconds(name: str) -> dict[str, float]:
    """Seconds of having the target in this process, and of capture, costs and search of what ``plan`` plans."""
    start_s = time.perf_counter()
    import torch._functorch.aot_autograd  # noqa: F401  (timed)

    target_s = time.perf_counter() - start_s
    from rematerialize import plan
    from rematerialize.targets.load import load

    start_s = time.perf_counter()
    target = load(f"zoo:{name}")
    target_s += time.perf_counter() - start_s
    made = plan(target.model, target.inputs, activation_budget=BUDGET)
    assert made.prepared is not None
    return {"target_s": target_s, "work_s": made.prepared.capture_s + made.prepared.cost_s + made.plan_s}


def page(record: Record[ModelPredictions]) -> str:
    """Return the record as markdown."""
    headers = ["model", "ops", "step", "peaks", *PLANS, "plan", "of its work"]
    parts = [
        "# Predictions beside measurements: built-in models",
        "Generated by `python -m benchmarks.predictions --render`; don't edit.",
        str(record.provenance),
        summary(record.rows),
        "*step* is the measured time of the step that stores everything, *peaks* the largest error of a predicted"
        " peak over all plans and runs. Then by how much the time of each plan's step is predicted too high: the"
        " median of all runs, and in brackets the least and the most. *plan* is what `rematerialize plan"
        f" --activation-budget {BUDGET}` takes from the start of Python, with nothing in its cost cache; *of its"
        " work*, over capture, costs and search alone, without importing torch, what it traces with and the model's"
        " library, and building the model.",
        markdown_table(headers, [_row(row) for row in record.rows]),
    ]
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[ModelPredictions]) -> str:
    """Return the sentences that sum the errors up."""
    steps = [plan for row in rows for plan in row.plans]
    peaks = [abs(off) for step in steps for off in step.peaks_off()]
    times = [abs(off) for step in steps for off in step.times_off()]
    medians = [abs(step.time_off) for step in steps]
    waits, whole = [row.wait for row in rows], [row.whole_wait for row in rows]
    return (
        f"{len(peaks)} steps of {len(steps)} plans of {len(rows)} models. Peaks: {_within(peaks, PROMISED_PEAK)},"
        f" at most {100 * max(peaks):.2f}% off. Step times: {_within(times, PROMISED_TIME)}, median"
        f" {100 * statistics.median(times):.1f}% off, at most {100 * max(times):.0f}%; by plan, median of its runs,"
        f" {_within(medians, PROMISED_TIME)}. A plan takes {statistics.median(waits):.2f} times as long as its work, at"
        f" most {max(waits):.2f}; with all imports {statistics.median(whole):.2f} times, at most {max(whole):.2f}."
    )


def _within(errors: Sequence[float], promised: float) -> str:
    return f"{sum(error <= promised for error in errors)} of {len(errors)} within {format_percent(promised)}"


def _row(row: ModelPredictions) -> list[str]:
    named = [row.plans[0], *([row.plans[1]] if len(row.plans) == POINTS else []), row.plans[-1]]
    times = [_spread(plan.times_off()) for plan in named]
    return [
        row.model,
        str(row.ops),
        format_seconds(statistics.median(row.plans[0].measured_step_s)),
        f"{100 * max(abs(off) for plan in row.plans for off in plan.peaks_off()):.2f}%",
        *(times if len(times) == POINTS else [times[0], "-", times[-1]]),
        format_seconds(statistics.median(row.command_s)),
        f"{row.wait:.2f}",
    ]


def _spread(errors: Sequence[float]) -> str:
    low, middle, high = (100 * value for value in (min(errors), statistics.median(errors), max(errors)))
    return f"{middle:+.0f}% ({low:+.0f} to {high:+.0f})"


def render(*, check: bool) -> bool:
    """Write, or only compare, the page of the record; returns whether it was fresh."""
    path, text = FILE.with_suffix(".md"), page(Record.load(FILE, ModelPredictions))
    fresh = path.exists() and path.read_text(encoding="utf-8") == text
    if not fresh and not check:
        path.write_text(text, encoding="utf-8")
    return fresh


def main() -> int:
    """Measure, print a line per model, write the record and its page."""
    args = _parse()
    if args.child:
        print(json.dumps(bare_seconds(args.child)))
        return 0
    if args.render:
        return 1 if not render(check=args.check) and args.check else 0
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    now = provenance("benchmarks.predictions", sys.argv[1:], ("rematerialize", "torch"))
    path = args.output or (None if args.models else FILE)
    rows = {row.model: row for row in (resumed(path, ModelPredictions, now) if path and args.resume else ())}
    for name in args.models or _all():
        if name not in rows:
            rows[name] = measure(name, args.runs)
            if path:
                Record(now, tuple(rows.values())).save(path)
        print(*_row(rows[name]), sep="  ", flush=True)
    print(summary(tuple(rows.values())))
    if path == FILE:
        render(check=False)
    return 0


def _all() -> Iterator[str]:
    """Built-in models that can run here."""
    return (name for name, spec in MODELS.items() if spec.group != "large")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--runs", type=int, default=3, help="processes per model and command")
    parser.add_argument("--threads", type=int, help="of torch in those processes; its default without")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the same code has written")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of models by name")
    parser.add_argument("--render", action="store_true", help="only write the page from the record")
    parser.add_argument("--check", action="store_true", help="with --render: only say whether it is fresh")
    parser.add_argument("--child", metavar="MODEL", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
