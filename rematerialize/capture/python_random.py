"""Python objects that a forward moves: as they were once a trace is done.

A planned step repeats no draw from a ``random.Random``, a numpy generator or an iterator, and no count of an object's
own. `python_state` has their state, so that a forward that moves them is refused; planning must not move them either.
"""

from __future__ import annotations

import contextlib
import random
import types
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from rematerialize.capture.containers import plain, refill
from rematerialize.python_state import look_around, slots_of, state_of


class kept_python:
    """A context for all traced calls of a forward together.

    On exit, generators and iterators are where they were. When an exception leaves, so are the fields, entries and
    variables that `python_state` looked at; else they keep what the forward set, a default that it fills in for one.

    Parameters
    ----------
    model : nn.Module
        Whose forward is traced.
    forward : callable
        The forward, as `python_state` takes it.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        modules = list(model.modules())
        _, look, known = look_around(modules, forward)
        self.variables = [
            (scope if owner is None else owner, name, scope[name])
            for _, scope, name, owner in known.data
            if name in scope
        ]
        self.generators: list[tuple[Any, Any]] = []
        self.tables: list[tuple[Any, Any]] = []
        self.slots: list[tuple[Any, dict[str, Any]]] = []
        for value in look.objects.values():
            if _is_generator(value):
                self.generators.append((value, state_of(value)))
            elif isinstance(value, dict | list):
                self.tables.append((value, plain(value)))
            elif hasattr(value, "__dict__"):
                self.tables.append((vars(value), dict(vars(value))))
            else:
                kind: type = type(value)
                slots = {name: getattr(value, name) for name in slots_of(kind) if hasattr(value, name)}
                self.slots.append((value, slots))
        self.modules = [(vars(module), dict(vars(module))) for module in modules]
        self.iterators: list[tuple[Any, Any, Any]] = []

    def __enter__(self) -> None:
        """Iterators can't be set back: the trace moves copies of them."""
        for table, before in (*self.tables, *self.modules):
            for key, value in before.items() if isinstance(before, dict) else enumerate(before):
                self._stand_in(table, key, value)
        for owner, name, value in self.variables:
            self._stand_in(owner, name, value)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for table, key, value in self.iterators:
            _put(table, key, value)
        for generator, state in self.generators:
            _set_state(generator, state)
        if kind is None:
            return
        for table, before in self.tables:
            refill(table, before)
        for owner, name, value in self.variables:
            if (vars(owner) if isinstance(owner, type) else owner)[name] is not value:
                _put(owner, name, value)
        for value, slots in self.slots:
            for name, entry in slots.items():
                object.__setattr__(value, name, entry)

    def _stand_in(self, table: Any, key: Any, value: Any) -> None:
        if not hasattr(type(value), "__next__") or isinstance(value, types.GeneratorType):
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                stand_in = _copied(value)
        except TypeError:  # a file, for one
            return
        self.iterators.append((table, key, value))
        _put(table, key, stand_in)


def _put(table: Any, key: Any, value: Any) -> None:
    if isinstance(table, type):
        setattr(table, key, value)
    else:
        table[key] = value


def _copied(value: Any) -> Any:
    """A copy of an iterator and of those within it, over the same values."""
    if not hasattr(type(value), "__next__"):
        return list(value) if type(value) is list else value  # what a cycle has seen so far grows
    made = value.__reduce__()
    if isinstance(made, str) or made[0].__module__ not in ("builtins", "itertools"):
        raise TypeError("an iterator that isn't copied by a call of its type")
    found = made[0](*[part if type(part) is list else _copied(part) for part in made[1]])
    if len(made) > 2 and made[2] is not None:
        found.__setstate__(tuple(map(_copied, made[2])) if isinstance(made[2], tuple) else made[2])
    return found


def _is_generator(value: object) -> bool:
    return isinstance(value, random.Random) or type(value).__module__.startswith("numpy.random")


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        if state is not None:  # the system's has none
            generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        with contextlib.suppress(AttributeError):  # a sequence of seeds, for one
            (generator.bit_generator if hasattr(generator, "bit_generator") else generator).state = state
