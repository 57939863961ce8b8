"""Turn a schedule into the forward and the backward graph that carry it out.

Every scheduled op becomes the calls of its kernel, with as many copies as the schedule asks for. Views are
rebuilt next to their users. Nothing is freed by hand: a value dies with its last use in the generated code,
which is where the schedule says that it dies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rematerialize import torch_private as private
from rematerialize.capture.inplace import call_in_place
from rematerialize.capture.kernels import Kernel, KernelGraph
from rematerialize.errors import EmitError
from rematerialize.schedule import Schedule

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class EmittedStep:
    """The two graphs and their calling conventions; both take one list, which they empty.

    Attributes
    ----------
    forward : fx.GraphModule
        Takes the primals at ``forward_primals``; returns the values of ``outputs``, then the saved tensors.
    backward : fx.GraphModule
        Takes the saved tensors, the tangents at ``backward_tangents``, the primals at ``backward_primals``;
        returns one gradient (or None) per primal.
    outputs : tuple of int
        Positions among the joint outputs that the forward returns, in order.
    saved_outputs : tuple of int
        Those among ``outputs`` whose storage the backward reads: the user must not change them in place.
    recomputes : bool
        Does the backward run ops of the forward?
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    forward_primals: tuple[int, ...]
    backward_primals: tuple[int, ...]
    backward_tangents: tuple[int, ...]
    outputs: tuple[int, ...]
    saved_outputs: tuple[int, ...]
    recomputes: bool


def emit(graph: KernelGraph, schedule: Schedule, outputs: Sequence[int]) -> EmittedStep:
    """Emit a schedule that has been found valid for ``graph``'s training graph.

    Parameters
    ----------
    graph : KernelGraph
    schedule : Schedule
    outputs : sequence of int
        Positions among the joint outputs that the caller needs as values.

    Raises
    ------
    EmitError
        If the schedule names an op that the graph lacks.
    """
    kernels = {kernel.name: kernel for kernel in graph.kernels}
    for name in (*schedule.forward, *schedule.backward):
        if name not in kernels:
            raise EmitError(f"the schedule runs {name!r}, which this step doesn't have: plan this model again")
    runs = Counter((*schedule.forward, *schedule.backward))
    started: set[str] = set()
    forward = _Emitter(graph, runs, started, first_pass=None)
    for name in schedule.forward:
        forward.run(kernels[name])
    backward = _Emitter(graph, runs, started, first_pass=forward)
    for name in schedule.backward:
        backward.run(kernels[name])
    joint = graph.normal.joint
    gradients = [None if node is None else backward.value(node) for node in joint.gradients]
    values = [forward.value(joint.outputs[index]) for index in outputs]  # type: ignore[arg-type]
    saved = [forward.known(key) for key in backward.saved]
    read_late = {name for key in backward.saved if isinstance(key, fx.Node) for name in graph.storage_of[key]}
    return EmittedStep(
        forward=forward.finish([*values, *saved]),
        backward=backward.finish(gradients),
        forward_primals=tuple(forward.primals),
        backward_primals=tuple(backward.primals),
        backward_tangents=tuple(backward.tangents),
        outputs=tuple(outputs),
        saved_outputs=tuple(
            index
            for index in outputs
            if read_late.intersection(graph.storage_of[joint.outputs[index]])  # type: ignore[index]
        ),
        recomputes=any(kernels[name].phase == "forward" for name in schedule.backward),
    )


class _Emitter:
    """Builds one graph. Keys of values are joint nodes, or names of generator states."""

    def __init__(self, graph: KernelGraph, runs: Counter[str], started: set[str], first_pass: _Emitter | None) -> None:
        self.source = graph
        self.runs = runs
        self.started = started
        self.first_pass = first_pass
        self.graph = fx.Graph()
        self.values: dict[fx.Node | str, fx.Node] = {}
        self.showing: dict[str, set[fx.Node]] = {}
        self.saved: list[fx.Node | str] = []
        self.primals: list[int] = []
        self.tangents: list[int] = []
        self.groups: dict[str, list[fx.Node]] = {"saved": [], "tangent": [], "primal": []}
        joint = graph.normal.joint
        self.primal_index = {node: i for i, node in enumerate(joint.primals)}
        self.tangent_index = {node: i for i, (node, _) in enumerate(joint.tangents)}

    def run(self, kernel: Kernel) -> None:
        """Emit one execution of a kernel."""
        again = kernel.name in self.started
        self.started.add(kernel.name)
        if not kernel.calls:
            if kernel.rng_device:
                self._save_generator(kernel)
            return
        restore = None
        if again and kernel.random:
            restore = self.graph.call_function(swap_generator_state, (self.value(kernel.rng), self._generator(kernel)))
        for name in kernel.writes:
            for node in self.showing.pop(name, ()):
                self.values.pop(node, None)
        for node, form in kernel.calls:
            self._call(node, form, again)
        if restore is not None:
            self.graph.call_function(set_generator_state, (restore, self._generator(kernel)))

    def _save_generator(self, kernel: Kernel) -> None:
        owner = kernel.name.removesuffix(".rng")
        if self.runs[owner] > 1:
            self.values[kernel.name] = self.graph.call_function(get_generator_state, (self._generator(kernel),))

    def _generator(self, kernel: Kernel) -> fx.Node | str:
        return kernel.rng_device if kernel.generator is None else self.value(kernel.generator)

    def _call(self, node: fx.Node, form: Any, again: bool) -> None:
        args = fx.node.map_arg(node.args, self.value)
        kwargs = fx.node.map_arg(node.kwargs, self.value)
        target = node.target
        if form is not None:
            target, args, kwargs = call_in_place(form, args, kwargs)
        elif again and target is aten._native_batch_norm_legit.default:
            target, args = aten._native_batch_norm_legit.no_stats, (*args[:3], *args[5:])
        result = self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        self._note(node, result)
        if form is not None:
            result.meta["allocating"] = (node.target, form)
        if not isinstance(node.meta["val"], Tensor):
            # Items are taken at once, so that the tuple doesn't keep all of them alive.
            for user in node.users:
                if user.target is private.getitem:
                    self._note(user, self.graph.call_function(private.getitem, (result, user.args[1])))

    def _note(self, node: fx.Node, value: fx.Node) -> None:
        self.values[node] = value
        value.meta.update({key: node.meta[key] for key in ("val", "reached_by") if key in node.meta})
        for name in self.source.storage_of[node]:
            self.showing.setdefault(name, set()).add(node)

    def known(self, key: fx.Node | str) -> fx.Node:
        if key not in self.values:
            raise EmitError(f"the backward needs {key}, which the forward never computed; report this as a bug")
        return self.values[key]

    def value(self, key: fx.Node | str) -> fx.Node:
        """The current value of a joint node: known, a parameter, saved by the forward, or a view of one."""
        if key in self.values:
            return self.values[key]
        if isinstance(key, fx.Node):
            if key in self.primal_index:
                return self._argument(key, "primal", self.primals, self.primal_index[key])
            if key in self.tangent_index:
                return self._argument(key, "tangent", self.tangents, self.tangent_index[key])
            if key.op == "get_attr":
                self.values[key] = self.graph.get_attr(str(key.target))
                return self.values[key]
            if self._is_view(key):
                return self._view(key)
        if self.first_pass is None:
            raise EmitError(f"the schedule reads {key} before it is computed; report this as a bug")
        return self._argument(key, "saved", self.saved, key)

    def _is_view(self, node: fx.Node) -> bool:
        return node not in self.source.makers

    def _view(self, node: fx.Node) -> fx.Node:
        """Rebuild a chain of views; iterative, for chains can be long."""
        chain = [node]
        while True:
            missing = [
                source
                for source in chain[-1].all_input_nodes
                if source not in self.values and self._is_view(source) and source.op == "call_function"
            ]
            if not missing:
                current = chain.pop()
                args = fx.node.map_arg(current.args, self.value)
                kwargs = fx.node.map_arg(current.kwargs, self.value)
                self._note(current, self.graph.call_function(current.target, args, kwargs))  # type: ignore[arg-type]
                if not chain:
                    return self.values[node]
            else:
                chain.extend(missing)

    def _argument(self, key: fx.Node | str, group: str, order: list[Any], entry: Any) -> fx.Node:
        with self._after_placeholders(group):
            # A name that no call's result takes: on a clash fx binds a second one, and the value lives on.
            node = self.graph.placeholder(f"{group}_input_{len(order)}")
        self.groups[group].append(node)
        order.append(entry)
        self.values[key] = node
        if isinstance(key, fx.Node):
            self._note(key, node)
        if group == "tangent":
            node.meta["tangent"] = entry
        return node

    def _after_placeholders(self, group: str) -> Any:
        order = list(self.groups)
        for name in reversed(order[: order.index(group) + 1]):
            if self.groups[name]:
                return self.graph.inserting_after(self.groups[name][-1])
        return self.graph.inserting_before()

    def finish(self, results: Sequence[fx.Node | None]) -> fx.GraphModule:
        self.graph.output(tuple(results))
        self.graph.set_codegen(private.BoxedCodeGen())
        root: nn.Module = self.source.normal.joint.owner
        module = fx.GraphModule(root, self.graph)
        return module


def get_generator_state(generator: str | torch.Generator) -> Tensor:
    """The state of a generator, or of the default one of a device ("cpu", "cuda:0")."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    device = generator
    return torch.cuda.get_rng_state(device) if device.startswith("cuda") else torch.get_rng_state()


def set_generator_state(state: Tensor, generator: str | torch.Generator) -> None:
    """Set the state of a generator, or of the default one of a device."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
        return
    device = generator
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def swap_generator_state(state: Tensor, generator: str | torch.Generator) -> Tensor:
    """Set a state and return the one that was there."""
    current = get_generator_state(generator)
    set_generator_state(state, generator)
    return current
