"""Python state around a trace: put back what the forward changes, refuse what a planned step can't repeat.

A planned step runs the recorded tensor operations, not the forward's Python. Caches that the forward fills are
harmless: they are put back, and what they hold is part of the step. Counters, Python's own random numbers, and
losses left on an attribute would silently be missed: they are refused.
"""

from __future__ import annotations

import functools
import gc
import random
import sys
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rematerialize.errors import CaptureError

_LIBRARIES = ("torch", "sympy", "numpy", "rematerialize")
_PLAIN = (int, float, bool, str, complex)
_CONTAINERS = (list, dict, set)
_ABSENT = object()


class FunctionCaches:
    """The ``functools.lru_cache`` functions of this process, torch's own aside.

    One that a traced forward fills would keep a tensor of the trace, which breaks eager calls after it: what the
    forward missed in it is forgotten again.
    """

    def __init__(self) -> None:
        kind = functools._lru_cache_wrapper
        self.functions = [
            found
            for found in gc.get_objects()
            if type(found) is kind and not (getattr(found, "__module__", "") or "").startswith(_LIBRARIES)
        ]
        self.misses: list[int] = []

    def note(self) -> None:
        """Remember how often each was missed so far."""
        self.misses = [function.cache_info().misses for function in self.functions]

    def forget(self) -> None:
        """Clear those that were missed since."""
        for function, misses in zip(self.functions, self.misses, strict=True):
            if function.cache_info().misses != misses:
                function.cache_clear()


@dataclass(slots=True)
class Settled:
    """Plain attributes that the first traced call set: (module number, name) to value; ``calls`` so far.

    ``entries`` are those of attributes that are dicts and lists, by (module number, name, key).
    """

    values: dict[tuple[int, str], Any] = field(default_factory=dict)
    entries: dict[tuple[int, str, Any], Any] = field(default_factory=dict)
    calls: int = 0


class unchanged_python:
    """A context for one call of a forward: on exit everything is as it was, or a CaptureError says what isn't.

    A trace calls the forward more than once. A plain attribute may be set in the first call if the next one, which
    starts from that value, leaves it there (``self.window_size = ...`` from the input's shape): ``settled`` carries
    such values from call to call. A counter moves on, and is refused.
    """

    def __init__(self, model: nn.Module, caches: FunctionCaches, settled: Settled) -> None:
        self.modules = list(model.named_modules())
        self.caches = caches
        self.settled = settled

    def __enter__(self) -> None:
        self.attributes = [dict(vars(module)) for _, module in self.modules]
        for (index, name), value in self.settled.values.items():
            vars(self.modules[index][1])[name] = value
        self.contents = [
            {name: value.copy() for name, value in own.items() if isinstance(value, _CONTAINERS)}
            for own in self.attributes
        ]
        for (index, name, key), value in self.settled.entries.items():
            self.attributes[index][name][key] = value
        self.random = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = numpy.random.get_state() if numpy is not None else None
        self.caches.note()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.caches.forget()
        found = self._restore_generators()
        for index, (prefix, module) in enumerate(self.modules):
            found += [f"{prefix}.{name}".lstrip(".") for name in self._moved(index, module)]
            left = _restore(module, self.attributes[index], self.contents[index])
            found += [f"{prefix}.{name}".lstrip(".") for name in left]
        self.settled.calls += 1
        if found and kind is None:
            raise CaptureError(
                f"the forward changes {', '.join(found[:3])}, which a planned step can't repeat: make a counter a "
                "buffer (register_buffer), return a loss instead of leaving it on the module, draw random numbers "
                "with torch"
            )

    def _moved(self, index: int, module: nn.Module) -> list[str]:
        """Plain attributes that the forward set to another value than it found, the first call's excused."""
        moved = []
        for name, now in vars(module).items():
            before = self.settled.values.get((index, name), self.attributes[index].get(name))
            if isinstance(now, _PLAIN) and isinstance(before, _PLAIN) and now != before:
                if self.settled.calls:
                    moved.append(name)
                self.settled.values[index, name] = now
        for name, copy in self.contents[index].items():
            for key, now in _entries(self.attributes[index][name]):
                before = self.settled.entries.get((index, name, key), _entry(copy, key))
                if isinstance(now, _PLAIN) and isinstance(before, _PLAIN) and now != before:
                    if self.settled.calls:
                        moved.append(name)
                    self.settled.entries[index, name, key] = now
        return moved

    def _restore_generators(self) -> list[str]:
        found = []
        if random.getstate() != self.random:
            random.setstate(self.random)
            found.append("the state of Python's random module")
        numpy = sys.modules.get("numpy")
        if numpy is not None and self.numpy is not None:
            now = numpy.random.get_state()
            if now[2:] != self.numpy[2:] or bool((now[1] != self.numpy[1]).any()):
                numpy.random.set_state(self.numpy)
                found.append("the state of numpy's random module")
        return found


class kept_whole:
    """The model as it was, should a trace be interrupted where nothing else puts it back (ctrl-C at any line)."""

    def __init__(self, model: nn.Module) -> None:
        self.tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.contents: list[tuple[Any, Any]] = []
        for module in model.modules():
            own = vars(module)
            for table in (own, module._parameters, module._buffers, module._modules):
                self.tables.append((table, dict(table)))
            self.contents += [(value, value.copy()) for value in own.values() if isinstance(value, _CONTAINERS)]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None or issubclass(kind, Exception):
            return
        for table, before in (*self.tables, *self.contents):
            _refill(table, before)


def _restore(module: nn.Module, own: dict[str, Any], contents: dict[str, Any]) -> list[str]:
    """Put a module's attributes back; returns the names of those that must not change.

    A weight with a ``_orig`` parameter is computed from it at each call (spectral_norm, prune).
    """
    table = vars(module)
    found = []
    for name in list(table):
        before, now = own.get(name), table[name]
        if name not in own or before is not now:
            if _matters(before, now) and f"{name}_orig" not in module._parameters:
                found.append(name)
            if name in own:
                table[name] = before
            else:
                del table[name]
    table.update({name: value for name, value in own.items() if name not in table})
    for name, copy in contents.items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        if _grew_losses(own[name], copy):
            found.append(name)
        _refill(own[name], copy)
    return found


def _entries(container: Any) -> list[tuple[Any, Any]]:
    """Keys or positions of a container that can be set again, with what stands there."""
    if isinstance(container, dict):
        return list(container.items())
    return list(enumerate(container)) if isinstance(container, list) else []


def _entry(container: Any, key: Any) -> Any:
    """What stands at a key or a position; ``_ABSENT`` where nothing does: a new entry is no counter."""
    if isinstance(container, dict):
        return container.get(key, _ABSENT)
    return container[key] if key < len(container) else _ABSENT


def _matters(before: Any, now: Any) -> bool:
    derived = isinstance(before, Tensor) and before.grad_fn is not None  # weight_norm's weight, computed each call
    return isinstance(now, Tensor) and now.requires_grad and not derived


def _grew_losses(container: Any, before: Any) -> bool:
    values = list(container.values()) if isinstance(container, dict) else list(container)
    known = {id(value) for value in (before.values() if isinstance(before, dict) else before)}
    return any(isinstance(v, Tensor) and v.requires_grad and id(v) not in known for v in values)


def _refill(container: Any, before: Any) -> None:
    same = len(container) == len(before)
    if same and isinstance(container, dict):
        same = all(key in before and before[key] is value for key, value in container.items())
    elif same and isinstance(container, list):
        same = all(a is b for a, b in zip(container, before, strict=True))
    elif same:
        same = container == before
    if not same:
        container.clear()
        if isinstance(container, list):
            container.extend(before)
        else:
            container.update(before)
