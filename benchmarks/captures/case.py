"""What a capture case is: a small model, one call of it, and what is expected of the package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rematerialize.zoo.spec import Made, ModelSpec


def total(outputs: Any) -> Tensor:
    """A scalar that every differentiable output takes part in, with a gradient that isn't constant."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    parts = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]
    if len(parts) == 1 and parts[0].ndim == 0:
        return parts[0]
    return torch.stack([part.float().square().add(part.float().sin()).mean() for part in parts]).sum()


@dataclass(frozen=True, slots=True)
class Case:
    """One architecture.

    Attributes
    ----------
    name : str
        Unique among all cases.
    family : str
        Heading of the table that it stands under.
    make : callable
        Returns the model in train mode and its example inputs, as a zoo model's factory does.
    loss_of : callable
        Maps the forward's outputs to the scalar to call ``backward`` on.
    refused : str
        Part of the message if the package refuses it; "" if it must be supported.
    rounds : str
        Why its step equals eager's only up to rounding; "" if it must be equal bit for bit.
    needs : str
        Package that it needs besides torch.
    """

    name: str
    family: str
    make: Callable[[], Made]
    loss_of: Callable[[Any], Tensor] = total
    refused: str = ""
    rounds: str = ""
    needs: str = ""

    def spec(self) -> ModelSpec:
        return ModelSpec(self.name, "models", lambda scale: self.make(), loss_of=self.loss_of)

    def missing(self) -> str:
        """The package that it lacks here, or an empty string."""
        return self.needs if self.needs and importlib.util.find_spec(self.needs) is None else ""


def waves(*shape: int) -> Tensor:
    """Deterministic values in (-1, 1), no two rows alike."""
    count = torch.Size(shape).numel()
    return torch.linspace(-2, 2, count).mul(7.3).sin().reshape(shape)
