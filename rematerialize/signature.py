"""The signature of a call: everything that a trace takes for granted. A new signature is a new plan."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from rematerialize.capture import FlatInputs


def signature(model: nn.Module, inputs: FlatInputs) -> Hashable:
    """Everything that a trace takes for granted: layouts, gradients, modes, precision settings."""
    modules = tuple(model.modules())
    tensors: list[Tensor] = list(inputs.tensors)
    for module in modules:
        tensors.extend(p for p in module._parameters.values() if p is not None)
        tensors.extend(b for b in module._buffers.values() if b is not None)
    layouts = tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)
    constants = tuple(_hashable(leaf) for leaf in inputs.leaves)
    training = tuple(module.training for module in modules)
    return (inputs.spec, constants, layouts, training, _modes(tensors), _parts(model))


def _hashable(leaf: Any) -> Hashable:
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return (type(leaf), leaf)


def _modes(tensors: list[Tensor]) -> Hashable:
    devices = sorted({tensor.device.type for tensor in tensors})
    autocast = tuple(
        (device, torch.get_autocast_dtype(device)) for device in devices if torch.is_autocast_enabled(device)
    )
    return (
        autocast,
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


_PLAIN_TYPES = frozenset({int, float, bool, str, type(None)})
_TORCH_OWN = frozenset({"training", "_is_full_backward_hook"})


def _parts(model: nn.Module) -> Hashable:
    """What a trace bakes in besides layouts: modules, ties, plain attributes, hooks of inner modules.

    Linear in the modules: three microseconds each.
    """
    numbers: dict[int, int] = {}
    parts: list[Hashable] = []
    for module in model.modules():
        own = vars(module)
        parts.append(id(module))
        parts.append(tuple([(k, v) for k, v in own.items() if type(v) in _PLAIN_TYPES and k not in _TORCH_OWN]))
        members = (*own["_parameters"].values(), *own["_buffers"].values())
        parts.append(tuple([numbers.setdefault(id(member), len(numbers)) for member in members]))
        if module is not model:
            parts.append((*own["_forward_pre_hooks"], *own["_forward_hooks"], *own["_backward_hooks"]))
    return tuple(parts)
