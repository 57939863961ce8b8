"""How large the models of the zoo are, from a file that ``python -m benchmarks.zoo`` writes. Free of torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FORMAT = "rematerialize.zoo/1"
FIGURES_FILE = Path(__file__).with_name("figures.json")


@dataclass(frozen=True, slots=True)
class Figures:
    """One model at one scale.

    Attributes
    ----------
    parameters : int
        How many numbers.
    inputs : str
        Its example inputs, as SPECs.
    """

    parameters: int
    inputs: str


def figures() -> dict[str, dict[str, Figures]]:
    """Figures by model and scale; empty for a model that wasn't there when they were counted."""
    data = json.loads(FIGURES_FILE.read_text(encoding="utf-8"))
    assert data["format"] == FORMAT
    return {
        name: {scale: Figures(**figure) for scale, figure in scales.items()} for name, scales in data["models"].items()
    }
