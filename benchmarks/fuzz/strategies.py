"""Hypothesis strategies for recipes. They shrink towards one small piece, planned at its least memory."""

from __future__ import annotations

from hypothesis import strategies as st

from benchmarks.fuzz.pieces import PLAIN, REGIONS
from benchmarks.fuzz.recipe import ARRIVALS, HOMES, LOSSES, Piece, Recipe

# Named ones are quick; "auto" takes seconds on these graphs, so it is rare.
SOLVERS = ("least", "scramble", "descent", "scramble", "sweep", "chain", "rotor", "join", "revolve", "blocks")

_picks = st.integers(0, 5)
_variants = st.integers(0, 23)


def _plain(names: tuple[str, ...]) -> st.SearchStrategy[Piece]:
    return st.builds(Piece, st.sampled_from(names), _picks, _picks, _variants)


def pieces(depth: int = 2) -> st.SearchStrategy[Piece]:
    """A piece; one in some is a region around others."""
    plain = _plain(PLAIN)
    if not depth:
        return plain
    body = st.lists(pieces(depth - 1), min_size=1, max_size=3).map(tuple)
    region = st.builds(Piece, st.sampled_from(REGIONS), _picks, _picks, _variants, body)
    return st.integers(0, 5).flatmap(lambda draw: region if draw == 5 else plain)


def recipes() -> st.SearchStrategy[Recipe]:
    return st.builds(
        Recipe,
        pieces=st.lists(pieces(), min_size=1, max_size=9).map(tuple),
        home=st.sampled_from((*HOMES[:3], *HOMES)),
        wide=st.booleans(),
        turned=st.booleans(),
        outputs=st.lists(st.integers(0, 6), max_size=2).map(lambda more: (0, *more)),
        used=st.sampled_from((7, 7, 7, 0, 2, 4)),
        loss=st.sampled_from(LOSSES),
        arrival=st.sampled_from(ARRIVALS),
        frozen=st.sampled_from((0, 0, 0, 1, 2, 5, 0xAA)),
        inputs_with_grad=st.sampled_from((1, 3, 0, 2, 3)),
        micro_batches=st.sampled_from((1, 1, 2)),
        solver=st.integers(0, 59).map(lambda draw: "auto" if draw == 59 else SOLVERS[draw % len(SOLVERS)]),
        room=st.sampled_from((0, 0, 10, 30, 60, 100)),
        seed=st.integers(0, 999),
    )
