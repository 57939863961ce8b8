"""Every model of the zoo as a case."""

from __future__ import annotations

from benchmarks.captures.case import Case
from rematerialize.zoo import MODELS
from rematerialize.zoo.spec import Made, ModelSpec

ROUNDS = {"lstm": "split over time below about half of the peak: weight gradients add up in another order"}


def _case(spec: ModelSpec) -> Case:
    def make() -> Made:
        return spec.make("test")

    needs = spec.missing()
    return Case(spec.name, "Zoo", make, spec.loss_of, rounds=ROUNDS.get(spec.name, ""), needs=needs)


CASES = tuple(_case(spec) for spec in MODELS.values())
