"""The signature of a call: everything that a trace takes for granted. A new signature is a new plan."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from rematerialize import torch_private as private
from rematerialize.capture import FlatInputs


def signature(model: nn.Module, inputs: FlatInputs) -> Hashable:
    """Everything that a trace takes for granted: layouts, gradients, modes, parts, precision settings.

    Computed at every call: linear in the modules and tensors, a few microseconds each.
    """
    numbers: dict[int, int] = {}
    tensors: list[Tensor] = list(inputs.tensors)
    parts = [_part(module, module is model, numbers, tensors) for module in _modules(model)]
    layouts = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors]
    constants = [_hashable(leaf) for leaf in inputs.leaves]
    return (inputs.spec, tuple(constants), tuple(layouts), tuple(parts), _modes())


def _modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a tree, shared ones once; ``Module.modules`` also builds every name."""
    found = {id(model): model}
    todo = [model]
    for module in todo:
        for child in module._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                todo.append(child)
    return todo


# A generator counts as itself: the step draws from the object that the trace saw.
_PLAIN_TYPES = frozenset({int, float, bool, str, type(None), torch.Generator})
_TORCH_OWN = frozenset(vars(nn.Module()))


def _part(module: nn.Module, outer: bool, numbers: dict[int, int], tensors: list[Tensor]) -> Hashable:
    """What a trace bakes in of one module: itself, its mode, plain attributes, ties, hooks of inner modules."""
    own = vars(module)
    members = [t for t in (*own["_parameters"].values(), *own["_buffers"].values()) if t is not None]
    tensors.extend(members)
    ties = tuple([numbers.setdefault(id(member), len(numbers)) for member in members])
    plain = tuple([(k, v) for k, v in own.items() if k not in _TORCH_OWN and type(v) in _PLAIN_TYPES])
    hooks = () if outer else (*own["_forward_pre_hooks"], *own["_forward_hooks"], *own["_backward_hooks"])
    return (id(module), own["training"], plain, ties, hooks)


def _hashable(leaf: Any) -> Hashable:
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return (type(leaf), leaf)


def _modes() -> Hashable:
    autocast = [
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    ]
    return (tuple(autocast), tuple(private.numeric_settings().values()))
