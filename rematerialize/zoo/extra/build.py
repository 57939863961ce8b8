"""What the factories of the extra share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Sizes = dict[str, int]


def loss_of_output(outputs: Any) -> Tensor:
    """Return the loss of a dict-like output, or the output when it is the loss itself."""
    loss = outputs if isinstance(outputs, Tensor) else outputs["loss"]
    assert isinstance(loss, Tensor)
    return loss
