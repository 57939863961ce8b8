"""The peers, each as something that can do a step: eager, per-block checkpointing, torch's budget.

Torch's `activation_memory_budget` (a ratio of the bytes saved at the end of the forward, per
graph) is taken as its partitioner alone: Dynamo, AOTAutograd, min-cut with the knapsack, and a
compiler that runs the two graphs as they are. No Inductor, so that only plans are compared and
not kernels; no decompositions, because undecomposed graphs run faster this way.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

import rematerialize as remat
from benchmarks.harness import Stepper
from benchmarks.models.spec import ModelSpec, Scale
from rematerialize.api import choose
from rematerialize.budget import read_budget

TORCH_BUDGETS = (0.5, 0.2, 0.1, 0.0)
_MANY_VARIANTS = 64  # every budget compiles the same code again; Dynamo's default limit is 8


class PeerError(RuntimeError):
    """A peer that can't run this model; the message is the reason, on one line."""


def one_line(error: BaseException, *, width: int = 160) -> str:
    """Return the exception's class and the first telling line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= width else text[: width - 3] + "..."


def eager(spec: ModelSpec, scale: Scale, *, seed: int = 0) -> Stepper:
    """Return the model as its author wrote it."""
    model, inputs = spec.build(scale, seed=seed)
    return Stepper(model, inputs, spec.loss_of)


def per_block(spec: ModelSpec, scale: Scale, *, seed: int = 0) -> Stepper:
    """Return the twin with `torch.utils.checkpoint` around each natural block.

    Raises
    ------
    PeerError
        When the model has no such twin.
    """
    if spec.per_block is None:
        raise PeerError(spec.per_block_reason)
    model, inputs = spec.build(scale, seed=seed, per_block=True)
    return Stepper(model, inputs, spec.loss_of)


@dataclass(slots=True)
class Partitions:
    """What torch's partitioner did: graphs with a backward, forward ops, ops run again there."""

    graphs: int = 0
    forward_ops: int = 0
    recomputed_ops: int = 0
    saved_bytes: list[int] = field(default_factory=list)

    def describe(self) -> str:
        return f"{self.graphs} graph(s), {self.recomputed_ops} of {self.forward_ops} forward ops recomputed"


def _kernel_names(graph: fx.Graph) -> set[str]:
    """Names of the calls that run a kernel, not of the views and tuple reads between them."""

    def runs(node: fx.Node) -> bool:
        target = node.target
        return (
            node.op == "call_function"
            and isinstance(target, torch._ops.OpOverload)
            and not any(arg.alias_info is not None for arg in target._schema.returns)
        )

    return {node.name for node in graph.nodes if runs(node)}


def _partition(record: Partitions, joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
    first, second = _kernel_names(forward.graph), _kernel_names(backward.graph)
    record.graphs += 1
    record.forward_ops += len(first)
    record.recomputed_ops += len(first & second)
    return forward, backward


def _backend(record: Partitions) -> Callable[..., Any]:
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    backend: Callable[..., Any] = aot_autograd(
        fw_compiler=boxed_nop, bw_compiler=boxed_nop, partition_fn=functools.partial(_partition, record)
    )
    return backend


@contextlib.contextmanager
def _without_mkldnn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the switch warns about GPUs of another make
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@contextlib.contextmanager
def _compiling(budget: float, *, mkldnn: bool) -> Iterator[None]:
    functorch_config, dynamo_config = torch._functorch.config, torch._dynamo.config
    logging.getLogger("torch._functorch.partitioners").setLevel(logging.ERROR)
    with (
        functorch_config.patch(activation_memory_budget=budget),
        dynamo_config.patch(
            allow_rnn=True,
            trace_autograd_ops=True,
            recompile_limit=_MANY_VARIANTS,
            accumulated_recompile_limit=100 * _MANY_VARIANTS,
            automatic_dynamic_shapes=False,
        ),
        contextlib.nullcontext() if mkldnn else _without_mkldnn(),
    ):
        yield


def _compiled(plain: Stepper, budget: float, *, whole_graph: bool, mkldnn: bool) -> Stepper:
    """Compile by doing two steps under the budget; the backward's graph is made in the first."""
    record = Partitions()
    compiled = torch.compile(plain.module, backend=_backend(record), fullgraph=whole_graph, dynamic=False)

    stepper = replace(plain, call=compiled)
    with _compiling(budget, mkldnn=mkldnn):
        for _ in range(2):
            stepper.step(seed=0)
    if record.graphs == 0:
        raise PeerError("torch.compile captured no graph with a backward")
    made = record.graphs
    stepper.step(seed=0)
    if record.graphs != made:
        raise PeerError("torch.compile compiled again without its budget")
    notes = [record.describe()]
    notes += [] if whole_graph else ["graph breaks"]
    notes += [] if mkldnn else ["mkldnn off"]
    return replace(stepper, note=", ".join(notes))


def torch_budget(spec: ModelSpec, scale: Scale, budget: float, *, seed: int = 0) -> Stepper:
    """Return the model compiled under torch's own `activation_memory_budget`.

    Tries the whole graph first, then without oneDNN (its fused LSTM saves a None that AOTAutograd
    refuses), then with graph breaks, and notes what it took.

    Raises
    ------
    PeerError
        When none of these runs a step; the reason is that of the first attempt.
    """
    reasons = []
    for whole_graph, mkldnn in ((True, True), (True, False), (False, True)):
        plain = eager(spec, scale, seed=seed)
        try:
            return _compiled(plain, budget, whole_graph=whole_graph, mkldnn=mkldnn)
        except Exception as error:  # whatever torch's stack raises is this peer's answer
            reasons.append(one_line(error))
    raise PeerError(reasons[0])


class Ours:
    """One model captured once, stepping under any number of plans of this package.

    All its steppers share the module: what one step does to its buffers, the next one finds.
    """

    def __init__(self, spec: ModelSpec, scale: Scale, *, seed: int = 0) -> None:
        self.loss_of = spec.loss_of
        self.module, self.inputs = spec.build(scale, seed=seed)
        self.store_all = remat.plan(self.module, self.inputs, activation_budget="100%")

    def plan(self, activation_budget: int | str) -> remat.Plan:
        """Return the plan for a budget; "minimum" is the smallest that works."""
        prepared = self.store_all.prepared
        assert prepared is not None
        minimum = activation_budget == "minimum"
        asked = self.store_all.minimum_bytes if minimum else activation_budget
        return choose(self.module, prepared, read_budget(None, asked))

    def stepper(self, activation_budget: int | str | remat.Plan) -> Stepper:
        """Return the step under a budget or a plan."""
        given = activation_budget
        plan = given if isinstance(given, remat.Plan) else self.plan(given)
        wrapped = remat.wrap(self.module, plan=plan, example_inputs=self.inputs)
        planned_forward = wrapped.forward
        remat.unwrap(self.module)
        return Stepper(self.module, self.inputs, self.loss_of, planned_forward)
