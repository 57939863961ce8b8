"""Where ops and storages come from, in the user's words: source lines, module names, tensor shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

from rematerialize.capture.aliasing import phase_of, tensors_of
from rematerialize.capture.kernels import KernelGraph


class Places:
    """The user's line and module of every node; a backward node has those of the forward op that it belongs to.

    Autograd numbers its nodes, and the trace notes the number on what the forward op and its formula call; the sum of
    two gradients has a number of its own, and takes after its first input.
    """

    def __init__(self, graph: fx.Graph, module_names: Mapping[nn.Module, str]) -> None:
        self._names = module_names
        self._forward: dict[int, tuple[str, str]] = {}
        for node in graph.nodes:
            if node.op == "call_function" and phase_of(node) == "forward" and "seq_nr" in node.meta:
                place = self._own(node)
                if any(place):  # the first: what runs afterwards without a number of its own has that one, too
                    self._forward.setdefault(node.meta["seq_nr"], place)

    def of(self, node: fx.Node) -> tuple[str, str]:
        """Source line and module name, "" where unknown."""
        for _ in range(3):
            place = self._own(node)
            if any(place):
                return place
            if node.meta.get("seq_nr") in self._forward:
                return self._forward[node.meta["seq_nr"]]
            if not node.all_input_nodes:
                break
            node = node.all_input_nodes[0]
        return ("", "")

    def _own(self, node: fx.Node) -> tuple[str, str]:
        return node.meta.get("source", ""), self._names.get(node.meta.get("module"), "")  # type: ignore[arg-type]


def labels(graph: KernelGraph, primal_names: Sequence[str]) -> dict[str, str]:
    """Storage name to "name dtype[shape]", of the first tensor that looks at it; the name only of primals."""
    joint = graph.normal.joint
    found: dict[str, str] = {}
    for node, name in zip(joint.primals, primal_names, strict=False):
        for storage in graph.storages([node]):
            found.setdefault(storage, f"{name} {layout(node.meta['val'])}")
    for gradient, name in zip(joint.gradients, primal_names, strict=False):
        if gradient is not None:
            for storage in graph.storages([gradient]):
                found.setdefault(storage, f"gradient of {name} {layout(gradient.meta['val'])}")
    for node in joint.graph.nodes:
        names = graph.storage_of.get(node, ())
        if names and not found.keys() >= set(names):
            values = [tensor for _, tensor in tensors_of(node.meta["val"])]
            if len(values) == len(names):
                for storage, value in zip(names, values, strict=True):
                    found.setdefault(storage, layout(value))
    return found


def layout(value: Tensor) -> str:
    """Dtype and shape: "float32[8, 1024]"."""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
