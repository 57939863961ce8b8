"""``python -m benchmarks.fuzz``: many random modules, counted by outcome and by piece.

Ten thousand examples take hours: ``--resume`` goes on with a record as long as what it is about (`TESTED`) stays
unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.fuzz.check import Outcome, check
from benchmarks.fuzz.pieces import PIECES
from benchmarks.fuzz.recipe import Recipe, read
from benchmarks.fuzz.run import Tally, fuzz, quiet_start
from benchmarks.provenance import Provenance, provenance

FORMAT = "rematerialize.fuzz/3"
RESULT = Path(__file__).resolve().parents[1] / "results" / "fuzz.json"
PACKAGES = ("rematerialize", "torch", "hypothesis")
ROOT = Path(__file__).resolve().parents[2]
TESTED = (  # all that decides what a wrapped module computes under a schedule; recipes make schedules of their own, too
    "rematerialize/capture",
    "rematerialize/emit.py",
    "rematerialize/ir.py",
    "rematerialize/tangents.py",
    "rematerialize/plans.py",
    "rematerialize/prepare.py",
    "rematerialize/python_code.py",
    "rematerialize/python_state.py",
    "rematerialize/runtime.py",
    "rematerialize/signature.py",
    "rematerialize/simulate.py",
    "rematerialize/torch_private.py",
    "rematerialize/wrapper.py",
    "benchmarks/fuzz",
)


def shrink(recipe: Recipe) -> Recipe:
    """The smallest recipe by greedy removal that fails in the same way."""
    kind = _kind(check(recipe))
    smaller = True
    while smaller:
        smaller = False
        for candidate in _simpler(recipe):
            if _kind(check(candidate)) == kind:
                recipe, smaller = candidate, True
                break
    return recipe


def _kind(outcome: Outcome) -> str:
    words = outcome.detail.split()
    return (
        f"{outcome.status} {' '.join(words[:2])}" if outcome.detail.startswith("r") else f"{outcome.status} {words[:1]}"
    )


def _simpler(recipe: Recipe) -> list[Recipe]:
    plain = Recipe(())
    found = []
    for pieces in _fewer(recipe.pieces):
        found.append(replace(recipe, pieces=pieces))
    if len(recipe.outputs) > 1:
        found += [
            replace(recipe, outputs=recipe.outputs[:i] + recipe.outputs[i + 1 :]) for i in range(len(recipe.outputs))
        ]
    for name in (
        "micro_batches",
        "loss",
        "arrival",
        "frozen",
        "used",
        "wide",
        "turned",
        "home",
        "inputs_with_grad",
        "outputs",
        "room",
        "solver",
        "seed",
    ):
        if getattr(recipe, name) != getattr(plain, name):
            found.append(replace(recipe, **{name: getattr(plain, name)}))
    return found


def _fewer(pieces: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    found = [pieces[:i] + pieces[i + 1 :] for i in range(len(pieces))]
    for i, piece in enumerate(pieces):
        if piece.body:
            found.append(pieces[:i] + piece.body + pieces[i + 1 :])
            found += [(*pieces[:i], replace(piece, body=b), *pieces[i + 1 :]) for b in _fewer(piece.body)]
        for name in ("a", "b", "k"):
            if getattr(piece, name):
                found.append((*pieces[:i], replace(piece, **{name: 0}), *pieces[i + 1 :]))
    return found


def tested_code() -> str:
    """Digest of the sources in `TESTED`."""
    digest = hashlib.sha256()
    for place in TESTED:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def record(tally: Tally, told: Provenance, wall_s: float) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **asdict(told),
        "tested_code": tested_code(),
        "next_seed": tally.next_seed,
        "wall_s": round(wall_s, 1),
        "examples": tally.examples,
        "outcomes": {name: tally.outcomes[name] for name in ("equal", "rounded", "refused", "failed")},
        "refused_by_reason": dict(tally.reasons.most_common()),
        "not_for_eager": tally.outcomes["invalid"],
        "with_recomputation": tally.recomputing,
        "examples_by_piece": {name: tally.pieces[name] for name in sorted(PIECES)},
        "examples_by_solver": dict(sorted(tally.solvers.items())),
        "slowest": tally.slowest,
        "failures": tally.failures,
    }


def resumed(path: Path) -> tuple[Tally, float] | None:
    """The tally and the seconds of a record of the same code; None if there is none."""
    if not path.exists():
        return None
    old = json.loads(path.read_text(encoding="utf-8"))
    if (old["format"], old["tested_code"]) != (FORMAT, tested_code()):
        return None
    outcomes = Counter(old["outcomes"], invalid=old["not_for_eager"])
    counts = (old["refused_by_reason"], {}, old["examples_by_piece"], old["examples_by_solver"])
    tally = Tally(
        outcomes,
        *map(Counter, counts),
        recomputing=old["with_recomputation"],
        failures=old["failures"],
        slowest=tuple(old["slowest"]),
        next_seed=old["next_seed"],
    )
    return tally, old["wall_s"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="valid examples to check, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the recipes")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--resume", action="store_true", help="go on with the record of the same code, if there is one")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--recipe", help="check this one: the repr of a recipe")
    parser.add_argument("--shrink", action="store_true", help="make a failing --recipe smaller")
    options = parser.parse_args(arguments)
    if options.recipe:
        quiet_start()
        recipe = read(options.recipe)
        recipe = shrink(recipe) if options.shrink else recipe
        outcome = check(recipe)
        print(f"{recipe!r}\n{outcome.status}: {outcome.detail}")
        return int(outcome.status == "failed")
    told = provenance("benchmarks.fuzz", arguments, PACKAGES, options.seed)
    before = resumed(options.output) if options.resume else None
    tally, spent_s = before or (Tally(next_seed=options.seed), 0.0)
    start = time.monotonic() - spent_s

    def save(tally: Tally) -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record(tally, told, time.monotonic() - start), indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")
        print(f"{time.monotonic() - start:.0f} s: {dict(tally.outcomes)}", flush=True)

    fuzz(options.examples, options.minutes * 60, options.jobs, save, tally)
    save(tally)
    print(json.dumps({"invalid": tally.invalid.most_common(15)}, indent=1))
    return int(tally.outcomes["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
