"""A backward for other tangents than the traced ones: absent, or laid out otherwise.

Where some outputs got no gradient, autograd leaves out what they alone lead to, and so does this. Zeros in their place
would be eager's gradients in most cases, not in all: zero times an infinite derivative is NaN, and a parameter that
only an unused output leads to would get zeros where eager leaves ``grad`` at None.

A gradient that arrives in another layout than its output's (of ``y.sum()``: one number, expanded) goes on in it, as in
eager: kernels add up in the order of the layout, and a copy would be memory that no plan knows of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rematerialize import torch_private as private
from rematerialize.capture.aliasing import tensors_of
from rematerialize.capture.eager_paths import summed_over
from rematerialize.capture.inplace import call_allocating
from rematerialize.capture.kernel_layouts import faking
from rematerialize.capture.normalize import TEMPLATE_FACTORIES

aten = torch.ops.aten

_SUMS = frozenset({aten.add.Tensor, aten.add_.Tensor, summed_over})
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})


def for_tangents(
    backward: fx.GraphModule, absent: Collection[int], strides: Mapping[int, tuple[int, ...]]
) -> fx.GraphModule:
    """The backward that results when the tangents at some positions are absent, or laid out otherwise than traced.

    A backward is linear in its tangents: what depends on absent ones only is absent itself, a sum with an absent
    term is the other term, and any other op reads zeros for it, which is what autograd's own formulas do. Zeros that
    a formula makes itself (the gradient of what ``fill_`` overwrites) are absent where autograd wouldn't run it.

    Parameters
    ----------
    backward : fx.GraphModule
        An emitted backward, whose nodes carry their fake values.
    absent : collection of int
        Positions among the step's tangents. It takes the same list of arguments; what it gets there isn't read.
    strides : mapping
        From positions among the step's tangents to the strides that they have. They are copied to those of the trace
        where only the run could tell what an op makes of them.

    Returns
    -------
    fx.GraphModule
        Returns None for gradients that depend on absent tangents only.
    """
    for copy_tangents, follow_terms in ((False, True), (True, True), (True, False)):
        try:
            return _derived(backward, absent, strides, copy_tangents=copy_tangents, follow_terms=follow_terms)
        except _Unfollowed:
            continue
    raise AssertionError("nothing is laid out otherwise, so nothing is left to follow")


class _Unfollowed(Exception):
    """A layout that changes reaches a call of which only the run can tell what it makes of it."""


def _derived(
    backward: fx.GraphModule,
    absent: Collection[int],
    strides: Mapping[int, tuple[int, ...]],
    *,
    copy_tangents: bool,
    follow_terms: bool,
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    results = graph.output(graph.graph_copy(backward.graph, copies))
    missing: set[fx.Node] = set()
    carrying: set[fx.Node] = set()
    tangents = [node for node in graph.nodes if node.op == "placeholder" and "tangent" in node.meta]
    missing.update(node for node in tangents if node.meta["tangent"] in absent)
    carrying.update(tangents)
    moved: dict[fx.Node, Any] = {}  # what is laid out otherwise than in the trace, and the traced value
    for node in tangents:
        if node not in missing and node.meta["tangent"] in strides:
            _lay_out(graph, node, strides[node.meta["tangent"]], moved, copy=copy_tangents)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if carrying.isdisjoint(node.all_input_nodes):
            if _made_of_nothing(node):
                carrying.add(node)
                if node.meta["reached_by"].issubset(absent):
                    missing.add(node)
            continue
        carrying.add(node)
        gone = [source for source in node.all_input_nodes if source in missing]
        if gone and missing.issuperset(source for source in node.all_input_nodes if source in carrying):
            missing.add(node)
            continue
        if gone and not _without_term(graph, node, missing, follow_terms):
            for source in gone:
                with graph.inserting_before(node):
                    zeros = graph.call_function(zeros_as, _layout(source.meta["val"]))
                    zeros.meta["val"] = source.meta["val"]
                node.replace_input_with(source, zeros)
        _take_as_view(graph, node, moved)
        if gone or not moved.keys().isdisjoint(node.all_input_nodes):
            traced = node.meta["val"]
            if _follow(graph, node, moved):
                moved[node] = traced
    results.args = fx.node.map_arg(results.args, lambda node: None if node in missing else node)
    _drop_unread(graph)
    graph.set_codegen(private.BoxedCodeGen())
    return fx.GraphModule(backward, graph)


def _lay_out(
    graph: fx.Graph, tangent: fx.Node, strides: tuple[int, ...], moved: dict[fx.Node, Any], *, copy: bool
) -> None:
    traced = tangent.meta["val"]
    if copy:
        arguments = [node for node in graph.nodes if node.op == "placeholder"]
        with graph.inserting_after(arguments[-1]):
            again = graph.call_function(laid_as, (tangent, tuple(traced.stride())))
        again.meta["val"] = traced
        tangent.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    with traced.fake_mode:
        tangent.meta["val"] = torch.empty_strided(traced.shape, strides, dtype=traced.dtype, device=traced.device)
    if not copy:
        moved[tangent] = traced


def _made_of_nothing(node: fx.Node) -> bool:
    return "reached_by" in node.meta and (not node.all_input_nodes or node.target in TEMPLATE_FACTORIES)


def _without_term(graph: fx.Graph, node: fx.Node, missing: set[fx.Node], follow_terms: bool) -> bool:
    """A sum of two becomes its other term: a copy of it, where the sum would have had a storage of its own.

    The term may be laid out otherwise than the sum. Eager's formulas go on with the term, and kernels add up in the
    order of the layout, so its bits are had only by going on with the term's layout, too.
    """
    if node.target not in _SUMS or len(node.args) != 2 or node.kwargs:
        return False
    first, second = node.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        return False
    term = second if first in missing else first
    if _layout(term.meta["val"]) != _layout(node.meta["val"]):
        same_kind = (term.meta["val"].shape, term.meta["val"].dtype) == (node.meta["val"].shape, node.meta["val"].dtype)
        if not follow_terms or not same_kind:
            return False
    in_place = term is first and node.target is aten.add_.Tensor
    node.target, node.args = aten.alias.default, (term,)  # the sum itself writes no more
    node.meta.pop("allocating", None)
    if not in_place:
        _keep_apart(node)
    return True


def _keep_apart(node: fx.Node) -> None:
    """Make a view that stands for a result of its own a copy, where something writes into its storage later on.

    Of one number for all elements, an expanded one, a copy would have another layout: what would write over it
    allocates instead, as eager does.
    """
    writers = _later_writers(node)
    if not writers:
        return
    if _expanded(node.all_input_nodes[0].meta["val"]) and all("allocating" in writer.meta for writer in writers):
        for writer in writers:
            _allocate(writer)
    else:
        node.args = (_as_value(node),)
        node.target = copied


def _as_value(node: fx.Node) -> fx.Node:
    """What a copy copies: of an alias its source, of a view the view."""
    if node.target is aten.alias.default:
        return node.all_input_nodes[0]
    with node.graph.inserting_before(node):
        view = node.graph.call_function(node.target, node.args)  # type: ignore[arg-type]
    view.meta["val"] = node.meta["val"]
    return view


def _later_writers(node: fx.Node) -> list[fx.Node]:
    """What may write into the storage of a node after it, through any view of it.

    What is returned counts: autograd takes a gradient for its own, and adds the next step's to it in place.
    """
    base = node
    while _views(base):
        base = base.all_input_nodes[0]
    seen, waiting = {base}, [base]
    found = []
    while waiting:
        value = waiting.pop()
        for user in value.users:
            schema = getattr(user.target, "_schema", None)
            unknown = user.op == "output" or (schema is None and user.target is not private.getitem)
            if user > node and (unknown or (schema is not None and schema.is_mutable)):
                found.append(user)
            if _views(user) and user not in seen:
                seen.add(user)
                waiting.append(user)
    return list(dict.fromkeys(found))


def _views(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return False
    return node.target in _VIEWS or any(item.alias_info is not None for item in schema.returns)


def _follow(graph: fx.Graph, node: fx.Node, moved: Mapping[fx.Node, Any]) -> bool:
    """Compute the node's fake value from its inputs' present ones; return whether its layout is another now.

    A view that its input's new layout doesn't allow is taken of a contiguous copy, as ``reshape`` does. A kernel for
    which autograd's formula makes the gradient contiguous gets the traced layout: a trace in which the gradient was
    contiguous anyway doesn't show that call.
    """
    before = [_layout(value) for _, value in tensors_of(node.meta["val"])]
    if not _takes_any_layout(node):
        for source in node.all_input_nodes:
            if source in moved:
                with graph.inserting_before(node):
                    again = graph.call_function(laid_as, (source, tuple(moved[source].stride())))
                again.meta["val"] = moved[source]
                node.replace_input_with(source, again)
        return False
    if "allocating" in node.meta and _written_otherwise(node):
        _allocate(node)
    try:
        value = _fake_result(node)
    except (RuntimeError, ValueError):
        if node.target not in _VIEWS:
            raise _Unfollowed from None
        with graph.inserting_before(node):
            copy = graph.call_function(aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format})
        copy.meta["val"] = _fake_result(copy)
        node.replace_input_with(node.args[0], copy)  # type: ignore[arg-type]
        value = _fake_result(node)
    node.meta["val"] = value
    return [_layout(made) for _, made in tensors_of(value)] != before


def _take_as_view(graph: fx.Graph, node: fx.Node, moved: dict[fx.Node, Any]) -> None:
    """Let a reshape that had to copy in the trace be a view, where the layout that its input has now allows one."""
    copy = node.args[0] if node.target is aten._unsafe_view.default else None
    if not isinstance(copy, fx.Node) or copy.target is not aten.clone.default or len(copy.users) > 1:
        return
    source = copy.args[0]
    if not isinstance(source, fx.Node) or source not in moved or copy.kwargs != _CONTIGUOUS:
        return
    traced, shape = node.meta["val"], node.args[1]
    node.target, node.args = aten.view.default, (source, shape)
    try:
        node.meta["val"] = _fake_result(node)
    except (RuntimeError, ValueError):
        node.target, node.args = aten._unsafe_view.default, (copy, shape)
        return
    _keep_apart(node)
    if _layout(node.meta["val"]) != _layout(traced):
        moved[node] = traced


_CONTIGUOUS = {"memory_format": torch.contiguous_format}


def _written_otherwise(node: fx.Node) -> bool:
    """Whether an op that writes over an operand would lay out a result of its own in another way than that operand."""
    target, form = node.meta["allocating"]
    args, kwargs = call_allocating(form, node.args, dict(node.kwargs))
    over = args[form.position]
    if not isinstance(over, fx.Node):
        return False
    try:
        return _layout(_fake_call(target, args, kwargs)) != _layout(over.meta["val"])
    except (RuntimeError, ValueError):
        return False


def _allocate(node: fx.Node) -> None:
    """Let an op that was written over an operand have a result of its own again.

    If it was written over the second of two, a copy of the first that nothing else reads is written over instead.
    """
    target, form = node.meta.pop("allocating")
    node.args, node.kwargs = call_allocating(form, node.args, dict(node.kwargs))
    first = node.args[0]
    over_copy = form.swap and isinstance(first, fx.Node) and first.target is copied and len(first.users) == 1
    node.target = form.target if over_copy else target


def _expanded(value: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))


# Autograd's formulas hand these a contiguous gradient (torch's derivatives.yaml); every other kernel gets what comes.
_TRACED_LAYOUT = frozenset(
    {aten.native_group_norm_backward, aten._cdist_backward, aten._weight_norm_interface_backward, aten.as_strided}
    | {aten._reshape_alias, aten.view_as_complex, aten.view_as_real}
    | {aten.cudnn_batch_norm_backward, aten.miopen_batch_norm_backward}
)


def _takes_any_layout(node: fx.Node) -> bool:
    """Whether eager would hand a kernel its gradient as it is; of kernels that aren't torch's, nobody knows."""
    if node.target in (copied, summed_over, private.getitem):
        return True
    packet = getattr(node.target, "_overloadpacket", None)
    return getattr(node.target, "namespace", "") == "aten" and packet not in _TRACED_LAYOUT


def _fake_result(node: fx.Node) -> Any:
    return _fake_call(node.target, node.args, node.kwargs)


def _fake_call(target: Any, args: Any, kwargs: Any) -> Any:
    given: list[Any] = []

    def fake(source: fx.Node) -> Any:
        given.extend(value for _, value in tensors_of(source.meta["val"]))
        return source.meta["val"]

    args, kwargs = fx.node.map_arg(args, fake), fx.node.map_arg(kwargs, fake)
    mode = next((getattr(value, "fake_mode", None) for value in given), None)
    if mode is None or not callable(target):
        raise _Unfollowed
    if target is aten.view.default:
        _refuse_as_real(args[0], args[1])
    try:
        with faking(mode), torch.no_grad():
            return target(*args, **kwargs)
    except (TypeError, NotImplementedError):
        raise _Unfollowed from None


def _refuse_as_real(value: Tensor, shape: Sequence[int]) -> None:
    """Raise where no view of a shape can be taken: torch's fake kernel finds one through dimensions of one element."""
    with private.outside_of_modes():
        torch.empty_strided(value.shape, value.stride(), device="meta").view(shape)


def _layout(value: Tensor) -> tuple[Any, ...]:
    return (tuple(value.shape), tuple(value.stride()), value.dtype, value.device)


def zeros_as(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in a layout."""
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()


def copied(value: Tensor) -> Tensor:
    """A copy with the same strides, gaps between rows included, which ``clone`` closes."""
    if _expanded(value):
        return value.clone()
    return laid_as(value, value.stride())


def laid_as(value: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same values in another layout."""
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)


def _drop_unread(graph: fx.Graph) -> None:
    """Erase what nothing reads, and let go of arguments that nothing reads when the graph begins.

    What works on a generator stays: it has no value that anybody reads.
    """
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and node.meta.get("val") is not None:
            graph.erase_node(node)
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    if not arguments:
        return
    with graph.inserting_after(arguments[-1]):
        for node in arguments:
            if not node.users:
                graph.call_function(let_go, (node,))


def let_go(_: Tensor) -> None:
    """The last use of an argument."""
