"""What a benchmark model is: a factory, its hand-checkpointed twin, and where its loss stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

Scale = Literal["test", "bench"]
Inputs = tuple[Any, ...] | dict[str, Any]
Made = tuple[nn.Module, Inputs]  # the pair that the command line's factories return, too
Runner = Callable[..., Any]  # runner(block, *args): how a model runs each of its natural blocks


def plain(block: Callable[..., Any], *args: Any) -> Any:
    """Run the block as it is."""
    return block(*args)


def checkpointed(block: Callable[..., Any], *args: Any) -> Any:
    """Run the block under torch's activation checkpointing, as its documentation recommends."""
    return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)


def loss_is_output(outputs: Any) -> Tensor:
    """Return the loss of a model whose forward returns the loss itself."""
    assert isinstance(outputs, Tensor)
    return outputs


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of the zoo.

    Attributes
    ----------
    name : str
        Unique in the registry.
    group : {"first", "models"}
        "first": plain torch, in this repository. "models": needs the extra of that name.
    make : callable
        ``make(scale)`` returns the model in train mode and its example inputs, a tuple of args or
        a dict of kwargs. Draws from the global generator: seed it first (or call `build`).
    per_block : callable or None
        The same with `torch.utils.checkpoint` around each natural block; same parameters from the
        same seed. None: not applicable, see `per_block_reason`.
    loss_of : callable
        Maps the forward's outputs to the scalar to call ``backward`` on.
    loss_outside : bool
        Whether `loss_of` computes, rather than picks, the loss: then no plan of the model sees it.
    """

    name: str
    group: Literal["first", "models"]
    make: Callable[[Scale], Made]
    per_block: Callable[[Scale], Made] | None = None
    per_block_reason: str = ""
    loss_of: Callable[[Any], Tensor] = loss_is_output
    loss_outside: bool = False

    def build(self, scale: Scale, *, seed: int = 0, per_block: bool = False) -> Made:
        """Seed the global generator, then make the model and its inputs.

        Raises
        ------
        ValueError
            When the per-block twin is asked for and doesn't exist.
        """
        factory = self.per_block if per_block else self.make
        if factory is None:
            raise ValueError(f"{self.name} has no per-block twin: {self.per_block_reason}")
        torch.manual_seed(seed)
        return factory(scale)
