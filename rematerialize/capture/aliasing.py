"""Which node of a traced graph looks at which storage.

Aliasing is read off the storages of the fake tensors in ``meta["val"]``, never off op schemas:
``aten._unsafe_view`` aliases its input although its schema doesn't say so.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rematerialize import torch_private as private


@dataclass(frozen=True, slots=True)
class Aliases:
    """Storage names by node.

    Attributes
    ----------
    of : dict
        Node to the names of the storages that its value looks at, one per tensor of the value.
    created : dict
        Node to the (output index, storage name) pairs that it allocates; views allocate nothing.
    size_bytes : dict
        Storage name to its size by the fake tensors.
    origin : dict
        Storage name to the node that allocates it (an op, or a placeholder or attribute).
    """

    of: dict[fx.Node, tuple[str, ...]]
    created: dict[fx.Node, tuple[tuple[int, str], ...]]
    size_bytes: dict[str, int]
    origin: dict[str, fx.Node]

    def single(self, node: fx.Node) -> str:
        """The storage of a node whose value is one tensor."""
        (name,) = self.of[node]
        return name


def tensors_of(value: Any) -> list[tuple[int, Tensor]]:
    """The tensors in a node's value with their output index (0 for a single tensor)."""
    if isinstance(value, Tensor):
        return [(0, value)]
    if isinstance(value, (tuple, list)):
        return [(i, item) for i, item in enumerate(value) if isinstance(item, Tensor)]
    return []


def find_aliases(graph: fx.Graph) -> Aliases:
    """Walk a graph in order; a storage belongs to the first node that shows it. Linear in the graph."""
    found = Aliases({}, {}, {}, {})
    name_of: dict[int, str] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        tensors = tensors_of(node.meta.get("val"))
        created = []
        for index, tensor in tensors:
            key = private.storage_key(tensor)
            if key not in name_of:
                several = isinstance(node.meta["val"], (tuple, list))
                name_of[key] = f"{node.name}.{index}" if several else node.name
                found.size_bytes[name_of[key]] = tensor.untyped_storage().nbytes()
                found.origin[name_of[key]] = node
                created.append((index, name_of[key]))
        found.of[node] = tuple(name_of[private.storage_key(tensor)] for _, tensor in tensors)
        found.created[node] = tuple(created)
    return found


def is_view(node: fx.Node, aliases: Aliases) -> bool:
    """A call that allocates nothing and has no effect: it can be repeated wherever it is needed."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    return not aliases.created[node] and bool(aliases.of[node]) and not is_mutable(node)


def is_mutable(node: fx.Node) -> bool:
    """Does it write to one of its arguments?"""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Does it draw from a generator? Attention kernels carry the tag and draw only with dropout."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    if "dropout_p" in names:
        position = names.index("dropout_p")
        given = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
        return bool(given != 0.0)
    return True


def phase_of(node: fx.Node) -> str:
    """An op's phase is where it stands in the trace: much of the backward doesn't depend on tangents."""
    return "backward" if node.meta.get("partitioner_tag") == "is_backward" else "forward"
