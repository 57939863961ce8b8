"""A model as plain data. Its repr is Python: a failing one is printed, pasted and run again.

Every recipe of in-range types builds something: picks are taken modulo what there is, so that dropping a piece
leaves a recipe (which is what shrinking does).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Home = Literal["rows", "sequence", "image", "pixel", "single", "gray"]
# Usual and wide.
SHAPES: dict[Home, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "rows": ((6, 12), (33, 64)),
    "sequence": ((3, 5, 8), (4, 16, 32)),
    "image": ((3, 4, 6, 6), (2, 8, 16, 16)),
    "pixel": ((2, 8, 1, 1), (4, 64, 1, 1)),
    "single": ((1, 4, 6, 6), (1, 8, 16, 16)),
    "gray": ((2, 1, 6, 6), (3, 1, 16, 16)),
}
HOMES: tuple[Home, ...] = tuple(SHAPES)

Loss = Literal["outside", "inside", "each"]
LOSSES: tuple[Loss, ...] = ("outside", "inside", "each")
Arrival = Literal["output", "expanded", "transposed", "both"]
ARRIVALS: tuple[Arrival, ...] = ("output", "expanded", "transposed", "both")


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of a forward.

    Attributes
    ----------
    name : str
        A key of `pieces.PIECES`.
    a, b : int
        Which values it takes; 0 is the newest of those that fit.
    k : int
        Picks a variant of the piece.
    body : tuple of Piece
        What runs inside it, for regions.
    """

    name: str
    a: int = 0
    b: int = 0
    k: int = 0
    body: tuple[Piece, ...] = ()

    def __repr__(self) -> str:
        told = [repr(self.name)]
        told += [f"{field}={value}" for field in ("a", "b", "k") if (value := getattr(self, field))]
        if self.body:
            told.append(f"body={self.body!r}")
        return f"Piece({', '.join(told)})"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model, its inputs, how it is trained and how its step is planned.

    Attributes
    ----------
    pieces : tuple of Piece
    home : str
        The shape that layers map to itself.
    wide : bool
        Tensors of some kilobytes, where the budget is about more than generator states.
    turned : bool
        Maps in channels last, model and inputs; other inputs with their last two dimensions swapped in memory.
    outputs : tuple of int
        Which values the forward returns; 0 is the newest.
    used : int
        Bit mask: which outputs after the first take part in the loss.
    loss : str
        "outside" of the module, "inside" (its first output is the loss), or one for "each" output, in turns with
        ``retain_graph``.
    arrival : str
        How gradients of outputs are laid out: like the "output", "expanded" from one number, "transposed", or "both":
        a sum of one like the output and a transposed one.
    frozen : int
        Bit mask over the parameters, repeating every 8: which don't require grad.
    inputs_with_grad : int
        Bit mask over the two inputs.
    micro_batches : int
        Backwards per optimizer step.
    solver : str
        A name of the registry, "auto", or "scramble": random recomputations wherever they are valid.
    room : int
        Percent of the way from the least budget (0) to store-all's (100).
    seed : int
        Of initial values, inputs, generators and costs.
    """

    pieces: tuple[Piece, ...]
    home: Home = "rows"
    wide: bool = False
    turned: bool = False
    outputs: tuple[int, ...] = (0,)
    used: int = 0
    loss: Loss = "outside"
    arrival: Arrival = "output"
    frozen: int = 0
    inputs_with_grad: int = 0
    micro_batches: int = 1
    solver: str = "least"
    room: int = 0
    seed: int = 0

    def __repr__(self) -> str:
        plain = Recipe(())
        told = [f"{self.pieces!r}"]
        names = [name for name in self.__slots__ if name != "pieces"]
        told += [f"{n}={getattr(self, n)!r}" for n in names if getattr(self, n) != getattr(plain, n)]
        return f"Recipe({', '.join(told)})"

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.home][self.wide]

    @property
    def layout(self) -> torch.memory_format:
        maps = self.turned and len(self.shape) == 4
        return torch.channels_last if maps else torch.contiguous_format

    def walk(self) -> Iterator[Piece]:
        """Every piece, those in regions included."""
        todo = list(reversed(self.pieces))
        while todo:
            piece = todo.pop()
            yield piece
            todo.extend(reversed(piece.body))


def read(text: str) -> Recipe:
    """The recipe that a repr describes."""
    found = eval(text, {"__builtins__": {}}, {"Recipe": Recipe, "Piece": Piece})
    if not isinstance(found, Recipe):
        raise ValueError(f"this is a {type(found).__name__}, not a Recipe(...)")
    return found
