"""The main job: a GPT and a U-Net with dropout, trained under falling budgets, beside eager.

    python -m benchmarks.demo [--scale test|bench] [--steps N] [--rounds N] [--json PATH]

Data on stdout, progress on stderr. Exits with 1 when a gradient differs or a peak exceeds its budget.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

import rematerialize as remat
from rematerialize.harness import (
    Stepper,
    StepResult,
    compare_steps,
    measure_step_peak,
    run_step,
    time_interleaved,
)
from rematerialize.report.table import aligned_table
from rematerialize.units import format_bytes, format_percent, format_seconds
from rematerialize.zoo import MODELS, ModelSpec, Scale

MODEL_NAMES = ("gpt", "unet")
BUDGETS = ("100%", "70%", "50%", "30%", "minimum")
LEARNING_RATE = 0.01
REFUSED = "doesn't fit"
Number = TypeVar("Number", int, float)
HEADERS = (
    "budget",
    "predicted peak",
    "measured peak",
    "of eager's",
    "step time",
    "planning",
    "gradients",
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One model under one budget; byte figures are above what was resident when the step began.

    Figures are None where nothing fits: the refusal names the minimum, which is the table's last row.
    """

    model: str
    budget: str
    eager_bytes: int
    gradients: str
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    predicted_overhead: float | None = None
    measured_overhead: float | None = None
    planning_s: float | None = None

    @property
    def keeps_its_word(self) -> bool:
        if self.measured_bytes is None or self.budget_bytes is None:
            return self.gradients == REFUSED
        return self.gradients == "equal" and self.measured_bytes <= self.budget_bytes

    def row(self) -> tuple[str, ...]:
        share = None if self.measured_bytes is None else self.measured_bytes / self.eager_bytes
        return (
            self.budget,
            _shown(self.predicted_bytes, format_bytes),
            _shown(self.measured_bytes, format_bytes),
            _shown(share, format_percent),
            _shown(self.measured_overhead, lambda overhead: f"{1 + overhead:.2f}"),
            _shown(self.planning_s, format_seconds),
            self.gradients,
        )


def _shown(value: Number | None, show: Callable[[Number], str]) -> str:
    return "-" if value is None else show(value)


def main() -> int:
    args = _arguments()
    torch.set_num_threads(args.threads)
    start_s = time.perf_counter()
    console = Console(stderr=True)
    cells: list[Cell] = []
    for name in MODEL_NAMES:
        spec = MODELS[name]
        made = _run_model(spec, args.scale, args.steps, args.rounds, console)
        cells += made
        peak = format_bytes(made[0].eager_bytes)
        print(f"{name}: {args.steps} training steps under each budget, eager's peak {peak}; step times over eager's\n")
        print(aligned_table(HEADERS, [cell.row() for cell in made]) + "\n", flush=True)
    elapsed_s = time.perf_counter() - start_s
    wrong = [cell for cell in cells if not cell.keeps_its_word]
    verdict = "every peak within its budget, every gradient equal to eager's bit for bit"
    print(f"{verdict if not wrong else f'{len(wrong)} of {len(cells)} cells FAILED'}; {elapsed_s:.0f} s in all")
    if args.json is not None:
        args.json.write_text(json.dumps(_record(cells, elapsed_s, args), indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=("test", "bench"), default="bench", help="size of the models")
    parser.add_argument("--steps", type=int, default=3, help="training steps to compare")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; one isn't disturbed by what else runs")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def _run_model(spec: ModelSpec, scale: Scale, steps: int, rounds: int, console: Console) -> list[Cell]:
    eager = _eager(spec, scale)
    with console.status(f"{spec.name}: eager"):
        reference = list(_train(eager, steps))
        eager_bytes = _peak_bytes(eager)
    contestants = {"eager": eager}
    plans: dict[str, tuple[remat.Plan, float]] = {}
    gradients: dict[str, str] = {}
    minimum_bytes = 0
    for budget in BUDGETS:
        with console.status(f"{spec.name}: planning {budget}, then training {steps} steps"):
            try:
                stepper, plan, planning_s = _planned(spec, scale, minimum_bytes if budget == "minimum" else budget)
            except remat.BudgetError as error:
                minimum_bytes = error.minimum_bytes
                gradients[budget] = REFUSED
                continue
            minimum_bytes = plan.minimum_bytes
            contestants[budget] = stepper
            plans[budget] = plan, planning_s
            gradients[budget] = _differences(reference, _train(stepper, steps))
    with console.status(f"{spec.name}: timing {len(contestants)} variants in turns"):
        peaks = {budget: _peak_bytes(contestants[budget]) for budget in plans}
        timings = time_interleaved(
            {name: (lambda stepper=stepper: stepper.step(0)) for name, stepper in contestants.items()},
            reference="eager",
            rounds=rounds,
            warmup=0,  # all have just trained
        )
    cells = {name: Cell(spec.name, name, eager_bytes, text) for name, text in gradients.items()}
    for budget, (plan, planning_s) in plans.items():
        cells[budget] = replace(
            cells[budget],
            budget_bytes=plan.budget_bytes,
            predicted_bytes=plan.peak_bytes,
            measured_bytes=peaks[budget],
            predicted_overhead=plan.overhead,
            measured_overhead=timings[budget].ratio - 1,
            planning_s=planning_s,
        )
    return list(cells.values())


def _eager(spec: ModelSpec, scale: Scale) -> Stepper:
    model, inputs = spec.build(scale)
    return Stepper(model, inputs, spec.loss_of)


def _planned(spec: ModelSpec, scale: Scale, budget: int | str) -> tuple[Stepper, remat.Plan, float]:
    plain = _eager(spec, scale)
    start_s = time.perf_counter()
    plan = remat.plan(plain.module, plain.inputs, activation_budget=budget)
    planning_s = time.perf_counter() - start_s
    wrapped = remat.wrap(plain.module, plan=plan, example_inputs=plain.inputs)
    return Stepper(wrapped, plain.inputs, spec.loss_of), plan, planning_s


def _peak_bytes(stepper: Stepper) -> int:
    """Measure, without the lines that the profiler writes to the terminal underneath Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        return measure_step_peak(stepper).peak_bytes
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _train(stepper: Stepper, steps: int) -> Iterator[StepResult]:
    """Plain gradient descent; yields all that each step changed."""
    for seed in range(steps):
        result = run_step(stepper, seed=seed)
        with torch.no_grad():
            for name, parameter in stepper.module.named_parameters():
                if (gradient := result.gradients[name]) is not None:
                    parameter.sub_(gradient, alpha=LEARNING_RATE)
        yield result


def _differences(reference: list[StepResult], results: Iterator[StepResult]) -> str:
    """Return "equal" when loss, gradients, buffers and generator are, bit for bit, in all steps."""
    for step, (expected, got) in enumerate(zip(reference, results, strict=True)):
        comparison = compare_steps(expected, got)
        if not comparison.exact:
            return f"step {step}: {comparison.describe()}"
    return "equal"


def _record(cells: list[Cell], elapsed_s: float, args: argparse.Namespace) -> dict[str, object]:
    options = f"--scale {args.scale} --steps {args.steps} --rounds {args.rounds} --threads {args.threads}"
    return {
        "benchmark": "demo",
        "command": f"python -m benchmarks.demo {options}",
        "versions": {
            "rematerialize": remat.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "elapsed_s": elapsed_s,
        "cells": [asdict(cell) for cell in cells],
    }


if __name__ == "__main__":
    sys.exit(main())
