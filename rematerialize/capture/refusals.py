"""What a trace may hold that can't be planned, found early and said with the user's line and a way round."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rematerialize import torch_private as private
from rematerialize.capture.aliasing import tensors_of
from rematerialize.errors import CaptureError
from rematerialize.python_code import own

aten = torch.ops.aten

_SPARSE_WAY = (
    "sparse tensors have no storage that a plan could move; multiply by index operations instead, which is the same "
    "sum: zeros.index_add(0, row, value[:, None] * x[column]), with row, column and value as tensors"
)
_STRIDED_WAY = "a plan moves plain storages only; convert it to a dense one, ragged rows padded and masked"
_OBSERVER = (
    "the observer of a per-channel fake quantization{place} has no shape before the model has run: call the model "
    "once, model(*inputs) under torch.no_grad(), before planning"
)

# What the failed op was, in torch's words, and what to do about it; the first that fits.
_WAYS = (
    (
        ("ao/quantization",),
        "use torch.ao.quantization.FusedMovingAvgObsFakeQuantize, as get_default_qat_qconfig does: it observes and "
        "quantizes by tensor operations",
    ),
    (
        ("_pack_padded_sequence", "batch_sizes"),
        "run the recurrence over padded sequences and mask or gather its outputs by length, with torch.where",
    ),
    (
        ("torch_geometric/utils/loop.py",),
        "how many self-loops there are is known only at run time: put them into edge_index before the call and build "
        "the layers with add_self_loops=False",
    ),
    (
        ("nn/modules/transformer.py",),
        "pass is_causal=True or is_causal=False beside the mask, so that the layer needn't look at its values",
    ),
    (
        ("ctc_loss",),
        "return the log-probabilities and compute the loss outside of the wrapped module",
    ),
    (
        ("linalg_lstsq",),
        "use torch.linalg.solve or torch.linalg.pinv, which don't look at the rank",
    ),
    (
        ("aten.nonzero", "aten.masked_select", "aten.unique", "aten._unique"),
        "give sizes that don't depend on values: weigh by a mask (torch.where(mask, x, 0)), take a fixed number by "
        "topk, or compute the indices outside and pass them in",
    ),
    (
        ("aten.bincount",),
        "count by torch.zeros(size).index_add(0, index, torch.ones(len(index))), whose size is known",
    ),
    (
        ("aten._local_scalar_dense", "aten.item"),
        "an if, a loop, int() or .item() on a tensor: use torch.where, or pass the number as a Python number",
    ),
)
_ANY_WAY = "rewrite it with tensor operations such as torch.where, or move it out of the wrapped module"


def way_round(text: str, places: Sequence[str]) -> str:
    """What to do about a value that is known only at run time, by what asked for it and where."""
    for needles, way in _WAYS:
        if any(needle in text or any(needle in place for place in places) for needle in needles):
            return way
    return _ANY_WAY


_TORCH_FUNCTIONS = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]


def refuse_odd_primals(names: Sequence[str], primals: Sequence[Tensor]) -> None:
    """A sparse buffer or input can't even be traced, a tensor with functions of its own only without these."""
    for name, primal in zip(names, primals, strict=True):
        if primal.layout is not torch.strided:
            raise CaptureError(f"{name} is a {_kind(primal)} ({_layout(primal)}): {_way_of(primal)}")
        function = type(primal).__torch_function__
        if getattr(function, "__func__", function) not in _TORCH_FUNCTIONS and not own(type(primal).__module__):
            raise CaptureError(
                f"{name} is a {type(primal).__name__}, whose __torch_function__ a trace doesn't call: use a plain "
                "tensor or parameter, and call the functions in the forward"
            )


_TO_SPARSE = frozenset(
    {"to_sparse", "to_sparse_coo", "to_sparse_csr", "to_sparse_csc", "to_sparse_bsr", "to_sparse_bsc"}
)


def refuse_iterators(leaves: Sequence[Any]) -> None:
    """A trace would use them up, and know what came out of them only."""
    for leaf in leaves:
        if hasattr(type(leaf), "__next__"):
            raise CaptureError(
                f"an input is an iterator ({type(leaf).__name__}), which gives other values at every call: pass a list "
                "or a tuple of what it gives"
            )


class unchanged_arguments:
    """A context for one call of a traced forward: raises CaptureError if it changes a list or dict that it was given.

    A planned step is given tensors only: what eager leaves in the caller's containers would be missing.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.found: list[tuple[str, Any, list[Any]]] = []
        for at, value in (*enumerate(args), *kwargs.items()):
            self._note(f"input {at}" if isinstance(at, int) else f"input {at!r}", value)

    def _note(self, name: str, value: Any) -> None:
        if isinstance(value, dict | list | set):
            self.found.append((name, value, _content(value)))
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        for entry in inner:
            self._note(name, entry)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for name, value, before in self.found if kind is None else ():
            now = _content(value)
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                raise CaptureError(
                    f"the forward changes the {type(value).__name__} that it is given as {name}, which a planned step "
                    "doesn't: let it work on a copy (dict(batch), list(values)), and return what is new"
                )


def _content(value: Any) -> list[Any]:
    return [part for item in value.items() for part in item] if isinstance(value, dict) else list(value)


def refuse_before(function: Any, args: Sequence[Any], caller: types.CodeType) -> None:
    """Refuse what a trace would miss or not survive, before the forward does it; ``caller`` is the calling code."""
    if function in private.HOOKS:
        _refuse_hook(args[0])
    name = getattr(function, "__name__", "")
    if name == "__set__" and function == private.SET_DATA:
        raise CaptureError(
            f"the forward assigns to .data of a tensor{_here()}, which a recorded step can't repeat: change the tensor "
            "in place under torch.no_grad() instead (weight.copy_(value))"
        )
    zeroed = caller.co_name == "zero_grad"
    if name == "__get__" and function == private.GET_GRAD and (zeroed or private.is_users(caller.co_filename)):
        does = "clears" if zeroed else "reads"
        raise CaptureError(
            f"the forward {does} .grad of a tensor{_here()}, which changes from step to step and isn't part of a plan: "
            "pass it as an input, and clear it between steps"
        )
    if name == "__get__" and function in private.GET_PLACE and private.is_users(caller.co_filename):
        raise CaptureError(
            f"the forward asks where a tensor comes from{_here()} (is_leaf, grad_fn), which a trace answers otherwise "
            "than eager: decide by what the caller knows, or by requires_grad"
        )
    if function is F.multi_head_attention_forward and private.only_a_trace_is_slow():
        raise CaptureError(
            f"an attention that is only evaluated{_here()} takes torch's fast path, whose values a trace doesn't have "
            "(zeros at padded places): call torch.backends.mha.set_fastpath_enabled(False) first, or run this part "
            "outside of the wrapped module and pass its result"
        )
    if name in _TO_SPARSE:
        raise CaptureError(f"the forward makes a sparse tensor{_here()} ({name}): {_SPARSE_WAY}")


def _refuse_hook(tensor: Any) -> None:
    """A hook on a parameter stays there in eager, one more at every call."""
    if isinstance(tensor, nn.Parameter):
        raise CaptureError(
            f"the forward registers a hook on a parameter{_here()}, one more at every call: register it once, outside "
            "of the forward"
        )


def formatted() -> CaptureError:
    """What to raise where a forward formats a tensor."""
    return CaptureError(
        f"the forward formats a tensor{_here()} (print, str, an f-string), whose values a trace doesn't have, and "
        "which a planned step doesn't repeat: format its shape, or return it and look at it outside"
    )


def asking_user() -> types.FrameType | None:
    """The user's frame, if it is the one that calls what torch's own methods of tensors are asked through."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not private.is_users(frame.f_code.co_filename):
        if frame.f_code.co_name not in _ASKING:
            return None
        frame = frame.f_back
    return frame


_ASKING = ("asking_user", "__torch_function__", "handle_torch_function", "__repr__", "__format__")


def refuse_linearize() -> None:
    """Raise where a forward calls ``torch.func.linearize``."""
    raise CaptureError(
        f"the forward calls torch.func.linearize{_here()}, which traces, and can't within a trace: use torch.func.jvp"
    )


def _here() -> str:
    line = private.user_line()
    return f" at {line}" if line else ""


def refuse_other_layouts(result: Any) -> None:
    """Refuse a sparse value where the forward makes it: its backward may not even be traceable."""
    if isinstance(result, Tensor) and result.layout is not torch.strided:
        raise CaptureError(f"the forward makes a {_kind(result)}{_here()} ({_layout(result)}): {_way_of(result)}")


def refuse_unplannable(joint: private.JointTrace, names: Sequence[str]) -> None:
    """Objects without a value, collectives, sparse values, observers without a shape.

    Raises
    ------
    CaptureError
        It names the line, or the parameter whose gradient it is.
    """
    for gradient, name in zip(joint.gradients, names, strict=False):
        if gradient is not None and _sparse(gradient.meta["val"]) is not None:
            raise CaptureError(
                f"the gradient of {name} is sparse: build its layer with sparse=False, or keep it out of the wrapped "
                "module"
            )
    for node in joint.graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta:
            raise CaptureError(
                f"the step uses an object{_place(node)} that can't be planned ({node.target}): leave it out of the "
                "wrapped module"
            )
        if str(node.target).startswith(("c10d.", "_c10d_functional", "_dtensor.")):
            raise CaptureError(
                f"the step talks to other processes{_place(node)} ({node.target}), which a plan must neither repeat "
                "nor move: leave collectives out of the wrapped module"
            )
        found = _sparse(node.meta.get("val"))
        if found is not None:
            raise CaptureError(f"the step makes a {_kind(found)}{_place(node)} ({_layout(found)}): {_way_of(found)}")
        if node.target is aten._fused_moving_avg_obs_fq_helper_functional.default and _unshaped(node):
            raise CaptureError(_OBSERVER.format(place=_place(node)))


def _unshaped(node: fx.Node) -> bool:
    running_min = node.args[3]
    assert isinstance(running_min, fx.Node)
    per_channel = len(node.args) > 11 and bool(node.args[11])
    return per_channel and running_min.meta["val"].numel() == 0


def _sparse(value: Any) -> Tensor | None:
    return next((tensor for _, tensor in tensors_of(value) if tensor.layout is not torch.strided), None)


def _layout(tensor: Tensor) -> str:
    return str(tensor.layout).removeprefix("torch.").removeprefix("_")


def _kind(tensor: Tensor) -> str:
    return "sparse tensor" if "sparse" in _layout(tensor) else "tensor without plain storage"


def _way_of(tensor: Tensor) -> str:
    return _SPARSE_WAY if "sparse" in _layout(tensor) else _STRIDED_WAY


def _place(node: fx.Node) -> str:
    return f" at {node.meta['source']}" if node.meta.get("source") else ""


def library_folder(path: str) -> bool:
    """Is a file part of an installed package?"""
    return f"{os.sep}site-packages{os.sep}" in path or f"{os.sep}dist-packages{os.sep}" in path
