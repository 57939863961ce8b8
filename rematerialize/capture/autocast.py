"""Autocast casts a weight once per region, also while a step is traced.

Eager keeps the low-precision copy of every float32 leaf that autocast has cast until the outermost region ends: a
weight that is used again isn't cast again, and the gradients of its uses add up in the low precision. A trace's
parameters aren't leaves, so that torch's own cache passes them by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rematerialize import torch_private as private


class WeightCasts:
    """The casts of one model's parameters, for the calls of its forward in a trace."""

    def __init__(self, primals: Sequence[Tensor]) -> None:
        self.enabled = torch.is_autocast_cache_enabled()
        self.cached = [
            i
            for i, primal in enumerate(primals)
            if primal.requires_grad and primal.is_leaf and primal.dtype == torch.float32 and not primal._is_view()
        ]

    @contextlib.contextmanager
    def of_call(self, flat: Sequence[Tensor]) -> Iterator[None]:
        """Cast each of these traced stand-ins of the primals once until autocast ends."""
        weights = {id(flat[i]) for i in self.cached}
        found: dict[tuple[int, torch.dtype], Tensor] = {}

        def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
            if id(tensor) not in weights or not (torch.is_autocast_cache_enabled() and torch.is_grad_enabled()):
                return None
            if dtype != torch.get_autocast_dtype(tensor.device.type):
                return None
            key = (id(tensor), dtype)
            if key not in found:
                found[key] = private.cast_under_autograd(tensor, dtype)
            return found[key]

        with private.autocast_casts(cast, found.clear, enabled=self.enabled):
            yield
