"""Activation checkpointing as people place it: around each repeated block, by a rule that knows nothing of a model.

The rule: a block is a module with parts. An ``nn.ModuleList`` or ``nn.Sequential`` repeats if two of its children are
blocks of one class; each of its blocks is wrapped in `torch.utils.checkpoint` (not reentrant). Of containers inside
one another the innermost that repeats is meant: the layers of a stage rather than the stages. Where no blocks repeat,
single layers count as blocks, and the outermost container is meant.
A model of transformers has a switch of its own, which is used instead.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch.utils.checkpoint
from torch import nn

from rematerialize.errors import TargetError


def checkpoint_blocks(model: nn.Module) -> str:
    """Put activation checkpointing into a model, in place, and say where.

    Raises
    ------
    TargetError
        If nothing in it repeats.

    Examples
    --------
    >>> stage = nn.Sequential(*[nn.TransformerEncoderLayer(8, 2) for _ in range(3)])
    >>> checkpoint_blocks(nn.Sequential(nn.Linear(8, 8), stage))
    '3 blocks in 1'
    """
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is not None and getattr(model, "supports_gradient_checkpointing", False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer releases have another name for it
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return "transformers' own"
    containers = _containers(model)
    if not containers:
        raise TargetError("no nn.ModuleList or nn.Sequential with two children of one class")
    for blocks in containers.values():
        for block in blocks:
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    places = ", ".join(name or "the model itself" for name in containers)
    return f"{sum(map(len, containers.values()))} blocks in {places}"


def _containers(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Names of the containers to look at, and their blocks."""
    named = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))
    }
    repeating = {name: found for name, module in named.items() if (found := _repeated(module, leaves=False))}
    if repeating:
        return {name: found for name, found in repeating.items() if not _any_inside(name, repeating)}
    repeating = {name: found for name, module in named.items() if (found := _repeated(module, leaves=True))}
    return {name: found for name, found in repeating.items() if not any(_inside(name, other) for other in repeating)}


def _repeated(container: nn.Module, *, leaves: bool) -> list[nn.Module]:
    """The blocks of a container if two of them are of one class, else nothing."""
    blocks = [child for child in container.children() if leaves or any(True for _ in child.children())]
    kinds = Counter(type(block) for block in blocks)
    return blocks if max(kinds.values(), default=0) >= 2 else []


def _any_inside(name: str, others: Iterable[str]) -> bool:
    return any(_inside(other, name) for other in others)


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))
