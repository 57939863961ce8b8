"""A long training under the lowest budget beside eager's: the same losses to the last step, no memory left behind.

    python -m benchmarks.soak [--steps N] [--output PATH]

A small GPT with dropout and AdamW. Both models draw from their own copy of the generator; losses are compared bit
for bit at every step, parameters at the end. Exits with 1 when anything differs or memory grows.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import rematerialize as remat
from benchmarks.provenance import Provenance, provenance
from rematerialize.harness import measure_peak
from rematerialize.units import format_bytes, format_percent
from rematerialize.zoo import MODELS

FILE = Path(__file__).resolve().parent / "results" / "soak.json"
PACKAGES = ("rematerialize", "torch")
MODEL = "gpt"
STEPS = 2_000
SETTLED = 10  # steps after which memory must not grow any more
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Soak:
    """What a soak saw.

    Attributes
    ----------
    steps, first_difference : int
        Steps taken by both, and the first whose losses weren't bit-equal (-1: none).
    same_parameters, same_generator : bool
        At the end, bit for bit.
    budget_bytes, store_all_bytes, peak_bytes : int
        Activation budget (the plan's minimum), store-all's peak, and the peak measured at the last step.
    early_bytes, late_bytes : int
        Bytes of all live tensors after step ``SETTLED`` and after the last.
    first_loss, last_loss : float
    seconds : float
    """

    steps: int
    first_difference: int
    same_parameters: bool
    same_generator: bool
    budget_bytes: int
    store_all_bytes: int
    peak_bytes: int
    early_bytes: int
    late_bytes: int
    first_loss: float
    last_loss: float
    seconds: float

    @property
    def passed(self) -> bool:
        return (
            self.first_difference < 0
            and self.same_parameters
            and self.same_generator
            and self.peak_bytes <= self.budget_bytes
            and self.late_bytes <= self.early_bytes
        )


class _Trainer:
    """A model with its optimizer and its own place in the generator's stream."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE)
        self.generator = torch.random.get_rng_state()

    def forward_backward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        loss: Tensor = self.module(*inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, inputs: tuple[Tensor, ...]) -> Tensor:
        torch.random.set_rng_state(self.generator)
        self.optimizer.zero_grad()
        loss = self.forward_backward(inputs)
        self.optimizer.step()
        self.generator = torch.random.get_rng_state()
        return loss


def soak(steps: int = STEPS) -> Soak:
    """Train for a number of steps, at least ``SETTLED``."""
    start = time.perf_counter()
    spec = MODELS[MODEL]
    torch.manual_seed(0)
    (eager, inputs), (wrapped, _) = spec.build("test"), spec.build("test")
    assert isinstance(inputs, tuple)
    wrapped.load_state_dict(eager.state_dict())
    plan = remat.plan(wrapped, inputs, activation_budget=_minimum(wrapped, inputs))
    remat.wrap(wrapped, plan=plan)
    torch.manual_seed(1)
    theirs, ours = _Trainer(eager), _Trainer(wrapped)
    batches = torch.Generator().manual_seed(2)
    difference, early, first, last = -1, 0, 0.0, 0.0
    for step in range(steps):
        shifts = torch.randint(1, 255, (1,), generator=batches)
        batch = tuple((tensor + shifts) % 256 for tensor in inputs)
        expected, found = theirs.step(batch), ours.step(batch)
        if difference < 0 and not torch.equal(expected, found):
            difference = step
        first, last = first if step else expected.item(), found.item()
        if step + 1 == SETTLED:
            early = live_bytes()
    late = live_bytes()
    same_generator = torch.equal(theirs.generator, ours.generator)
    pairs = zip(eager.parameters(), wrapped.parameters(), strict=True)
    same_parameters = all(torch.equal(a, b) for a, b in pairs)
    ours.optimizer.zero_grad()
    peak = measure_peak(lambda: ours.forward_backward(inputs)).peak_bytes
    return Soak(
        steps,
        difference,
        same_parameters,
        same_generator,
        plan.budget_bytes,
        plan.store_all_peak_bytes,
        peak,
        early,
        late,
        first,
        last,
        time.perf_counter() - start,
    )


def _minimum(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    return remat.plan(module, inputs, activation_budget="100%").minimum_bytes


def live_bytes() -> int:
    """Bytes of the distinct storages behind all tensors that are alive."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main() -> int:
    """Soak, print what it saw, write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args()
    origin: Provenance = provenance("benchmarks.soak", sys.argv[1:], PACKAGES)
    seen = soak(args.steps)
    record = {"provenance": dataclasses.asdict(origin), "soak": dataclasses.asdict(seen)}
    args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(
        f"{MODEL}: {seen.steps} steps under {format_bytes(seen.budget_bytes)}"
        f" ({format_percent(seen.budget_bytes / seen.store_all_bytes)} of store-all's peak)\n"
        f"losses {'equal at every step' if seen.first_difference < 0 else f'differ at step {seen.first_difference}'},"
        f" from {seen.first_loss:.4f} to {seen.last_loss:.4f}; parameters"
        f" {'equal' if seen.same_parameters else 'differ'}, generator {'equal' if seen.same_generator else 'differs'}\n"
        f"peak of the last step {format_bytes(seen.peak_bytes)}; live tensors after step {SETTLED}:"
        f" {seen.early_bytes} bytes, at the end: {seen.late_bytes} bytes; {seen.seconds:.0f} s"
    )
    return int(not seen.passed)


if __name__ == "__main__":
    sys.exit(main())
