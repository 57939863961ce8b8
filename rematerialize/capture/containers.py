"""What Python's containers hold, read and written past the methods of a user's class.

A subclass of a dict may make its entries as they are read (a registry of classes that returns instances): a copy that
asks it has other values in it, and putting those back would leave the user's registry in ruins.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

CONTAINERS = (list, dict, set, deque)
_KINDS: tuple[Any, ...] = (OrderedDict, *CONTAINERS)  # the first that fits: its own methods know its order


def plain(container: Any) -> Any:
    """Return a copy as a dict, a list or a set, whatever the class."""
    kind = _kind(container)
    if issubclass(kind, dict):
        return dict(kind.items(container))
    return set(kind.__iter__(container)) if kind is set else list(kind.__iter__(container))


def entries(container: Any) -> list[tuple[Any, Any]]:
    """Return keys or positions with what stands there; of a set the values themselves."""
    found = plain(container)
    return list(found.items() if isinstance(found, dict) else enumerate(found))


def set_entry(container: Any, key: Any, value: Any) -> None:
    """Put a value at a key, or at a position of a list that may be its end."""
    kind = _kind(container)
    if issubclass(kind, dict) or key < kind.__len__(container):
        kind.__setitem__(container, key, value)
    else:
        kind.append(container, value)


def refill(container: Any, before: Any) -> bool:
    """Fill a container with what ``plain`` returned for it; return whether it held something else."""
    now = plain(container)
    same = len(now) == len(before)
    if same and isinstance(now, dict):
        same = all(key in before and before[key] is value for key, value in now.items())
    elif same:
        same = now == before if isinstance(now, set) else all(a is b for a, b in zip(now, before, strict=True))
    if same:
        return False
    kind = _kind(container)
    kind.clear(container)
    if issubclass(kind, dict):
        for key, value in before.items():
            kind.__setitem__(container, key, value)
    else:
        (kind.update if kind is set else kind.extend)(container, before)
    return True


def _kind(container: Any) -> Any:
    return next(kind for kind in _KINDS if isinstance(container, kind))
