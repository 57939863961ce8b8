"""What a step spends on views: they allocate nothing, are rebuilt next to their users, and take time all the same.

A fifth of a graph network's step, where tensors are small. On CUDA the device doesn't wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import fx

from rematerialize.capture import Kernel, KernelCost, KernelGraph
from rematerialize.capture.aliasing import tensors_of


def view_kernels(graph: KernelGraph) -> dict[str, list[Kernel]]:
    """The views that the emitted calls of each kernel need, by the kernel's name: each view as a kernel to be timed.

    As `emit` rebuilds them: once in the forward and once in the backward, before their first user. Those that a
    gradient or an output is seen through belong to the kernel that makes it.
    """
    found: dict[str, list[Kernel]] = {}
    built: dict[str, set[fx.Node]] = {"forward": set(), "backward": set()}
    for kernel in graph.kernels:
        read = [source for call, _ in kernel.calls for source in call.all_input_nodes]
        found[kernel.name] = list(_views(graph, read, kernel.phase, built[kernel.phase]))
    joint = graph.normal.joint
    for phase, results in (("forward", joint.outputs), ("backward", joint.gradients)):
        for node in results:
            if node is not None and (maker := _maker(graph, node)) is not None:
                found[maker.name] += _views(graph, [node], phase, built[phase])
    return found


def with_views(costs: Mapping[str, KernelCost], views: Mapping[str, list[Kernel]]) -> dict[str, KernelCost]:
    """Costs by kernel name, the time of a kernel's views in it."""
    return {
        name: replace(cost, time_s=cost.time_s + sum(costs[view.name].time_s for view in views[name]))
        for name, cost in costs.items()
        if name in views
    }


def _views(graph: KernelGraph, nodes: list[fx.Node], phase: str, built: set[fx.Node]) -> Iterator[Kernel]:
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in built or node in graph.makers or node.op != "call_function":
            continue
        built.add(node)
        todo += node.all_input_nodes
        if all(tensor.device.type == "cpu" for _, tensor in tensors_of(node.meta["val"])):
            yield Kernel(f"{node.name} of {phase}", phase, [(node, None)], [], [])


def _maker(graph: KernelGraph, node: fx.Node) -> Kernel | None:
    """The kernel that makes what a view looks at; None for one of a parameter or an input."""
    while node not in graph.makers:
        if node.op != "call_function" or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return graph.makers[node]
