"""Kernels and their costs -> the training graph that the solvers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rematerialize.capture.kernels import Kernel, KernelGraph
from rematerialize.capture.origins import Places, labels
from rematerialize.ir import Op, TrainingGraph

_CUDA_BLOCK = 512  # bytes: the caching allocator rounds every block up to a multiple


@dataclass(frozen=True, slots=True)
class KernelCost:
    """What one run of a kernel costs.

    Attributes
    ----------
    time_s : float
    transient_bytes : int
        Workspace beyond its inputs and outputs.
    output_bytes : mapping of int to int
        Real sizes of the allocating call's outputs, where they differ from what fake tensors say
        (oneDNN's LSTM workspace has no shape before it runs; a mean squared error keeps its elementwise buffer).
    """

    time_s: float
    transient_bytes: int = 0
    output_bytes: Mapping[int, int] = field(default_factory=dict)


def lower(
    graph: KernelGraph,
    costs: Mapping[str, KernelCost],
    *,
    module_names: Mapping[nn.Module, str] | None = None,
    primal_names: Sequence[str] = (),
) -> TrainingGraph:
    """Build the training graph.

    Parameters
    ----------
    graph : KernelGraph
    costs : mapping of str to KernelCost
        By kernel name; kernels that it lacks are free (saving a generator state).
    module_names : mapping of Module to str, optional
        Qualified names, for the ops' ``module``.
    primal_names : sequence of str
        What people call the primals, for the labels.

    Returns
    -------
    TrainingGraph
        Verified. Storages of parameters, buffers, inputs and constants are resident.
    """
    sizes = dict(graph.size_bytes)
    joint = graph.normal.joint
    places = Places(joint.graph, module_names or {})
    ops = []
    for kernel in graph.kernels:
        cost = costs.get(kernel.name, KernelCost(0.0))
        _correct_sizes(kernel, cost, sizes)
        ops.append(_op(kernel, cost, sizes, places))
    block = _CUDA_BLOCK if any(n.meta["val"].device.type == "cuda" for n in joint.primals) else 1
    fixed = [n for n in joint.graph.nodes if n.op in ("placeholder", "get_attr")]
    tangents = graph.storages([node for node, _ in joint.tangents])
    resident = frozenset(name for name in graph.storages(fixed) if name not in tangents)
    outputs = graph.storages([node for node in joint.outputs if node is not None])
    gradients = graph.storages([node for node in joint.gradients if node is not None])
    mentioned = {name for op in ops for name in (*op.inputs, *op.outputs)} | resident | set(tangents)
    training = TrainingGraph(
        ops=tuple(ops),
        storages={name: -(-size // block) * block for name, size in sizes.items() if name in mentioned},
        resident=resident,
        tangents=tuple(tangents),
        outputs=tuple(name for name in (*outputs, *graph.tokens_out) if name not in resident),
        gradients=tuple(gradients),
        labels={name: label for name, label in labels(graph, primal_names).items() if name in mentioned},
    )
    training.verify()
    return training


def _correct_sizes(kernel: Kernel, cost: KernelCost, sizes: dict[str, int]) -> None:
    for index, size in cost.output_bytes.items():
        for name in (f"{kernel.head.name}.{index}", kernel.head.name):
            if name in sizes and name in kernel.writes:
                sizes[name] = size


def _op(kernel: Kernel, cost: KernelCost, sizes: Mapping[str, int], places: Places) -> Op:
    without_calls = "rng_state" if kernel.rng_device else "autograd"
    target = " ".join(_target_name(node.target) for node, _ in kernel.calls) or without_calls
    source, module = places.of(kernel.head) if kernel.calls else ("", "")
    return Op(
        name=kernel.name,
        phase="forward" if kernel.phase == "forward" else "backward",
        time_s=cost.time_s,
        inputs=tuple(kernel.reads),
        outputs=tuple(kernel.writes),
        # A recomputed random op puts the generator's present state aside while it draws from the saved one.
        transient_bytes=cost.transient_bytes + (sizes[kernel.rng] if kernel.rng else 0),
        recomputable=kernel.phase == "forward" and not kernel.once,
        target=target,
        source=source,
        module=module,
    )


def _target_name(target: Any) -> str:
    """A name that is the same in every process: an ATen op's, or one of our functions'."""
    return getattr(target, "__name__", str(target)) if not hasattr(target, "_schema") else str(target)
