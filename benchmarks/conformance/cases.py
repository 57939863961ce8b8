"""The cases: torch's databases of modules and operators, as modules that can be trained for a step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

SEED = 7
SAMPLES = 4  # per operator
MODULE_SAMPLES = 12  # per module; of more (there are some with hundreds), so many from first to last
LARGEST = 20_000  # elements of all tensors of a sample: more would test no other code
DOUBLE_MODULES = frozenset({"nn.Linear", "nn.BatchNorm2d", "nn.Conv2d", "nn.LSTM", "nn.GRU", "nn.MultiheadAttention"})
SUITES = ("modules", "ops", "layouts")


@dataclass(frozen=True, slots=True)
class Case:
    """One module and one call of it; `index` counts the samples of its name, types one after the other."""

    name: str
    index: int
    dtype: str
    make: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]


def names(suite: str) -> list[str]:
    """Return every name of a suite that has something to train, in torch's order, variants as "name.variant"."""
    if suite == "layouts":
        return [*_modules(), *_operators()]
    return list(_modules() if suite == "modules" else _operators())


def cases(suite: str, name: str, samples: int = SAMPLES) -> Iterator[Case]:
    """Return the cases of one name; the same ones at every call."""
    as_module = suite == "modules" or (suite == "layouts" and name in _modules())
    return _module_cases(name) if as_module else _operator_cases(name, samples)


@functools.lru_cache(maxsize=1)
def _modules() -> dict[str, Any]:
    from torch.testing._internal.common_modules import module_db  # here: it takes seconds

    return {info.name: info for info in module_db}


@functools.lru_cache(maxsize=1)
def _operators() -> dict[str, Any]:
    from torch.testing._internal import common_methods_invocations as methods

    # Torch's random cases draw from a generator that they seed and put back in the call. Here the step is seeded.
    methods.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    found = {}
    for op in methods.op_db:
        if op.supports_autograd and op.supported_backward_dtypes("cpu"):
            found[f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name] = op
    return found


def _module_cases(name: str) -> Iterator[Case]:
    info = _modules()[name]
    index = 0
    for dtype in (torch.float32, torch.float64) if name in DOUBLE_MODULES else (torch.float32,):
        if dtype not in info.dtypes:
            continue
        torch.manual_seed(SEED)
        inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
        for sample in _some(list(inputs)):
            yield Case(name, index, _short(dtype), functools.partial(_build_module, info, sample, dtype))
            index += 1


def _some(samples: list[Any]) -> list[Any]:
    count = min(len(samples), MODULE_SAMPLES)
    return [samples[at * len(samples) // count] for at in range(count)]


def _build_module(info: Any, sample: Any, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(SEED)
    module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
    module = module.to(dtype).train()
    call = sample.forward_input
    args, kwargs = detached((tuple(call.args), dict(call.kwargs)))
    if info.is_lazy:
        module(*copy.deepcopy(args), **copy.deepcopy(kwargs))  # makes its parameters, as its users do
    return module, args, kwargs


def _operator_cases(name: str, samples: int) -> Iterator[Case]:
    op = _operators()[name]
    dtypes = op.supported_backward_dtypes("cpu")
    dtype = next((dtype for dtype in (torch.float32, torch.complex64, torch.float64) if dtype in dtypes), None)
    if dtype is None:
        return
    torch.manual_seed(SEED)
    index = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        if index == samples:
            return
        call = (sample.input, tuple(sample.args), dict(sample.kwargs))
        leaves = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
        if sum(leaf.numel() for leaf in leaves) > LARGEST or not any(leaf.requires_grad for leaf in leaves):
            continue
        yield Case(name, index, _short(dtype), functools.partial(_build_operator, op.op, call, bool(index % 2)))
        index += 1


def _build_operator(
    op: Callable[..., Any], call: Any, as_inputs: bool
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    model = OperatorModule(op, detached(call), as_inputs)
    return model, tuple(model.arguments), {}


class OperatorModule(nn.Module):
    """One operator as a module: what it differentiates are parameters or inputs, other tensors buffers."""

    def __init__(self, op: Callable[..., Any], call: Any, as_inputs: bool) -> None:
        super().__init__()
        leaves, self.spec = pytree.tree_flatten(call)
        self.op = op
        self.constants: list[Any] = []
        self.places: list[Any] = []  # an attribute's name, an argument's number, or None: a constant
        arguments: list[Tensor] = []
        self.__dict__["arguments"] = arguments
        seen: dict[int, Any] = {}
        for leaf in leaves:
            place: Any = None
            if isinstance(leaf, Tensor):
                place = seen.get(id(leaf))
                if place is None:
                    place = self._keep(leaf, as_inputs, len(seen))
                seen[id(leaf)] = place
            self.places.append(place)
            self.constants.append(None if place is not None else leaf)

    def _keep(self, tensor: Tensor, as_inputs: bool, number: int) -> str | int:
        if tensor.requires_grad and as_inputs:
            self.arguments.append(tensor)
            return len(self.arguments) - 1
        if tensor.requires_grad:
            self.register_parameter(f"tensor{number}", nn.Parameter(tensor.detach()))
        else:
            self.register_buffer(f"tensor{number}", tensor)
        return f"tensor{number}"

    def forward(self, *inputs: Tensor) -> Any:
        leaves = []
        for place, constant in zip(self.places, self.constants, strict=True):
            if isinstance(place, int):
                leaves.append(inputs[place])
            else:
                leaves.append(constant if place is None else getattr(self, place))
        first, args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.op(first, *args, **kwargs)


def detached(tree: Any) -> Any:
    """Return a deep copy whose tensors are leaves; layouts, and storages that are shared, stay so."""
    memo: dict[int, Any] = {}
    done: dict[int, Tensor] = {}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in done:
            done[id(leaf)] = copy.deepcopy(leaf.detach(), memo).requires_grad_(leaf.requires_grad)
        return done[id(leaf)]

    return pytree.tree_map(copied, tree)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
