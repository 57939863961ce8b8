"""A backward for when some outputs got no gradient: autograd leaves out what they alone lead to, and so does this.

Zeros in their place would be eager's gradients in most cases, not in all: zero times an infinite derivative is NaN,
and a parameter that only an unused output leads to would get zeros where eager leaves ``grad`` at None.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from rematerialize import torch_private as private

aten = torch.ops.aten

_SUMS = frozenset({aten.add.Tensor, aten.add_.Tensor})


def without_tangents(backward: fx.GraphModule, absent: Collection[int]) -> fx.GraphModule:
    """The backward that results when the tangents at some positions are absent.

    A backward is linear in its tangents: what depends on absent ones only is absent itself, a sum with an absent
    term is the other term, and any other op reads zeros for it, which is what autograd's own formulas do.

    Parameters
    ----------
    backward : fx.GraphModule
        An emitted backward, whose nodes carry their fake values.
    absent : collection of int
        Positions among its tangents. It takes the same list of arguments; what it gets there isn't read.

    Returns
    -------
    fx.GraphModule
        Returns None for gradients that depend on absent tangents only.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    results = graph.output(graph.graph_copy(backward.graph, copies))
    missing: set[fx.Node] = set()
    carrying: set[fx.Node] = set()
    tangents = [node for node in graph.nodes if node.op == "placeholder" and "tangent" in node.meta]
    missing.update(node for node in tangents if node.meta["tangent"] in absent)
    carrying.update(tangents)
    for node in list(graph.nodes):
        if node.op != "call_function" or carrying.isdisjoint(node.all_input_nodes):
            continue
        carrying.add(node)
        gone = [source for source in node.all_input_nodes if source in missing]
        if gone and missing.issuperset(source for source in node.all_input_nodes if source in carrying):
            missing.add(node)
        elif gone and not _without_term(graph, node, missing):
            for source in gone:
                with graph.inserting_before(node):
                    zeros = graph.call_function(zeros_as, _layout(source.meta["val"]))
                node.replace_input_with(source, zeros)
    results.args = fx.node.map_arg(results.args, lambda node: None if node in missing else node)
    _drop_unread(graph)
    graph.set_codegen(private.BoxedCodeGen())
    return fx.GraphModule(backward, graph)


def _without_term(graph: fx.Graph, node: fx.Node, missing: set[fx.Node]) -> bool:
    """A sum of two becomes its other term: a copy of it, where the sum would have had a storage of its own."""
    if node.target not in _SUMS or len(node.args) != 2 or node.kwargs:
        return False
    first, second = node.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        return False
    term = second if first in missing else first
    if _layout(term.meta["val"]) != _layout(node.meta["val"]):
        return False
    if term is first and node.target is aten.add_.Tensor:
        node.replace_all_uses_with(term)
        return True
    node.target, node.args = aten.clone.default, (term,)
    return True


def _layout(value: Tensor) -> tuple[Any, ...]:
    return (tuple(value.shape), tuple(value.stride()), value.dtype, value.device)


def zeros_as(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in a layout."""
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()


def _drop_unread(graph: fx.Graph) -> None:
    """Erase what nothing reads, and let go of arguments that nothing reads when the graph begins.

    What works on a generator stays: it has no value that anybody reads.
    """
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and node.meta.get("val") is not None:
            graph.erase_node(node)
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(arguments[-1]):
        for node in arguments:
            if not node.users:
                graph.call_function(let_go, (node,))


def let_go(_: Tensor) -> None:
    """The last use of an argument."""
