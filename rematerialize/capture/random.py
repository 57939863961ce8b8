"""In-place random fills, as eager does them.

Functionalization turns ``noise.bernoulli_(p)`` into ``bernoulli(noise, p)``, whose result is contiguous whatever
the layout of ``noise``: the same draws would land on other elements. The fill below keeps the layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from rematerialize import torch_private as private
from rematerialize.capture.aliasing import tensors_of
from rematerialize.capture.kernel_layouts import faking

aten = torch.ops.aten

_FACTORIES = frozenset(
    {
        aten.empty_like.default,
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.full.default,
        aten.full_like.default,
        aten.zeros.default,
        aten.zeros_like.default,
        aten.ones.default,
        aten.ones_like.default,
    }
)


_NEEDS_LAYOUT = frozenset({aten.view.default, aten._unsafe_view.default})


def bernoulli_as(like: Tensor, p: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Bernoulli draws in the layout of ``like``, consumed in the order in which ``bernoulli_`` consumes them."""
    fresh = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return fresh.bernoulli_(p, generator=generator)


bernoulli_as.tags = (torch.Tag.nondeterministic_seeded,)  # type: ignore[attr-defined]


def fill_in_eager_layout(graph: fx.Graph) -> None:
    """Rewrite fills of fresh tensors, and correct the layouts of what is computed from them."""
    changed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is aten.bernoulli.p and node.kwargs.keys() <= {"generator"} and _is_fresh(node.args[0]):
            source = node.args[0].meta["val"]
            node.target = bernoulli_as
            if source.stride() != node.meta["val"].stride():
                node.meta["val"] = computed(node)
                changed.add(node)
        elif any(source in changed for source in node.all_input_nodes):
            follow(node, changed)


def follow(node: fx.Node, changed: set[fx.Node]) -> None:
    """Correct the layout of a node whose inputs have changed theirs; it joins them if its own is another now."""
    traced = node.target
    value = computed(node)
    copies = node.target is not traced  # it was a view of what had another storage
    if copies or _layouts(value) != _layouts(node.meta["val"]) or _shares(value, node):
        node.meta["val"] = value
        changed.add(node)


def _is_fresh(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in _FACTORIES


def computed(node: fx.Node) -> Any:
    """What a node makes of its inputs as they are laid out now."""
    if node.target is private.getitem:
        source, index = node.args
        return source.meta["val"][index]  # type: ignore[union-attr]
    args = fx.node.map_arg(node.args, lambda source: source.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda source: source.meta["val"])
    mode = next(source.meta["val"] for source in node.all_input_nodes if hasattr(source.meta["val"], "fake_mode"))
    with faking(mode.fake_mode):
        if node.target in _NEEDS_LAYOUT:
            # Traced for another layout; reshape copies where eager's own reshape would have copied.
            try:
                return node.target(*args, **kwargs)
            except (RuntimeError, ValueError):
                node.target = aten.reshape.default
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _layouts(value: Any) -> list[tuple[Any, ...]]:
    return [(tensor.shape, tensor.stride()) for _, tensor in tensors_of(value)]


def _shares(value: Any, node: fx.Node) -> bool:
    """A view must follow its base to the base's new storage."""
    owners = {
        tensor.untyped_storage()._cdata
        for source in node.all_input_nodes
        for _, tensor in tensors_of(source.meta["val"])
    }
    return any(tensor.untyped_storage()._cdata in owners for _, tensor in tensors_of(value))
