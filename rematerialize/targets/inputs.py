"""Example inputs: made from SPECs, and resized to other batches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rematerialize.budget import device_bytes
from rematerialize.errors import TargetError, did_you_mean
from rematerialize.targets.specs import INTEGERS, InputSpec
from rematerialize.torch_private import tree_flatten, tree_unflatten
from rematerialize.units import format_bytes
from rematerialize.zoo.spec import Inputs

_SEED = 0
_ID_WORDS = ("id", "ids", "token", "tokens")


def make_inputs(specs: Sequence[InputSpec], model: nn.Module) -> Inputs:
    """Make the tensors that specs ask for: a dict if they have names, else a tuple.

    Raises
    ------
    TargetError
        If the model's forward takes no argument of a spec's name, or the call isn't complete.
    """
    parameters = _parameters(model.forward)
    _check_names(specs, parameters)
    _check_call(specs, model.forward)
    bound = smallest_table(model)
    generator = torch.Generator()
    generator.manual_seed(_SEED)
    tensors = []
    for position, spec in enumerate(specs):
        _check_room(spec)
        name = spec.name or (list(parameters)[position] if position < len(parameters) else "")
        if spec.dtype in INTEGERS and spec.bound is None and bound and set(name.split("_")) & set(_ID_WORDS):
            spec = replace(spec, bound=bound)
        tensors.append(_made(spec, generator))
    return {spec.name: tensor for spec, tensor in zip(specs, tensors, strict=True)} if specs[0].name else tuple(tensors)


def smallest_table(model: nn.Module) -> int:
    """Rows of the smallest embedding table of a model: integers below it are valid for all; 0 if there is none."""
    return min((module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)), default=0)


def _parameters(forward: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return {}  # a forward without a readable signature: the trace will tell


def _check_names(specs: Sequence[InputSpec], parameters: dict[str, inspect.Parameter]) -> None:
    if not parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for spec in specs:
        if spec.name and spec.name not in parameters:
            near = did_you_mean(spec.name, parameters)
            takes = ", ".join(parameters)
            raise TargetError(
                f"the forward takes no input {spec.name!r}{near or ''}; it takes {takes} (in {str(spec)!r})"
            )


def _check_call(specs: Sequence[InputSpec], forward: Callable[..., Any]) -> None:
    """Is anything missing, or too much?"""
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return
    try:
        if specs[0].name:
            signature.bind(**{spec.name: None for spec in specs})
        else:
            signature.bind(*specs)
    except TypeError as error:
        given = " ".join(map(str, specs))
        raise TargetError(f"the inputs {given} don't fit the forward: {error}; it takes {signature}") from None


def _check_room(spec: InputSpec) -> None:
    """Refuse what this machine can't hold before the system ends the process for it; fake tensors take nothing."""
    size_bytes = math.prod(spec.shape) * getattr(torch, spec.dtype).itemsize
    has = device_bytes(torch.device("cpu"))
    if size_bytes > has and type(torch.empty(0)) is Tensor:
        raise TargetError(
            f"the input {str(spec)!r} takes {format_bytes(size_bytes)}, this machine has {format_bytes(has)}: make it "
            "smaller, or name a --device that isn't here (rematerialize devices), for which nothing is allocated"
        )


def argument_hint(model: nn.Module) -> str:
    """How the inputs that a model's forward takes may be given: ``--input`` for each argument without a default."""
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [
        name
        for name, parameter in _parameters(model.forward).items()
        if parameter.kind in plain and parameter.default is inspect.Parameter.empty
    ]
    return " ".join(f"--input {name}={_likely(name)}" for name in needed) or "--input float32[8,64]"


def _likely(name: str) -> str:
    words = set(name.lower().split("_"))
    return "int64[8,64]" if words & {*_ID_WORDS, "label", "labels", "target", "targets"} else "float32[8,64]"


def _made(spec: InputSpec, generator: torch.Generator) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype == torch.bool:
        return torch.ones(spec.shape, dtype=dtype)
    if spec.dtype in INTEGERS:
        if spec.bound is None:
            return torch.zeros(spec.shape, dtype=dtype)
        if spec.bound - 1 > torch.iinfo(dtype).max:
            raise TargetError(f"expected a bound that {spec.dtype} can hold, got {spec.bound} in {str(spec)!r}")
        return torch.randint(spec.bound, spec.shape, dtype=dtype, generator=generator)
    return torch.randn(spec.shape, dtype=dtype, generator=generator)


def flat_tensors(inputs: Inputs) -> list[Tensor]:
    """All tensors of a call, in containers, too."""
    return [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]


def batch_of(inputs: Inputs, dim: int) -> int:
    """The batch of a call: the size along ``dim`` of the first tensor that has such a dimension.

    Raises
    ------
    TargetError
        If no tensor has one.
    """
    for tensor in flat_tensors(inputs):
        if _has(tensor, dim):
            return tensor.shape[dim]
    raise TargetError(
        f"expected an input with a dimension {dim} for the batch, but none has one; give another --batch-dim"
    )


def resized(inputs: Inputs, batch: int, dim: int) -> Inputs:
    """The same inputs at another batch.

    Tensors whose size along ``dim`` is the present batch are repeated along it, then cut: every value is one that
    was there, so that indices and classes stay valid. Other tensors stay the same objects.

    Raises
    ------
    TargetError
        If no tensor has such a dimension, or the batch isn't positive.
    """
    if batch < 1:
        raise TargetError(f"expected a batch of at least 1, got {batch}")
    present = batch_of(inputs, dim)
    flat, spec = tree_flatten(inputs)
    made: dict[int, Tensor] = {}  # a tensor that is passed twice stays one
    for leaf in flat:
        if isinstance(leaf, Tensor) and _has(leaf, dim) and leaf.shape[dim] == present and id(leaf) not in made:
            made[id(leaf)] = _repeated(leaf, batch, dim)
    again: Inputs = tree_unflatten([made.get(id(leaf), leaf) for leaf in flat], spec)
    return again


def _has(tensor: Tensor, dim: int) -> bool:
    return -tensor.dim() <= dim < tensor.dim()


def _repeated(tensor: Tensor, batch: int, dim: int) -> Tensor:
    present = tensor.shape[dim]
    with torch.no_grad():
        times = -(-batch // present) if present else 1
        whole = torch.cat([tensor.detach()] * times, dim) if times > 1 else tensor.detach()
        cut = whole.narrow(dim, 0, min(batch, whole.shape[dim])).clone(memory_format=torch.contiguous_format)
    return cut.requires_grad_(tensor.requires_grad)
