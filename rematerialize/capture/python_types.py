"""``type(x) is torch.Tensor`` in a forward: answered during a trace as in eager, where its tensors are of other types.

``isinstance`` needs no help: what a trace passes on are subclasses of Tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from rematerialize import torch_private as private


class _AsType(type):
    """Makes `_Type` stand for the built-in ``type`` in calls and checks."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        found = type(*args, **kwargs)
        if len(args) == 1 and found in private.TRACED_KINDS:
            return nn.Parameter if isinstance(args[0], nn.Parameter) else Tensor
        return found

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, type)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is type

    def __hash__(cls) -> int:
        return hash(type)


class _Type(type, metaclass=_AsType):
    pass


@contextlib.contextmanager
def eagers_types(scopes: Sequence[dict[str, Any]]) -> Iterator[None]:
    """While active, ``type`` in the global variables of the user's modules says what eager's says of a tensor."""
    taken = [scope for scope in scopes if "type" not in scope]
    for scope in taken:
        scope["type"] = _Type
    try:
        yield
    finally:
        for scope in taken:
            scope.pop("type", None)
