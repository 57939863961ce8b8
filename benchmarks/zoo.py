"""Write what `rematerialize zoo` says of each model's size, which it can't count without making the model.

    python -m benchmarks.zoo [--check]

Sizes are counted on fake tensors where the model can be made of them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from typing import Any

from torch import Tensor

from rematerialize.errors import TargetError
from rematerialize.targets.load import Target, load
from rematerialize.zoo import ENTRIES
from rematerialize.zoo.figures import FIGURES_FILE, FORMAT
from rematerialize.zoo.spec import SCALES


def counted(name: str, scale: str) -> dict[str, Any]:
    """Parameters, and example inputs as SPECs."""
    target = f"zoo:{name}@{scale}"
    try:
        made = load(target, fake=True)
    except TargetError:
        made = load(target)
    return {"parameters": sum(p.numel() for p in made.model.parameters()), "inputs": " ".join(_inputs(made))}


def _inputs(target: Target) -> list[str]:
    if isinstance(target.inputs, dict):
        named = target.inputs
    else:
        named = dict(zip(inspect.signature(target.model.forward).parameters, target.inputs, strict=False))
    return [f"{name}={_spec(value)}" for name, value in named.items() if isinstance(value, Tensor)]


def _spec(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"


def text() -> str:
    """The file's content."""
    models = {
        name: {scale: counted(name, scale) for scale in SCALES} for name, spec in ENTRIES.items() if not spec.missing()
    }
    return json.dumps({"format": FORMAT, "models": models}, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 when stale")
    made = text()
    if parser.parse_args().check:
        return int(FIGURES_FILE.read_text(encoding="utf-8") != made)
    FIGURES_FILE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
