"""Kernels on synthetic data: what is measured runs the same calls as a step, on values that no formula refuses."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from rematerialize import torch_private as private
from rematerialize.capture.aliasing import tensors_of
from rematerialize.capture.inplace import InPlaceForm, call_in_place
from rematerialize.capture.kernels import Kernel
from rematerialize.synthetic_integers import decide_work

_BLOCK = 1 << 16  # a shorter one is learnt by the branch predictor: max_pool2d ran three times as fast as on real data


@dataclass(frozen=True, slots=True)
class _Call:
    node: fx.Node
    target: Callable[..., Any]
    form: InPlaceForm | None
    args: Any
    kwargs: Any


def inputs_of(kernel: Kernel) -> list[fx.Node]:
    """What a kernel's calls read that they don't make themselves."""
    inside = {node for node, _ in kernel.calls}
    read = dict.fromkeys(source for node, _ in kernel.calls for source in node.all_input_nodes)
    return [source for source in read if source not in inside]


def bytes_of(nodes: Iterable[fx.Node]) -> int:
    """Bytes of all tensors that nodes stand for."""
    tensors = (tensor for node in nodes for _, tensor in tensors_of(node.meta["val"]))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def devices_of(kernel: Kernel) -> Iterator[torch.device]:
    """Where the results of a kernel's calls are."""
    for node, _ in kernel.calls:
        for _, tensor in tensors_of(node.meta["val"]):
            yield tensor.device


def prepare_kernel(kernel: Kernel) -> Callable[[], Any]:
    """A closure that runs the kernel on synthetic data; it returns the allocating call's result."""
    data: dict[fx.Node, Any] = {}
    for source in inputs_of(kernel):
        workspace = _opaque(source)
        data[source] = _synthetic(source.meta["val"]) if workspace is None else workspace
    for node, _ in kernel.calls:
        # Its source may hold fewer values than the mask: the one op that refuses a mask all true.
        mask = node.args[1] if node.target is torch.ops.aten.masked_scatter.default else None
        if isinstance(mask, fx.Node) and mask in data:
            data[mask].zero_()
        decide_work(node, data)
    # Looked up here and not in the run: a small kernel takes less time than its arguments' lookup.
    calls = [_prepared(node, form, data) for node, form in kernel.calls]
    if len(calls) == 1:
        return functools.partial(calls[0].target, *calls[0].args, **calls[0].kwargs)

    def run() -> Any:
        made: dict[fx.Node, Any] = {}
        first = None
        for call in calls:
            args, kwargs = call.args, call.kwargs
            if made:
                args, kwargs = _with(made, args), _with(made, kwargs)
            if call.form is not None:
                _, args, kwargs = call_in_place(call.form, args, kwargs)
            made[call.node] = result = call.target(*args, **kwargs)
            first = result if first is None else first
        return first

    return run


@contextlib.contextmanager
def refusing_data() -> Iterator[None]:
    """Let an op refuse synthetic data (a matrix that isn't positive definite, a pivot out of range)."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError):
        pass


def _prepared(node: fx.Node, form: InPlaceForm | None, data: Mapping[fx.Node, Any]) -> _Call:
    target = cast(Callable[..., Any], node.target if form is None else form.target)
    return _Call(node, private.direct(target), form, _known(data, node.args), _known(data, node.kwargs))


def _known(data: Mapping[fx.Node, Any], given: Any) -> Any:
    return fx.node.map_arg(given, lambda source: data.get(source, source))


def _with(made: Mapping[fx.Node, Any], given: Any) -> Any:
    """Arguments with what was made since; `fx.node.map_arg` takes longer than a small kernel."""
    if isinstance(given, fx.Node):
        return made[given]
    if isinstance(given, (tuple, list)):
        return type(given)([_with(made, item) for item in given])
    if isinstance(given, dict):
        return {name: _with(made, item) for name, item in given.items()}
    return given


def _opaque(source: fx.Node) -> Tensor | None:
    """A workspace that only its own kernel can fill (oneDNN's LSTM crashes on any other): run that kernel."""
    while source.op == "call_function" and source.target is not private.getitem and source.all_input_nodes:
        if source.target is not torch.ops.aten.detach.default:
            return None
        source = source.all_input_nodes[0]
    if source.target is not private.getitem:
        return None
    maker, index = source.args
    if not isinstance(maker, fx.Node) or maker.target is not private.training_rnn_layer or index != 3:
        return None
    args = fx.node.map_arg(maker.args, lambda node: _synthetic(node.meta["val"]))
    result: Tensor = maker.target(*args)[3]
    return result


def _synthetic(value: Any) -> Any:
    """A real tensor with the layout of a fake one: floats in (0.25, 1), so that no formula meets a NaN.

    Booleans are true: what a mask selects takes workspace (a backward of `masked_scatter`).
    """
    if isinstance(value, (tuple, list)):
        return type(value)(_synthetic(item) for item in value)
    if not isinstance(value, Tensor):
        return value
    needed = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    base = torch.empty(max(needed, 0), dtype=value.dtype, device=value.device)
    if value.is_floating_point():
        _fill(base)
        filled = base.as_strided(value.shape, value.stride())
        if value.dim() >= 2 and value.shape[-1] == value.shape[-2] > 1:
            # So that factorizations and solvers find a positive definite matrix.
            filled.diagonal(dim1=-2, dim2=-1).fill_(float(value.shape[-1]))
        return filled
    elif value.is_complex():
        base.fill_(0.5)
    elif value.dtype == torch.bool:
        base.fill_(True)
    else:
        base.zero_()
    return base.as_strided(value.shape, value.stride())


def _fill(flat: Tensor) -> None:
    """Random values in (0.25, 1) at the speed of a copy: one block of them, repeated."""
    block = torch.empty(min(flat.numel(), _BLOCK), dtype=flat.dtype, device=flat.device).uniform_(0.25, 1.0)
    if block.numel():
        whole = flat.numel() - flat.numel() % block.numel()
        flat[:whole].view(-1, block.numel()).copy_(block)
        flat[whole:].copy_(block[: flat.numel() - whole])
