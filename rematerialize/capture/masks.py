"""Random masks at one byte per element: a variant of a normalized step that draws, keeps and casts them apart.

Dropout on the CPU draws zeros and ones of the activation's type. They cost more to draw again than most ops of a step,
and four bytes each to keep. As bytes they take a quarter, and a cast brings the same numbers back; whether draws, mask
or neither is kept for the backward is then the solvers' choice. (Keeping such masks in fewer bits is the lossless part
of Jain et al., "Gist", ISCA 2018.) Bytes and not booleans: torch casts those eight times as slowly.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from rematerialize.capture.aliasing import phase_of
from rematerialize.capture.kernels import KernelGraph
from rematerialize.capture.normalize import NormalGraph, drop_dead
from rematerialize.capture.random import bernoulli_as

aten = torch.ops.aten
_PROBED = 1 << 16  # elements: enough for several threads
_NOT_OF_A_CAST = ("val", "recompute")  # what a policy of checkpointing saves of a mask are its draws


def draw_bytes(
    shape: Sequence[int],
    stride: Sequence[int],
    p: float,
    *,
    dtype: torch.dtype,
    device: torch.device,
    direct: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What `bernoulli_` draws for a tensor of a type and layout, as bytes in the same layout.

    ``direct``: without a tensor of that type in between, where `drawn_alike` allows it.
    """
    fresh = torch.empty_strided(shape, stride, dtype=torch.uint8 if direct else dtype, device=device)
    return fresh.bernoulli_(p, generator=generator).to(torch.uint8)


draw_bytes.tags = (torch.Tag.nondeterministic_seeded,)  # type: ignore[attr-defined]


@functools.cache
def drawn_alike(dtype: torch.dtype) -> bool:
    """Whether the CPU draws the same for bytes: torch does so today, and doesn't promise it."""
    ways = []
    for kind in (dtype, torch.uint8):
        own = torch.Generator("cpu").manual_seed(1)
        plain = torch.empty(_PROBED, dtype=kind, device="cpu").bernoulli_(0.3, generator=own)
        turned = torch.empty(_PROBED // 64, 64, dtype=kind, device="cpu").t().bernoulli_(0.9, generator=own)
        ways.append((plain.to(torch.uint8), turned.to(torch.uint8), own.get_state()))
    return all(torch.equal(one, other) for one, other in zip(*ways, strict=True))


def saved_bytes(kernels: KernelGraph) -> int:
    """How many bytes smaller the masks of a step are as bytes."""
    return sum(_bytes(node) - node.meta["val"].numel() for node in _masks(kernels.normal.joint.graph))


def with_byte_masks(normal: NormalGraph) -> NormalGraph:
    """Copy a normalized graph; the copy draws bytes, and casts them for whoever reads the mask."""
    joint = normal.joint
    graph = fx.Graph()
    masks = set(_masks(joint.graph))
    copies: dict[fx.Node, fx.Node] = {}
    for node in joint.graph.nodes:
        copies[node] = _drawn(graph, node, copies) if node in masks else graph.node_copy(node, copies.__getitem__)
    copied = NormalGraph(
        replace(
            joint,
            graph=graph,
            primals=tuple(copies[node] for node in joint.primals),
            tangents=tuple((copies[node], position) for node, position in joint.tangents),
            outputs=tuple(node and copies[node] for node in joint.outputs),
            gradients=tuple(node and copies[node] for node in joint.gradients),
        ),
        tuple(copies[node] for node in normal.effects),
        {copies[node]: tuple(copies[primal] for primal in primals) for node, primals in normal.written.items()},
    )
    drop_dead(copied)  # what the draws were filled into: nobody reads it now
    return copied


def _masks(graph: fx.Graph) -> Iterator[fx.Node]:
    """Draws of the forward whose type is larger than a byte, dense so that a cast keeps the layout.

    What nobody reads is drawn for the generator's state alone: it has nothing to cast.
    """
    for node in graph.nodes:
        if node.target is bernoulli_as and node.users and phase_of(node) == "forward":
            value = node.meta["val"]
            if value.element_size() > 1 and value.numel() and _bytes(node) == value.untyped_storage().nbytes():
                yield node


def _bytes(node: fx.Node) -> int:
    value: Tensor = node.meta["val"]
    return value.numel() * value.element_size()


def _drawn(graph: fx.Graph, mask: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    value: Tensor = mask.meta["val"]
    kwargs = {name: copies[given] if isinstance(given, fx.Node) else given for name, given in mask.kwargs.items()}
    direct = value.device.type == "cpu" and drawn_alike(value.dtype)
    kwargs |= {"dtype": value.dtype, "device": value.device, "direct": direct}
    draws = graph.create_node(
        "call_function",
        draw_bytes,
        (list(value.shape), list(value.stride()), mask.args[1]),
        kwargs,
        f"{mask.name}_draws",
    )
    draws.meta = {**mask.meta, "mask": mask}
    with value.fake_mode:  # type: ignore[attr-defined]
        draws.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=torch.uint8, device=value.device)
    cast = graph.create_node("call_function", aten._to_copy.default, (draws,), {"dtype": value.dtype}, mask.name)
    cast.meta = {name: told for name, told in mask.meta.items() if name not in _NOT_OF_A_CAST}
    cast.meta["val"] = value  # the very tensor, by whose storage the mask's views are known
    return cast
