"""How a model runs each of its natural blocks: as it is, or under torch's own activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint


def plain(block: Callable[..., Any], *args: Any) -> Any:
    """Run the block as it is."""
    return block(*args)


def checkpointed(block: Callable[..., Any], *args: Any) -> Any:
    """Run the block under torch's activation checkpointing, as its documentation recommends."""
    return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
