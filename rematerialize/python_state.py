"""The Python values that a forward can read besides tensors: a trace bakes them in, so a plan holds for them only.

Which ones a forward reads can't be known without running it, so names decide: what the code of the model's classes
mentions, and the functions that this code calls by name. An attribute of a config object, an entry of a list, a class
attribute or a global variable that bears such a name is part of the signature; anything else, such as a trainer that a
model points to, is not.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
DEPTH = 6  # of objects within objects
MANY = 4_000  # entries of a container beyond which only its length counts
FUNCTIONS = 2_000  # of one model that are searched for names
# Packages whose code doesn't change what it computes; pytest rewrites the asserts of tests into calls of its own.
_OWN = ("torch", "numpy", "rematerialize", "builtins", "pytest", "_pytest")
_RECORDS = (types.SimpleNamespace,)  # of the standard library, and yet a user's record
_MODULE = frozenset(vars(nn.Module()))

PythonState = tuple[tuple[str, Hashable], ...]
Place = tuple[str, dict[str, Any], str]  # for messages, and where to read


@dataclass(frozen=True, slots=True)
class Readable:
    """What the code of some classes can read.

    ``names`` are the identifiers that it mentions, ``places`` the global variables and class attributes.
    """

    names: frozenset[str]
    places: tuple[Place, ...]


@functools.lru_cache(maxsize=64)
def readable(
    classes: frozenset[type], functions: frozenset[types.FunctionType] = frozenset(), start: str = "forward"
) -> Readable:
    """Search what runs from functions, and from a method of classes and their bases, for what it reads.

    A mentioned name stands for every method of that name.
    """
    owners = {base for cls in classes for base in cls.__mro__ if not _own(base.__module__)}
    search = _Search()
    for owner in sorted(owners, key=lambda cls: (cls.__module__, cls.__qualname__)):
        for name, value in vars(owner).items():
            search.members.setdefault(name, []).append(value)
    for value in (*search.members.get(start, ()), *functions):
        search.push(value)
    search.run()
    # A mappingproxy can't be kept as the dict it is, and needn't: it reads through.
    attributes = [
        (f"{owner.__name__}.{name}", vars(owner), name)
        for owner in owners
        for name in sorted(vars(owner).keys() & search.names)
        if _counts(vars(owner)[name])
    ]
    return Readable(frozenset(search.names), (*search.places.values(), *attributes))  # type: ignore[arg-type]


def python_state(modules: list[nn.Module], function: object = None) -> PythonState:
    """Return a name and a fingerprint for each Python value that the modules' forwards can read.

    Plain attributes of the modules themselves are left out: `signature` has them.
    """
    functions = frozenset([function]) if isinstance(function, types.FunctionType) else frozenset()
    known = readable(frozenset(map(type, modules)), functions)
    look = _Look(known.names)
    found = [(path, look.at(scope[name])) for path, scope, name in known.places if name in scope]
    for module in modules:
        for name, value in vars(module).items():
            if name not in _MODULE and type(value) not in PLAIN and name in known.names and _counts(value):
                found.append((f"{type(module).__name__}.{name}", look.at(value)))
    return tuple(found)


def changed(before: PythonState, now: PythonState) -> list[str]:
    """Return the names of what differs between two states."""
    return sorted({name for name, _ in {*before} ^ {*now}})


def fingerprint(value: object) -> Hashable:
    """Return what tells a value that is passed to a forward from another, every field of an object included."""
    return _Look(None).at(value)


@dataclass(slots=True)
class _Search:
    """A walk over functions, from those of the model's classes to those that they call by name."""

    members: dict[str, list[object]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    places: dict[tuple[int, str], Place] = field(default_factory=dict)
    seen: set[types.CodeType] = field(default_factory=set)
    todo: list[types.FunctionType] = field(default_factory=list)

    def push(self, value: object) -> None:
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, functools.partial):
            value = value.func
        if isinstance(value, property):
            for part in (value.fget, value.fset):
                self.push(part)
        if isinstance(value, types.MethodType):
            value = value.__func__
        if isinstance(value, types.FunctionType) and value.__code__ not in self.seen and not _own(value.__module__):
            self.seen.add(value.__code__)
            self.todo.append(value)

    def run(self) -> None:
        while self.todo and len(self.seen) < FUNCTIONS:
            self._visit(self.todo.pop())

    def _visit(self, function: types.FunctionType) -> None:
        mentioned = set(_mentioned(function.__code__))
        for name in sorted(mentioned - self.names):
            for value in self.members.get(name, ()):
                self.push(value)
        self.names |= mentioned
        scope = function.__globals__
        for name in sorted(mentioned & scope.keys()):
            value = scope[name]
            if isinstance(value, types.ModuleType):
                if not _own(value.__name__):
                    self._module(value, mentioned)
            elif _counts(value):
                self._place(f"{function.__module__}.{name}", scope, name)
            else:
                self.push(value)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if _counts(value) and name not in mentioned:
                continue
            if _counts(value):
                self._place(f"{name} of {function.__qualname__}", _Cell(cell), name)
            else:
                self.push(value)

    def _module(self, module: types.ModuleType, mentioned: set[str]) -> None:
        for name in sorted(mentioned & vars(module).keys()):
            value = vars(module)[name]
            if _counts(value):
                self._place(f"{module.__name__}.{name}", vars(module), name)
            else:
                self.push(value)

    def _place(self, path: str, scope: dict[str, Any], name: str) -> None:
        self.places.setdefault((id(scope), name), (path, scope, name))


class _Cell(dict[str, Any]):
    """A closure's cell as a scope of one name."""

    def __init__(self, cell: types.CellType) -> None:
        super().__init__()
        self._cell = cell

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:
            return None


_LOADS = ("LOAD_NAME", "LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_SUPER_ATTR")
_FILLS = ("append", "appendleft", "extend", "add")  # what is only filled, a log for one, isn't read


def _mentioned(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a function's code reads, those of functions within it, and texts that getattr may take."""
    instructions = list(dis.get_instructions(code))
    for now, after in zip(instructions, [*instructions[1:], None], strict=True):
        if now.opname in _LOADS and not (after and after.opname in _LOADS and after.argval in _FILLS):
            yield now.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _mentioned(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


@functools.lru_cache(maxsize=4_096)
def _own(module: str | None) -> bool:
    root = (module or "").partition(".")[0]
    return root in _OWN or root in sys.stdlib_module_names


def _counts(value: object) -> bool:
    """Whether a value may decide what a forward computes: data, as opposed to code, tensors and modules."""
    kind = type(value)
    if kind in PLAIN or isinstance(value, (Sequence, Set, Mapping, Enum, *_RECORDS)):
        return True
    if isinstance(value, Tensor | nn.Module | type | types.ModuleType) or callable(value):
        return False
    return kind.__module__ == "numpy" or (
        not _own(kind.__module__) and (hasattr(value, "__dict__") or hasattr(kind, "__slots__"))
    )


class _Look:
    """Fingerprints of values; an object that several modules share is looked at once.

    ``names`` limits the fields of objects to those that the code mentions; None takes all.
    """

    def __init__(self, names: frozenset[str] | None) -> None:
        self.names = names
        self.memo: dict[int, Hashable] = {}

    def at(self, value: object, depth: int = 0) -> Hashable:
        kind = type(value)
        if kind in PLAIN:
            return (kind, value)
        if id(value) in self.memo:
            return self.memo[id(value)]
        self.memo[id(value)] = kind.__name__  # what contains itself ends here
        result = self._inside(value, kind, depth)
        self.memo[id(value)] = result
        return result

    def _inside(self, value: object, kind: type, depth: int) -> Hashable:
        if isinstance(value, Tensor | nn.Module):
            return kind
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.ModuleType | Enum):
            return value
        if isinstance(value, torch.Generator):
            return value  # as itself: the step draws from the object that the trace saw
        if kind.__module__ == "numpy":
            return (kind, _numpy(value))
        if depth == DEPTH:
            return kind
        if isinstance(value, Mapping):
            if len(value) > MANY:
                return (kind, len(value))
            return (
                kind,
                tuple(
                    [
                        (self.at(k, depth + 1), self.at(v, depth + 1))
                        for k, v in value.items()
                        if not isinstance(v, Tensor)
                    ]
                ),
            )
        if isinstance(value, Sequence) and not isinstance(value, range):
            if len(value) > MANY:
                return (kind, len(value))
            return (kind, tuple([self.at(entry, depth + 1) for entry in value if not isinstance(entry, Tensor)]))
        if isinstance(value, Set):
            return (kind, frozenset([self.at(entry, depth + 1) for entry in value]))
        if _own(kind.__module__) and not isinstance(value, _RECORDS):
            return kind
        fields = getattr(value, "__dict__", {})
        slots = {name for base in kind.__mro__ for name in _names_of(vars(base).get("__slots__", ()))}
        fields = {**fields, **{name: getattr(value, name) for name in slots if hasattr(value, name)}}
        reads = None if self.names is None else self.names | _methods_read(kind)
        read = [(name, entry) for name, entry in fields.items() if reads is None or name in reads]
        return (
            kind,
            tuple([(name, self.at(entry, depth + 1)) for name, entry in read if not isinstance(entry, Tensor)]),
        )


# A record's methods of Python's own names that a forward may call; __eq__ and __repr__ mention every field.
_READING = ("__call__", "__getitem__", "__getattr__", "__len__", "__iter__", "__bool__", "__int__", "__float__")


@functools.lru_cache(maxsize=1_024)
def _methods_read(kind: type) -> frozenset[str]:
    """What the methods of a record's class mention: the forward may call any of them."""
    search = _Search()
    for base in kind.__mro__:
        for name, value in vars(base).items() if not _own(base.__module__) else ():
            if not name.startswith("__") or name in _READING:
                search.push(value)
    return frozenset(name for function in search.todo for name in _mentioned(function.__code__))


def _names_of(slots: object) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)  # type: ignore[arg-type]


def _numpy(value: Any) -> Hashable:
    """Shape, type and bytes: two arrays with these in common are the same constant."""
    if getattr(value, "dtype", None) is None:
        return repr(value)
    return (value.shape, str(value.dtype), value.tobytes() if value.dtype != object else id(value))
