"""Values that follow from shapes, constants and inputs alone: Python may branch on them during a trace, as in eager.

A fake tensor has no values, so that ``if (positions[:, -1] == 0).all()`` stops a trace even where ``positions`` is an
arange. Every such value is a pure function of the captured shapes, which a plan is made for: it is computed when it is
asked for, and the branch that eager takes is the one that is captured.

A condition on inputs (``if mask.all()``) is answered for those that the plan is made with, and asked again at every
call: the other answer is another plan. Not numbers that are read from them, which may differ at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rematerialize import torch_private as private

MOST_ELEMENTS = 1 << 26  # of any tensor on the way: as many as a mask of 8,192 positions has
_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
_UNSET = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize")
_INPUT = "input"  # in the place of an op: reads the input at a position
_CALL = "_rematerialize_call"  # an attribute of fake tensors: the call that made them, if it made a known value

_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class KnownValues:
    """Follows the calls on fake tensors (see `torch_private.trace_joint`), and answers what reads a known value."""

    def __init__(self, inputs: Sequence[Tensor] = ()) -> None:
        self._inputs = inputs
        self.looks: list[Look] = []
        # Storages that an op wrote to, by address: their values aren't those that made them. Held, or an address
        # would come again.
        self._written: dict[int, Any] = {}

    def __call__(self, run: Callable[[], Any], op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(op, torch._ops.OpOverload):
            return run()
        tensors = list(_tensors((args, kwargs)))
        if torch.Tag.data_dependent_output in op.tags and all(map(self._is_known, tensors)):
            calls = _program((op, args, kwargs))
            answer = _run(calls, self._inputs)
            if all(made is not _INPUT for made, _, _ in calls):
                return answer
            if isinstance(answer, bool):
                self.looks.append(Look(calls, answer))
                return answer
        result = run()
        if op._schema.is_mutable:
            self._note_written(op, args, kwargs)
        elif isinstance(result, Tensor) and result.numel() <= MOST_ELEMENTS and _determined(op, tensors):
            if any(result is tensor for tensor in tensors):
                return result  # known already, or it would be made of itself
            held = tuple(one.clone() if op in _LIFTS and type(one) is Tensor else one for one in args)
            setattr(result, _CALL, (op, held, kwargs))
        return result

    def start(self, given: Sequence[Tensor]) -> None:
        """Note what stands for the inputs in a call of the traced function."""
        self.looks.clear()
        for at, (tensor, real) in enumerate(zip(given, self._inputs, strict=True)):
            if type(real) not in private.TRACED_KINDS and not (real.is_meta or real.requires_grad):
                setattr(private.fake_of(tensor), _CALL, (_INPUT, (at,), {}))

    def _note_written(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for at, argument in enumerate(op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[at] if at < len(args) else kwargs.get(argument.name)
                for tensor in _tensors(value):
                    storage = tensor.untyped_storage()
                    self._written[storage._cdata] = storage

    def _is_known(self, tensor: Tensor) -> bool:
        return hasattr(tensor, _CALL) and all(
            one.untyped_storage()._cdata not in self._written for one in _ancestors(tensor)
        )


def _determined(op: Any, tensors: list[Tensor]) -> bool:
    if torch.Tag.nondeterministic_seeded in op.tags or op.overloadpacket.__name__ in _UNSET:
        return False
    return op in _LIFTS or all(hasattr(tensor, _CALL) for tensor in tensors)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in private.tree_flatten(value)[0] if isinstance(leaf, Tensor))


def _ancestors(tensor: Tensor) -> Iterable[Tensor]:
    """A known fake tensor and all that it was made of, each after what it was made of."""
    found: dict[int, Tensor] = {}
    pending = [(tensor, False)]
    while pending:
        one, ready = pending.pop()
        if ready:
            found.setdefault(id(one), one)
        elif id(one) not in found and hasattr(one, _CALL):
            pending.append((one, True))
            pending += [(parent, False) for parent in _tensors(getattr(one, _CALL)[1:])]
    return found.values()


@dataclass(frozen=True, slots=True)
class _Result:
    """In the arguments of a program's calls: what the call at a position returned."""

    at: int


@dataclass(frozen=True, slots=True)
class Look:
    """A condition on the inputs alone that Python asked for: its calls in order, and the answer that the trace got."""

    calls: tuple[_Call, ...]
    answer: bool

    def holds(self, inputs: Sequence[Tensor]) -> bool:
        """Whether other inputs of the same layouts give the same answer."""
        return bool(_run(self.calls, inputs) == self.answer)


def _program(call: _Call) -> tuple[_Call, ...]:
    """A call and all that its arguments were made by, without the fake tensors."""
    places: dict[int, _Result] = {}
    calls: list[_Call] = []

    def placed(made: _Call) -> _Call:
        op, args, kwargs = made
        args, kwargs = private.tree_map(lambda leaf: places.get(id(leaf), leaf), (args, kwargs))
        return op, args, kwargs

    for read in _tensors(call[1:]):
        for one in _ancestors(read):
            if id(one) not in places:
                calls.append(placed(getattr(one, _CALL)))
                places[id(one)] = _Result(len(calls) - 1)
    return (*calls, placed(call))


def _run(calls: Sequence[_Call], inputs: Sequence[Tensor]) -> Any:
    """What a program's last call returns; autocast's casts are calls of their own in it."""
    results: list[Any] = []

    def real(leaf: Any) -> Any:
        if isinstance(leaf, torch.device) and leaf.type == "cuda" and not torch.cuda.is_available():
            return torch.device("cpu")  # a plan for a device that isn't there
        return results[leaf.at] if isinstance(leaf, _Result) else leaf

    with private.outside_of_modes(), private.disable_autocast(), torch.no_grad():
        for op, args, kwargs in calls:
            if op is _INPUT:
                results.append(inputs[args[0]])
            else:
                real_args, real_kwargs = private.tree_map(real, (args, kwargs))
                results.append(op(*real_args, **real_kwargs))
    return results[-1]
