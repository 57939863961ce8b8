"""Rewrite a captured joint graph into the form that the planner reads: fx graph -> fx graph.

What the trace leaves implicit becomes explicit: buffer updates are ops, gradients own their storage in the
layout that autograd adopts without a copy, and ops that took a tensor only for its shape don't depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from rematerialize import torch_private as private
from rematerialize.capture.aliasing import find_aliases, is_random, is_view, phase_of
from rematerialize.capture.convolution import split_convolution_backwards
from rematerialize.capture.eager_paths import take_eager_paths
from rematerialize.capture.layout import eager_layouts, lay_out, part_tangents
from rematerialize.capture.random import fill_in_eager_layout
from rematerialize.capture.scatter import write_through_scatters
from rematerialize.capture.strides import adopted_for, is_apart

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class NormalGraph:
    """A joint graph, normalized.

    Attributes
    ----------
    joint : JointTrace
        Its ``mutations`` are empty: they are ops now, listed in ``effects``.
    effects : tuple of Node
        Forward ops that must run exactly once for what they write to ``written``.
    written : dict
        Effect node to the primal placeholders that it changes.
    """

    joint: private.JointTrace
    effects: tuple[fx.Node, ...]
    written: dict[fx.Node, tuple[fx.Node, ...]]


def normalize(joint: private.JointTrace) -> NormalGraph:
    """Apply every rewrite, drop dead nodes. The graph is changed in place and belongs to the result."""
    graph = joint.graph
    written: dict[fx.Node, tuple[fx.Node, ...]] = {}
    part_tangents(graph, joint.primals, [node for node, _ in joint.tangents])
    take_eager_paths(graph)
    fill_in_eager_layout(graph)
    eager_layouts(joint)
    _factories_with_types(graph)
    _factories_without_templates(graph)
    split_convolution_backwards(graph)
    _rnn_layers_with_workspace(graph)
    _mixed_precision_statistics(graph)
    write_through_scatters(graph)
    _checks_once(graph, written)
    pending = _statistics_in_place(joint, written)
    _keep_old_values(joint, [joint.primals[index] for index, _ in pending])
    _write_mutations(joint, pending, written)
    gradients = _own_gradients(joint)
    normal = NormalGraph(replace(joint, mutations=(), gradients=gradients), tuple(written), written)
    drop_dead(normal)
    return normal


def _tag_like(node: fx.Node, like: fx.Node, value: Any) -> fx.Node:
    node.meta.update({k: like.meta[k] for k in ("partitioner_tag", "source", "module", "seq_nr") if k in like.meta})
    node.meta["val"] = value
    return node


TEMPLATE_FACTORIES = {
    aten.empty_like.default: None,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_empty.default: None,
}


def _factories_without_templates(graph: fx.Graph) -> None:
    """``zeros_like(x)`` needs x's shape only: kept as it is, it would hold x in memory."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in TEMPLATE_FACTORIES:
            continue
        value = node.meta["val"]
        options = {"dtype": value.dtype, "device": value.device}
        fill = TEMPLATE_FACTORIES[node.target]
        if fill is None:
            node.target = aten.empty_strided.default
            node.args = (list(value.shape), list(value.stride()))
        elif value.is_contiguous():
            node.target = aten.full.default
            node.args = (list(value.shape), fill)
        else:
            continue
        node.kwargs = options


def _factories_with_types(graph: fx.Graph) -> None:
    """Say what type a factory made that was given none: the default may be set within a forward."""
    for node in graph.nodes:
        if node.op != "call_function" or node.all_input_nodes or node.kwargs.get("dtype") is not None:
            continue
        schema = getattr(node.target, "_schema", None)
        takes = schema is not None and any(each.name == "dtype" and each.kwarg_only for each in schema.arguments)
        if takes and isinstance(node.meta.get("val"), Tensor):
            node.kwargs = {**node.kwargs, "dtype": node.meta["val"].dtype}


def _rnn_layers_with_workspace(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target is aten.mkldnn_rnn_layer.default and not node.meta.get("no_grad"):
            node.target = private.training_rnn_layer


def _checks_once(graph: fx.Graph, written: dict[fx.Node, tuple[fx.Node, ...]]) -> None:
    """What eager checks in the forward (that a factorization succeeded, or what `checks` met) is an effect that writes
    nothing.
    """
    for node in graph.nodes:
        if node.target in private.CHECKS:
            node.meta["val"] = None
            if phase_of(node) == "forward":
                written[node] = ()


_NORM_PARAMETERS = {  # where norms have their parameters
    aten._native_batch_norm_legit_functional.default: (1, 2, 3),
    aten.native_group_norm.default: (1, 2),
    aten.native_layer_norm.default: (2, 3),
}


def _mixed_precision_statistics(graph: fx.Graph) -> None:
    """Under autocast norms keep their statistics in the parameters' precision; their fake kernels err."""
    for node in graph.nodes:
        places = _NORM_PARAMETERS.get(node.target, ())
        parameter = next((node.args[at] for at in places if node.args[at] is not None), None)
        if parameter is None:
            continue
        dtype = parameter.meta["val"].dtype
        value = list(node.meta["val"])
        for index in (1, 2):
            if value[index].dtype != dtype:
                with value[index].fake_mode:
                    value[index] = torch.empty(value[index].shape, dtype=dtype, device=value[index].device)
        node.meta["val"] = tuple(value)
        for user in node.users:
            if user.target is private.getitem and user.args[1] in (1, 2):
                _retell(user, value[user.args[1]])


def _retell(node: fx.Node, value: Tensor) -> None:
    """Say what a node and its detached twins really are."""
    node.meta["val"] = value
    for user in node.users:
        if user.target is aten.detach.default:
            with value.fake_mode:  # type: ignore[attr-defined]
                _retell(user, value.detach())


def _statistics_in_place(
    joint: private.JointTrace, written: dict[fx.Node, tuple[fx.Node, ...]]
) -> list[tuple[int, fx.Node]]:
    """Batch norms update their running statistics in place, as in eager; returns the other mutations."""
    new_value = {joint.primals[index]: value for index, value in joint.mutations}
    done: set[fx.Node] = set()
    for node in joint.graph.nodes:
        if node.target is not aten._native_batch_norm_legit_functional.default or node.args[5] is not True:
            continue
        mean, var = node.args[3], node.args[4]
        items = {user.args[1]: user for user in node.users}
        if new_value.get(mean) is not items.get(3) or new_value.get(var) is not items.get(4):
            continue
        if 3 not in items or not all(_only_statistics(items[i]) for i in (3, 4)):
            continue
        for index in (3, 4):
            for user in list(items[index].users):
                if user.op != "output":
                    arguments = list(user.args)
                    arguments[3:5] = [None, None]
                    user.args = tuple(arguments)
        node.target = aten._native_batch_norm_legit.default
        node.meta["val"] = tuple(node.meta["val"][:3])
        written[node] = (mean, var)
        done.update((mean, var))
    return [(index, value) for index, value in joint.mutations if joint.primals[index] not in done]


def _only_statistics(item: fx.Node) -> bool:
    """Used by nothing but the batch norm's own backward, which in training doesn't read it."""
    return all(
        user.op == "output" or (user.target is aten.native_batch_norm_backward.default and user.args[7] is True)
        for user in item.users
    )


def _keep_old_values(joint: private.JointTrace, mutated: list[fx.Node]) -> None:
    """The backward of an op that read a buffer before its update needs the old value: a clone of it."""
    if not mutated:
        return
    graph = joint.graph
    aliases = find_aliases(graph)
    read_late = {
        name
        for node in graph.nodes
        if node.op == "call_function" and phase_of(node) == "backward" and not is_view(node, aliases)
        for source in node.all_input_nodes
        for name in aliases.of[source]
    }
    for primal in mutated:
        if aliases.single(primal) not in read_late:
            continue
        with graph.inserting_after(_last_placeholder(graph)):
            clone = graph.call_function(aten.clone.default, (primal,))
        value = primal.meta["val"]
        with value.fake_mode:
            clone.meta["val"] = torch.empty_like(value)
        clone.meta["once"] = True
        _replace_uses(primal, clone)


def _replace_uses(primal: fx.Node, clone: fx.Node) -> None:
    primal.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone)


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    last: fx.Node = [node for node in graph.nodes if node.op == "placeholder"][-1]
    return last


def _write_mutations(
    joint: private.JointTrace, pending: list[tuple[int, fx.Node]], written: dict[fx.Node, tuple[fx.Node, ...]]
) -> None:
    """Each remaining buffer update becomes a ``copy_`` at the end of the forward."""
    if not pending:
        return
    # Views of outputs stand behind the backward: the forward ends where that begins.
    anchor = _last_placeholder(joint.graph)
    for node in joint.graph.nodes:
        if node.op == "call_function" and phase_of(node) == "backward":
            break
        anchor = node if node.op == "call_function" else anchor
    order = {node: at for at, node in enumerate(joint.graph.nodes)}
    anchor = max([anchor, *(value for _, value in pending)], key=order.__getitem__)
    for index, value in pending:
        primal = joint.primals[index]
        with joint.graph.inserting_after(anchor):
            anchor = joint.graph.call_function(aten.copy_.default, (primal, value))
        anchor.meta["val"] = primal.meta["val"]
        anchor.meta["source"] = value.meta.get("source", "")
        anchor.meta["module"] = value.meta.get("module")
        written[anchor] = (primal,)


def _own_gradients(joint: private.JointTrace) -> tuple[fx.Node | None, ...]:
    """Gradients that autograd adopts as they are: otherwise it clones them behind the plan's back.

    Those of inputs that were computed outside go on there, and kernels round by layouts: they keep the trace's, be it
    expanded or with gaps.
    """
    graph = joint.graph
    aliases = find_aliases(graph)
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    taken = {name for node in joint.outputs if node is not None for name in aliases.of[node]}
    owned: list[fx.Node | None] = []
    for primal, gradient in zip(joint.primals, joint.gradients, strict=True):
        if gradient is None:
            owned.append(None)
            continue
        name = aliases.single(gradient)
        like, value = primal.meta["val"], gradient.meta["val"]
        origin = aliases.origin[name]
        goes_on = primal.meta["goes_on"]
        made = name not in taken and origin.op == "call_function" and phase_of(origin) == "backward"
        whole = value.numel() * value.element_size() == aliases.size_bytes[name]
        alike = value.stride() == like.stride() or adopted_for(value.stride(), like)
        adopted = made and (goes_on or (whole and alike))
        if not adopted:
            kept = goes_on and is_apart(value.stride(), value.shape)
            strides = list(value.stride()) if kept else _dense_strides(like)
            with graph.inserting_before(output):
                copy = graph.call_function(lay_out, (gradient, list(value.shape), strides))
            with value.fake_mode:
                _tag_like(copy, gradient, lay_out(value, list(value.shape), strides))
            copy.meta["partitioner_tag"] = "is_backward"
            gradient = copy
        else:
            taken.add(name)
        owned.append(gradient)
    return tuple(owned)


def _dense_strides(like: Tensor) -> list[int]:
    return list(torch.empty_like(like, device="meta").stride())


def drop_dead(normal: NormalGraph) -> None:
    """Keep what outputs, gradients, effects and the generator's state need; drop the rest."""
    joint = normal.joint
    output = next(node for node in reversed(joint.graph.nodes) if node.op == "output")
    wanted = [node for node in (*joint.outputs, *joint.gradients, *normal.effects) if node is not None]
    output.args = (tuple(wanted),)
    needed = set(wanted)
    for node in reversed(joint.graph.nodes):
        if node.op == "output":
            continue
        if node in needed or node.target in private.CHECKS or (node.op == "call_function" and is_random(node)):
            needed.update(node.all_input_nodes)
        elif node.op != "placeholder":
            joint.graph.erase_node(node)
