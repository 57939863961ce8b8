"""Values that follow from shapes and constants alone: Python may branch on them during a trace, as it does in eager.

A fake tensor has no values, so that ``if (positions[:, -1] == 0).all()`` stops a trace even where ``positions`` is an
arange. Every such value is a pure function of the captured shapes, which a plan is made for: it is computed when it is
asked for, and the branch that eager takes is the one that is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rematerialize import torch_private as private

MOST_ELEMENTS = 1 << 26  # of any tensor on the way: as many as a mask of 8,192 positions has
_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
_UNSET = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize")
_CALL = "_rematerialize_call"  # an attribute of fake tensors: the call that made them, if it made a known value

_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class KnownValues:
    """Follows the calls on fake tensors (see `torch_private.trace_joint`), and answers what reads a known value."""

    def __init__(self) -> None:
        # Storages that an op wrote to, by address: their values aren't those that made them. Held, or an address
        # would come again.
        self._written: dict[int, Any] = {}

    def __call__(self, run: Callable[[], Any], op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(op, torch._ops.OpOverload):
            return run()
        tensors = list(_tensors((args, kwargs)))
        if torch.Tag.data_dependent_output in op.tags and all(map(self._is_known, tensors)):
            with private.outside_of_modes():
                return _evaluate((op, args, kwargs))
        result = run()
        if op._schema.is_mutable:
            self._note_written(op, args, kwargs)
        elif isinstance(result, Tensor) and result.numel() <= MOST_ELEMENTS and _determined(op, tensors):
            held = tuple(one.clone() if op in _LIFTS and type(one) is Tensor else one for one in args)
            setattr(result, _CALL, (op, held, kwargs))
        return result

    def _note_written(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for at, argument in enumerate(op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[at] if at < len(args) else kwargs.get(argument.name)
                for tensor in _tensors(value):
                    storage = tensor.untyped_storage()
                    self._written[storage._cdata] = storage

    def _is_known(self, tensor: Tensor) -> bool:
        return hasattr(tensor, _CALL) and all(
            one.untyped_storage()._cdata not in self._written for one in _ancestors(tensor)
        )


def _determined(op: Any, tensors: list[Tensor]) -> bool:
    if torch.Tag.nondeterministic_seeded in op.tags or op.overloadpacket.__name__ in _UNSET:
        return False
    return op in _LIFTS or all(hasattr(tensor, _CALL) for tensor in tensors)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in private.tree_flatten(value)[0] if isinstance(leaf, Tensor))


def _ancestors(tensor: Tensor) -> Iterable[Tensor]:
    """A known fake tensor and all that it was made of, each after what it was made of."""
    found: dict[int, Tensor] = {}
    pending = [(tensor, False)]
    while pending:
        one, ready = pending.pop()
        if ready:
            found.setdefault(id(one), one)
        elif id(one) not in found and hasattr(one, _CALL):
            pending.append((one, True))
            pending += [(parent, False) for parent in _tensors(getattr(one, _CALL)[1:])]
    return found.values()


def _evaluate(call: _Call) -> Any:
    values: dict[int, Any] = {}

    def real(leaf: Any) -> Any:
        if isinstance(leaf, torch.device) and leaf.type == "cuda" and not torch.cuda.is_available():
            return torch.device("cpu")  # a plan for a device that isn't there
        return values.get(id(leaf), leaf)

    def computed(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        real_args, real_kwargs = private.tree_map(real, (args, kwargs))
        return op(*real_args, **real_kwargs)

    for read in _tensors(call[1:]):
        for one in _ancestors(read):
            if id(one) not in values:
                values[id(one)] = computed(*getattr(one, _CALL))
    return computed(*call)
