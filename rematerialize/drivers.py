"""What others do to a model's forward: drivers (compilers, data parallelism) are refused, wrappers looked through."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from rematerialize import torch_private as private
from rematerialize.errors import RematerializeError


def refuse_drivers(model: object) -> None:
    """Refuse a model that something else drives, or whose parts are sharded.

    Raises
    ------
    RematerializeError
    """
    if isinstance(model, torch.jit.ScriptModule) or private.is_compiled(model):
        how = "torch.jit" if isinstance(model, torch.jit.ScriptModule) else "torch.compile"
        raise RematerializeError(
            f"this is what {how} made of a model, which runs code of its own: wrap the model itself instead of it"
        )
    if isinstance(model, nn.Module):
        _refuse_parallel(model)


def _refuse_parallel(model: nn.Module) -> None:
    # Only a process that has imported it can have sharded anything, and importing it takes long.
    sharding = sys.modules.get("torch.distributed.fsdp")
    for name, part in model.named_modules():
        who = f"the model's part {name!r} is" if name else "this model is"
        if isinstance(part, nn.parallel.DistributedDataParallel):
            raise RematerializeError(
                f"{who} driven by DistributedDataParallel: wrap what it holds, as "
                "DistributedDataParallel(rematerialize.wrap(model, ...))"
            )
        if name and isinstance(part, torch.jit.ScriptModule):
            raise RematerializeError(
                f"{who} what torch.jit (script or trace) made of a module, into which a trace can't look: use the "
                "module itself"
            )
        if isinstance(part, nn.DataParallel):
            raise RematerializeError(
                f"{who} copied by DataParallel at every step, which no plan can follow: use "
                "DistributedDataParallel(rematerialize.wrap(model, ...)), one process for each device"
            )
        if sharding is None:
            continue
        if isinstance(part, sharding.FullyShardedDataParallel):
            raise RematerializeError(
                f"{who} sharded by FullyShardedDataParallel, whose parameters are views made anew at every step: use "
                "fully_shard(rematerialize.wrap(part, ...))"
            )
        if name and isinstance(part, sharding.FSDPModule):
            raise RematerializeError(
                f"{who} sharded by fully_shard, which gathers its parameters while the forward runs: wrap the parts "
                "instead of the whole, as fully_shard(rematerialize.wrap(part, ...))"
            )


def planned_forward(module: nn.Module) -> Any:
    """Return the forward that ``wrap`` put into a module, None if it didn't.

    Others may have put theirs around it (accelerate does for mixed precision), or have bound it as a method.
    """
    forward = vars(module).get("forward")
    while forward is not None and not getattr(type(forward), "is_rematerialized", False):
        forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
    return forward
