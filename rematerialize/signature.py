"""The signature of a call: everything that a trace takes for granted. A new signature is a new plan."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from rematerialize import torch_private as private
from rematerialize.capture import FlatInputs, Hole
from rematerialize.drivers import refuse_drivers
from rematerialize.python_code import PLAIN
from rematerialize.python_state import PythonState, fingerprint, python_state


def signature(model: nn.Module, inputs: FlatInputs) -> tuple[Hashable, PythonState]:
    """Everything that a trace takes for granted: layouts, gradients, modes, parts, precision settings, Python values.

    Python values apart, as `python_state` returns them: a change of theirs has a name to tell.

    Computed at every call: linear in the modules and tensors, a few microseconds each.
    """
    numbers: dict[int, int] = {}
    tensors: list[Tensor] = list(inputs.tensors)
    modules = _modules(model)
    try:
        parts = [_part(module, module is model, numbers, tensors) for module in modules]
    except KeyError:
        refuse_drivers(model)  # parts that torch.jit made have no table of their own
        raise
    layouts = [
        (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_leaf, t.is_conj(), t.is_neg()) for t in tensors
    ]
    constants = [leaf if isinstance(leaf, Hole) else fingerprint(leaf) for leaf in inputs.leaves]
    # Of inputs only: libraries mark parameters in their own ways.
    marks = tuple([(at, fingerprint(vars(t))) for at, t in enumerate(inputs.tensors) if vars(t)])
    own = vars(model).get("forward")
    state = python_state(modules, getattr(own, "own_forward", own))
    return (inputs.spec, tuple(constants), tuple(layouts), marks, _shared(tensors), tuple(parts), _modes()), state


def _shared(tensors: list[Tensor]) -> Hashable:
    """Which of the tensors share memory, and where in it they begin: a write into one of them is seen in the others."""
    first: dict[int, int] = {}
    found = []
    for at, tensor in enumerate(tensors):
        if tensor.layout is not torch.strided:
            continue
        other = first.setdefault(private.storage_key(tensor), at)
        if other != at and tensors[other] is not tensor:
            found.append((other, at, tensors[other].storage_offset(), tensor.storage_offset()))
    return tuple(found)


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
_PLAIN_TYPES = PLAIN | {torch.Generator}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TORCH_OWN = frozenset(vars(nn.Module()))


def _part(module: nn.Module, outer: bool, numbers: dict[int, int], tensors: list[Tensor]) -> Hashable:
    """What a trace bakes in of one module: itself, its mode, plain attributes, ties, hooks of inner modules."""
    own = vars(module)
    members = [t for t in (*own["_parameters"].values(), *own["_buffers"].values()) if t is not None]
    plain: list[tuple[str, type, object]] = []
    for name, value in own.items():  # in one pass: this is where a call's checks spend their time
        if name in _TORCH_OWN:
            continue
        kind = type(value)
        if kind in _PLAIN_TYPES:
            plain.append((name, kind, value))
        elif isinstance(value, Tensor) and value.grad_fn is None:
            members.append(value)
    tensors.extend(members)
    ties = tuple([numbers.setdefault(id(member), len(numbers)) for member in members])
    hooks = () if outer else tuple([number for table in _HOOKS for number in own[table]])
    return (id(module), own["training"], tuple(plain), ties, hooks)


def _modes() -> Hashable:
    autocast = [
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    ]
    cached = torch.is_autocast_cache_enabled() if autocast else None
    return (tuple(autocast), cached, tuple(private.numeric_settings().values()), private.global_module_hooks())
