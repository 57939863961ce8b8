"""What a model of the zoo is: a factory, its hand-checkpointed twin, and where its loss stands. Free of torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    from torch import Tensor, nn

Scale = Literal["test", "bench"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Inputs = tuple[Any, ...] | dict[str, Any]
Made: TypeAlias = "tuple[nn.Module, Inputs]"  # the pair that the command line's factories return, too
Runner = Callable[..., Any]  # runner(block, *args): how a model runs each of its natural blocks


def loss_is_output(outputs: Any) -> Tensor:
    """Return the loss of a model whose forward returns the loss itself."""
    from torch import Tensor

    assert isinstance(outputs, Tensor)
    return outputs


@dataclass(frozen=True, slots=True)
class Lazy:
    """A function of the zoo that is imported at its first call, so that the registry can be read without torch.

    Attributes
    ----------
    module : str
        Below ``rematerialize.zoo``.
    name : str
    """

    module: str
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Import the function and call it."""
        return getattr(importlib.import_module(f"rematerialize.zoo.{self.module}"), self.name)(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of the zoo.

    Attributes
    ----------
    name : str
        Unique in the registry.
    group : {"first", "models", "large"}
        "first": plain torch, in this repository. "models": needs the extra of that name. "large": plain torch, of a
        size for which only fake tensors do; one scale.
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
    about : str
        What it is, in a few words.
    requires : str
        The package that it needs besides torch, or an empty string.
    """

    name: str
    group: Literal["first", "models", "large"]
    make: Callable[[Scale], Made]
    per_block: Callable[[Scale], Made] | None = None
    per_block_reason: str = ""
    loss_of: Callable[[Any], Tensor] = loss_is_output
    loss_outside: bool = False
    about: str = ""
    requires: str = ""

    @property
    def fake_only(self) -> bool:
        """Whether real tensors of it would ask for more memory than machines have."""
        return self.group == "large"

    def missing(self) -> str:
        """Return the package that the model lacks here, or an empty string."""
        return self.requires if self.requires and importlib.util.find_spec(self.requires) is None else ""

    def build(self, scale: Scale, *, seed: int = 0, per_block: bool = False) -> Made:
        """Seed the global generator, then make the model and its inputs.

        Raises
        ------
        ValueError
            When the per-block twin is asked for and doesn't exist.
        """
        import torch

        factory = self.per_block if per_block else self.make
        if factory is None:
            raise ValueError(f"{self.name} has no per-block twin: {self.per_block_reason}")
        torch.manual_seed(seed)
        return factory(scale)
