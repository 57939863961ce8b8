"""A module and a call of it as flat tensors, and the way back: what a trace is a function of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rematerialize import torch_private as private


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where a parameter, buffer or plain tensor attribute lives: ``kind`` is "parameter", "buffer" or
    "attribute", ``owner`` the module that holds it under ``attribute``, ``name`` its qualified name.
    """

    kind: str
    name: str
    owner: nn.Module
    attribute: str

    def read(self) -> Tensor:
        value: Tensor = getattr(self.owner, self.attribute)
        return value


@dataclass(frozen=True, slots=True)
class FlatInputs:
    """A call's arguments, flattened: ``tensors`` in order, and what is needed to build the call again.

    ``leaves`` holds an index into ``tensors`` (as ``Hole``) or the constant itself.
    """

    tensors: tuple[Tensor, ...]
    leaves: tuple[Any, ...]
    spec: private.TreeSpec

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = [tensors[leaf.index] if isinstance(leaf, Hole) else leaf for leaf in self.leaves]
        args, kwargs = private.tree_unflatten(leaves, self.spec)
        return args, kwargs


@dataclass(frozen=True, slots=True)
class Hole:
    """Stands for the tensor of that index among the leaves of a call's arguments, or of its result."""

    index: int


def primal_names(slots: Sequence[TensorSlot], inputs: int) -> list[str]:
    """Return what people call the primals: qualified names, then "input 0" and so on."""
    return [slot.name for slot in slots] + [f"input {i}" for i in range(inputs)]


def flatten_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> FlatInputs:
    """Flatten a call's arguments; a tensor that is passed twice is one tensor."""
    flat, spec = private.tree_flatten((tuple(args), dict(kwargs)))
    tensors: list[Tensor] = []
    seen: dict[int, int] = {}
    leaves: list[Any] = []
    for leaf in flat:
        if not isinstance(leaf, Tensor):
            leaves.append(leaf)
            continue
        if id(leaf) not in seen:
            seen[id(leaf)] = len(tensors)
            tensors.append(leaf)
        leaves.append(Hole(seen[id(leaf)]))
    return FlatInputs(tuple(tensors), tuple(leaves), spec)


def tensor_slots(model: nn.Module) -> tuple[TensorSlot, ...]:
    """Return every parameter, buffer and plain tensor attribute of a module tree, tied ones once, in a fixed order."""
    slots: list[TensorSlot] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        groups = (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("attribute", {k: v for k, v in vars(module).items() if isinstance(v, Tensor) and v.grad_fn is None}),
        )
        for kind, members in groups:
            for attribute, value in members.items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    slots.append(TensorSlot(kind, name, module, attribute))
    order = {"parameter": 0, "buffer": 1, "attribute": 2}
    return tuple(sorted(slots, key=lambda slot: order[slot.kind]))


def homes_of(model: nn.Module, slots: Sequence[TensorSlot]) -> list[tuple[nn.Module, str, int]]:
    """Return every place that holds one of the slots' tensors; tied tensors have several."""
    index_of = {id(slot.read()): i for i, slot in enumerate(slots)}
    homes = []
    for module in model.modules():
        members = {**vars(module), **module._parameters, **module._buffers}
        for attribute, value in members.items():
            if isinstance(value, Tensor) and id(value) in index_of:
                homes.append((module, attribute, index_of[id(value)]))
    return homes


def member(owner: nn.Module, attribute: str) -> Any:
    """Return what a module holds under a name of its own, None where it holds nothing."""
    for table in (owner._parameters, owner._buffers, vars(owner)):
        if attribute in table:
            return table[attribute]
    return None


class swapped:
    """Put flat values where the model keeps its tensors, and take them out again whatever happens."""

    def __init__(self, homes: Sequence[tuple[nn.Module, str, int]], flat: Sequence[Tensor]) -> None:
        self.homes = homes
        self.flat = flat
        self.saved: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        for owner, attribute, index in self.homes:
            for table in (owner._parameters, owner._buffers, vars(owner)):
                if attribute in table:
                    self.saved.append((table, attribute, table[attribute]))
                    table[attribute] = self.flat[index]  # type: ignore[assignment]
                    break

    def __exit__(self, *exc: object) -> None:
        for table, attribute, value in reversed(self.saved):
            table[attribute] = value
