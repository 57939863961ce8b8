"""Random modules (`benchmarks.fuzz`) under random budgets do eager's steps bit for bit, within their memory.

A failure prints its recipe: ``python -m benchmarks.fuzz --shrink --recipe "Recipe(...)"`` runs it again.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings

from benchmarks.fuzz.check import check
from benchmarks.fuzz.recipe import Piece, Recipe, read
from benchmarks.fuzz.strategies import recipes
from rematerialize.prepare import shared_costs

EXAMPLES = 200

# What the fuzzer found, shrunk, by what was wrong.
FOUND = {
    "what a sum loses isn't copied, or an expanded gradient is laid out anew": Recipe(
        (Piece("batch_norm"), Piece("softmax")), outputs=(1, 0), arrival="expanded"
    ),
    "a backward of zeros reads nothing at all": Recipe(
        (
            Piece("join"),
            Piece("add_all"),
            Piece("copy_then_", a=3),
            Piece("pool"),
            Piece("arithmetic_", a=3, k=7),
            Piece("batch_norm_eval"),
            Piece("noise", a=4),
        ),
        outputs=(0, 5),
        inputs_with_grad=1,
    ),
    "zeros of an output that the loss leaves out are none": Recipe(
        (Piece("conv"), Piece("cat", a=1, b=1), Piece("attention"), Piece("arithmetic_", a=2, k=9)),
        home="sequence",
        outputs=(0, 2),
    ),
    "the given order needs less memory than any that the planner tries": Recipe(
        (
            Piece("view_back", b=2, k=22),
            Piece("copy_then_", a=4, b=1, k=21),
            Piece("activation", a=5, b=5, k=15),
            Piece(
                "no_grad",
                a=4,
                body=(
                    Piece("residual", a=1, b=5, k=22, body=(Piece("write", a=4, b=2, k=18),)),
                    Piece("view_back", k=5),
                    Piece("residual", a=1, b=5, k=22, body=(Piece("write", a=4, b=2, k=18),)),
                ),
            ),
            Piece("conv", a=5, b=1, k=22),
            Piece("tied", a=5, b=4, k=14),
            Piece("buffer", b=3, k=13),
        ),
        outputs=(0, 3),
        loss="each",
        micro_batches=2,
        solver="auto",
        seed=113,
    ),
    "a hardtanh's backward keeps the layout of its gradient, its fake kernel that of its input": Recipe(
        (
            Piece("autocast", body=(Piece("cat_layer"),)),
            Piece("activation_", k=9),
            Piece("activation"),
            Piece("reduce"),
            Piece("multihead", a=3),
        ),
        home="image",
    ),
    "the same before an LSTM's backward, which copies its gradient then": Recipe(
        (
            Piece("lstm"),
            Piece("join"),
            Piece("contiguous"),
            Piece("activation_"),
            Piece("residual", a=2, body=(Piece("activation_", k=17),)),
        ),
        home="sequence",
        loss="inside",
    ),
    "what a mask selects takes workspace that a mask all false doesn't show": Recipe(
        (Piece("index", k=19), Piece("contiguous", k=1)), home="image", inputs_with_grad=3
    ),
    "outputs that are inputs": Recipe((Piece("contiguous"),), outputs=(0,), inputs_with_grad=1),
    "one tensor returned twice counted twice": Recipe(
        (Piece("linear"), Piece("activation", k=5)), wide=True, outputs=(0, 0), used=2, solver="store_all"
    ),
    "the generator's state, put aside while a random op runs again, counted nowhere": Recipe(
        (*[Piece("activation")] * 6, Piece("dropout"), Piece("embedding")), solver="scramble", seed=2
    ),
    "slices of a GRU's gates rounded otherwise": Recipe((Piece("lstm_cell", k=1),)),
    "slices of a GRU layer's gates rounded otherwise": Recipe((Piece("lstm", k=1),), home="sequence"),
    "scatter_add_ lost its argument's layout": Recipe((Piece("lstm"), Piece("index", k=13)), home="image"),
    "a gradient laid out otherwise once another output has none": Recipe(
        (
            Piece("batch_norm"),
            Piece("multihead"),
            Piece("batch_norm"),
            Piece("contiguous"),
            Piece("stack"),
            Piece("attention", a=4, k=19),
        ),
        home="sequence",
        outputs=(0, 1, 2),
        used=4,
        loss="each",
    ),
    "the one gradient of a slice, gaps between its rows closed": Recipe(
        (
            Piece("reduce"),
            Piece("prelu"),
            Piece("cat", a=1, b=2, k=8),
            Piece("multihead"),
            Piece("copy_then_"),
            Piece("noise"),
            Piece("embedding"),
        ),
        outputs=(4, 5),
        inputs_with_grad=3,
    ),
    "a group norm's backward reads a gradient of its own layout only": Recipe(
        (
            Piece("group_norm", b=5, k=20),
            Piece("dropout", a=3),
            Piece("cat", b=5, k=21),
            Piece("join", a=1, b=4, k=8),
            Piece("cat", a=1, b=2, k=10),
        ),
        home="sequence",
        outputs=(0, 4),
        used=7,
        loss="each",
        inputs_with_grad=3,
    ),
    "an LSTM without gradients runs another primitive": Recipe(
        (Piece("no_grad", body=(Piece("lstm"),)),), home="sequence", inputs_with_grad=3
    ),
    "a group norm's statistics under autocast are in its parameters' precision": Recipe(
        (Piece("autocast", body=(Piece("product"), Piece("group_norm"))),)
    ),
    "an LSTM reads a batch norm that has laid out its result anew": Recipe(
        (Piece("loop", body=(Piece("lstm"), Piece("batch_norm"))),), home="image"
    ),
    "store-all below the least budget of a named solver": Recipe(
        (
            Piece("buffer", a=5, b=3),
            Piece("softmax", k=1),
            Piece("layer_activation_", k=2),
            Piece("tied", k=1),
            Piece("stack", a=1, b=1, k=1),
            Piece("rms_norm", a=2),
            Piece("lstm_cell", a=5, k=3),
        ),
        home="sequence",
        loss="inside",
        solver="rotor",
        room=10,
    ),
}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """One thread, and kernels that run once: recipes say what they cost."""
    threads, limit_s = torch.get_num_threads(), shared_costs().time_limit_s
    torch.set_num_threads(1)
    shared_costs().time_limit_s = 0.0
    yield
    torch.set_num_threads(threads)
    shared_costs().time_limit_s = limit_s


@settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(recipes())
def test_random_modules_do_eagers_steps_within_their_budgets(recipe: Recipe) -> None:
    outcome = check(recipe)
    note(f"{outcome.status}: {outcome.detail}")
    assert outcome.status != "failed", f"{outcome.detail}\n{recipe!r}"


@pytest.mark.parametrize("wrong", FOUND)
def test_what_was_wrong_is_equal_now(wrong: str) -> None:
    outcome = check(FOUND[wrong])
    assert (outcome.status, outcome.detail) == ("equal", "")


def test_a_recipe_is_read_back_from_its_print() -> None:
    recipe = Recipe((Piece("linear", k=1), Piece("loop", body=(Piece("dropout"),))), home="image", outputs=(0, 2))
    assert read(repr(recipe)) == recipe
