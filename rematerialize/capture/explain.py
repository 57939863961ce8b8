"""One sentence for whatever a trace raised: what, where in the user's code, and what to do."""

from __future__ import annotations

import os
import traceback
from typing import Any

from torch import Tensor

from rematerialize import torch_private as private
from rematerialize.capture.refusals import library_folder, way_round
from rematerialize.errors import CaptureError

_DATA_DEPENDENT = ("DataDependentOutputException", "GuardOnDataDependentSymNode", "DynamicOutputShapeException")


_LOOKS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__})


def looks_at_values(function: Any, error: Exception) -> bool:
    """Whether a function raised in a trace because it asks for values, which eager has."""
    return type(error).__name__ in _DATA_DEPENDENT or function in _LOOKS


# What torch says when a trace fails, and what it means here; the first that fits.
_TOLD = (
    (
        "as_strided() is non-compositional",
        "the forward changes a view in place that as_strided made of another view{place}, which a trace can't "
        "follow: change a clone() of it, or take the view with narrow, select, view or transpose",
    ),
    (
        "Attempting to use FunctionalTensor on its own",
        "the forward runs operations in another thread{place}, which a trace doesn't see: run them in the thread "
        "that calls the model",
    ),
    (
        "Cannot backprop through mirrored meta",
        "the forward calls backward(){place}: take gradients by torch.autograd.grad(outputs, inputs, "
        "create_graph=True), which returns them instead of writing to .grad",
    ),
    (
        "support the deepcopy protocol",
        "the forward copies a module or a parameter (copy.deepcopy){place}, which isn't a leaf in a trace: make "
        "the copy once, outside of the forward, or call torch.func.functional_call with other values",
    ),
    (
        "you can only change requires_grad flags of leaf",
        "the forward freezes a part of itself{place} (requires_grad_(False)): do it before the forward (the step "
        "is planned again), or detach() what the part returns",
    ),
    (
        "Cannot assign non-leaf Tensor to parameter",
        "the forward assigns a parameter{place}: tie weights once, outside of the forward, or call "
        "torch.func.functional_call with other values",
    ),
    (
        "self.shape_env must not be None",
        "the forward makes a nested (jagged) tensor{place}: pad its rows and mask them",
    ),
    (
        "mutating a non-functional tensor",
        "a tensor is changed in place by what runs apart from the step{place} (a hook, a function of an inner "
        "derivative), which a recorded step can't repeat: change it in the forward itself, or between steps",
    ),
)


def explain(error: Exception, *, in_backward: bool) -> CaptureError:
    """One sentence for whatever the trace raised: what, where in the user's code, what to do."""
    error = _first_look(error)
    where = _user_frame(error)
    place = f" at {where}" if where else ""
    name = type(error).__name__
    text = " ".join(str(error).split())
    if name in _DATA_DEPENDENT:
        return CaptureError(
            f"the forward depends on the values of its tensors{place} (control flow or a shape that is known "
            f"only at run time: {text[:120]}): {way_round(text, _files(error))}"
        )
    mixed = "convert all Tensors to FakeTensors" in text or "Unexpected fake" in text
    if mixed and in_backward:
        return CaptureError(
            f"a backward reads a tensor that isn't part of the step{place}, a parameter through a module for one: give "
            "it to the autograd.Function as an argument, and return its gradient"
        )
    if mixed:
        return CaptureError(
            f"the forward uses a tensor that is neither a parameter, a buffer, an attribute of a module nor an input"
            f"{place}: keep it with register_buffer, or pass it as an argument, itself or in a list, tuple, dict or "
            "dataclass that torch.utils._pytree knows (other objects aren't looked into)"
        )
    if type(error).__module__.startswith("torch._dynamo"):
        return CaptureError(
            f"the forward runs what torch.compile compiles{place} (a compiled part, torch.cond, while_loop, scan), "
            "which can't be within a trace: take the part that was compiled (part._orig_mod), torch.where for a branch "
            "and a Python loop for a loop"
        )
    for needle, told in _TOLD:
        if needle in text:
            return CaptureError(told.format(place=place))
    stage = "backward" if in_backward else "forward"
    return CaptureError(f"the model's {stage} raised {name}{place} during capture: {text[:300]}")


def _first_look(error: Exception) -> Exception:
    """Where a handler looked at values, too, before it would have raised again: what it was to handle."""
    first, seen = error, error.__context__
    while seen is not None:
        if isinstance(seen, Exception) and type(seen).__name__ in _DATA_DEPENDENT:
            first = seen
        seen = seen.__context__
    return first


def _user_frame(error: BaseException) -> str:
    """The innermost frame outside torch and this package, as "file.py:12 in forward: source line".

    Where the user's own line called a library, both are named.
    """
    seen: BaseException | None = error
    while seen is not None:
        frames = [f for f in traceback.extract_tb(seen.__traceback__) if private.is_users(f.filename)]
        inside = [f for f in frames if f.name not in ("<module>",) and not f.filename.startswith("<")]
        if inside:
            own = [frame for frame in inside if not library_folder(frame.filename)]
            frame, last = (own or inside)[-1], inside[-1]
            within = "" if frame is last else f" (inside, {os.path.basename(last.filename)}:{last.lineno}: {last.line})"
            return f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}: {frame.line}{within}"
        seen = seen.__cause__ or seen.__context__
    return ""


def _files(error: BaseException) -> list[str]:
    """Every file that the error passed through, with "/" between folders."""
    found: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        found += [frame.filename.replace(os.sep, "/") for frame in traceback.extract_tb(seen.__traceback__)]
        seen = seen.__cause__ or seen.__context__
    return found
