"""Every model of the zoo as a case."""

from __future__ import annotations

from benchmarks.captures.case import Case
from benchmarks.models import MODELS
from benchmarks.models.extra import missing
from benchmarks.models.spec import Made, ModelSpec

_GROUPED = "the captured attention with grouped keys and values rounds otherwise"
ROUNDS = {
    "lstm": "split over time below about half of the peak: weight gradients add up in another order",
    "llama": _GROUPED,
    "mixtral": _GROUPED,
    "mamba": "the captured scan rounds otherwise",
}


def _case(spec: ModelSpec) -> Case:
    def make() -> Made:
        return spec.make("test")

    needs = "" if spec.group == "first" else missing(spec.name)
    return Case(spec.name, "Zoo", make, spec.loss_of, rounds=ROUNDS.get(spec.name, ""), needs=needs)


CASES = tuple(_case(spec) for spec in MODELS.values())
