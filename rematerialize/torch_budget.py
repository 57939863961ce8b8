"""Torch's own budget, as something that can do a step.

`activation_memory_budget` (a ratio of the bytes saved at the end of the forward, per graph) is taken as its
partitioner alone: Dynamo, AOTAutograd, min-cut with the knapsack, and a compiler that runs the two graphs as they are.
No Inductor, so that only plans are compared and not kernels; no decompositions, because undecomposed graphs run faster
this way.
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

from rematerialize import torch_private as private
from rematerialize.harness import Stepper

TORCH_BUDGETS = (0.5, 0.2, 0.1, 0.0)
_MANY_VARIANTS = 64  # every budget compiles the same code again; Dynamo's default limit is 8


class PeerError(RuntimeError):
    """A peer that can't run this model; the message is the reason, on one line."""


def one_line(error: BaseException, *, width: int = 160) -> str:
    """Return the exception's class and the first telling line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= width else text[: width - 3] + "..."


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
    return {
        node.name for node in graph.nodes if node.op == "call_function" and private.returns_new_tensors(node.target)
    }


def _partition(record: Partitions, joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
    forward, backward = private.min_cut_partition(joint, inputs, **kwargs)
    first, second = _kernel_names(forward.graph), _kernel_names(backward.graph)
    record.graphs += 1
    record.forward_ops += len(first)
    record.recomputed_ops += len(first & second)
    return forward, backward


@contextlib.contextmanager
def _without_mkldnn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the switch warns about GPUs of another make
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@contextlib.contextmanager
def _compiling(budget: float, *, mkldnn: bool) -> Iterator[None]:
    logging.getLogger("torch._functorch.partitioners").setLevel(logging.ERROR)
    with (
        private.compiling_under(budget, variants=_MANY_VARIANTS),
        contextlib.nullcontext() if mkldnn else _without_mkldnn(),
    ):
        yield


def _compiled(plain: Stepper, budget: float, *, whole_graph: bool, mkldnn: bool) -> Stepper:
    """Compile by doing two steps under the budget; the backward's graph is made in the first."""
    record = Partitions()
    backend = private.backend_of_partitions(functools.partial(_partition, record))
    compiled = torch.compile(plain.module, backend=backend, fullgraph=whole_graph, dynamic=False)
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


def compiled_under(make: Callable[[], Stepper], budget: float) -> Stepper:
    """Return a model compiled under torch's own `activation_memory_budget`.

    Tries the whole graph first, then without oneDNN (its fused LSTM saves a None that AOTAutograd
    refuses), then with graph breaks, and notes what it took.

    Parameters
    ----------
    make : callable
        Returns the plain stepper, with a module of its own: called once per attempt.
    budget : float
        From 0 (keep little) to 1.

    Raises
    ------
    PeerError
        When none of these runs a step; the reason is that of the first attempt.
    """
    reasons = []
    for whole_graph, mkldnn in ((True, True), (True, False), (False, True)):
        try:
            return _compiled(make(), budget, whole_graph=whole_graph, mkldnn=mkldnn)
        except Exception as error:  # whatever torch's stack raises is this peer's answer
            reasons.append(one_line(error))
    raise PeerError(reasons[0])
