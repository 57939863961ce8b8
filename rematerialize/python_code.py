"""What the Python code of a model's classes, hooks and functions can read besides tensors, found by names.

A search starts at the forwards and follows what they mention: methods of that name, functions, classes. It collects
identifiers, and the places outside of the modules (globals, class attributes, closures) that bear one of them.
Nothing is kept alive by what it remembers but modules of code and classes: functions may close over a model.
"""

from __future__ import annotations

import dis
import functools
import operator
import re
import sys
import types
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# Values whose equality says it all.
PLAIN = frozenset(
    {
        *(int, float, complex, bool, str, bytes, range, Fraction, Decimal, type(None), type(Ellipsis)),
        *(torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout),
    }
)
RECORDS = (types.SimpleNamespace, Namespace)  # of the standard library, and yet a user's records
FUNCTIONS = 2_000  # of one model that are searched for names
_PACKAGES = 4  # of packages within packages
# Packages whose code doesn't change what it computes; pytest rewrites the asserts of tests into calls of its own.
_OWN = ("torch", "numpy", "rematerialize", "builtins", "pytest", "_pytest")
_METHODS = (types.FunctionType, staticmethod, classmethod, property, functools.partialmethod)
CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools._lru_cache_wrapper)

Place: TypeAlias = tuple[str, Any, str, type | None]  # for messages, where to read, and the class whose attribute it is
Functions: TypeAlias = frozenset["weakref.ref[types.FunctionType]"]


@dataclass(frozen=True, slots=True)
class Readable:
    """What some code can read.

    ``names`` are the identifiers that it mentions, ``attributes`` those and what torch's own modules mention,
    ``filled`` those that it only appends or adds to, ``logs`` the global and closed-over containers among these,
    ``data`` the global variables, class attributes and closures that hold data, ``code`` those that hold functions and
    classes, which were the ones with ``code_ids``. ``searched`` are the names of what it reads by computed names,
    ``searching`` the classes of modules that read themselves so. ``asking`` are the globals of functions that may call
    ``type``.
    """

    names: frozenset[str]
    attributes: frozenset[str]
    filled: frozenset[str]
    data: tuple[Place, ...]
    logs: tuple[Place, ...]
    code: tuple[tuple[Any, str], ...]
    code_paths: tuple[str, ...]
    code_ids: tuple[Hashable, ...]
    searched: frozenset[str]
    searching: tuple[type, ...]
    asking: tuple[dict[str, Any], ...]


@functools.lru_cache(maxsize=128)
def readable(classes: frozenset[type], functions: Functions = frozenset(), replaced: object = None) -> Readable:
    """Search what runs from functions, and from the forwards of classes and their bases, for what it reads.

    A mentioned name stands for every method of that name. ``replaced`` only tells searches of the same roots apart,
    between which a function that they found was replaced by another.
    """
    search = _Search()
    for cls in sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__)):
        search.enter(cls)
    for function in sorted(filter(None, (ref() for ref in functions)), key=_place_of):
        search.push(function)
    search.run()
    return search.result()


def _place_of(function: types.FunctionType) -> tuple[str, str]:
    return function.__module__ or "", function.__qualname__


def changeable(known: Readable) -> tuple[object, ...]:
    """Return what stands at ``known.code`` now."""
    # A closure's cell has no get.
    return tuple([scope[name] if name in scope else None for scope, name in known.code])  # noqa: SIM401


def identities(code: tuple[object, ...]) -> tuple[Hashable, ...]:
    """Return ids of functions and classes, as `changeable` returns them."""
    return tuple([tuple(map(id, each)) if type(each) is tuple else id(each) for each in code])


def functions_in(value: object) -> Iterator[types.FunctionType]:
    """Yield the functions that a call of a value runs, without those that they call."""
    if isinstance(value, staticmethod | classmethod | types.MethodType):
        yield from functions_in(value.__func__)
    elif isinstance(value, functools.partial | functools.cached_property):
        yield from functions_in(value.func)
    elif isinstance(value, property):
        for part in (value.fget, value.fset):
            yield from functions_in(part)
    elif isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, functools._lru_cache_wrapper):
        yield from functions_in(value.__wrapped__)


@dataclass(slots=True)
class _Search:
    """A walk over functions, from those of the model's classes to those that they call by name."""

    members: dict[str, list[object]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    of_torch: set[str] = field(default_factory=set)
    data: dict[tuple[int, str], Place] = field(default_factory=dict)
    code: dict[tuple[int, str], Place] = field(default_factory=dict)
    classes: dict[type, None] = field(default_factory=dict)
    seen: set[types.FunctionType] = field(default_factory=set)
    codes: set[types.CodeType] = field(default_factory=set)
    todo: list[types.FunctionType] = field(default_factory=list)
    searched: set[str] = field(default_factory=set)
    searching: set[type] = field(default_factory=set)
    of_modules: dict[types.FunctionType, type] = field(default_factory=dict)
    filled: set[str] = field(default_factory=set)
    logs: dict[tuple[int, str], Place] = field(default_factory=dict)
    asking: dict[int, dict[str, Any]] = field(default_factory=dict)

    def result(self) -> Readable:
        for owner in self.classes:
            # A mappingproxy can't be kept as the dict it is, and needn't: it reads through.
            table = vars(owner)
            everything = any(issubclass(owner, cls) or issubclass(cls, owner) for cls in self.searching)
            fields = table.get("__dataclass_fields__", ())  # an object has its own
            for name in sorted(table if everything else table.keys() & self.names):
                if not _DUNDER(name) and name not in fields and counts(table[name]):
                    self._keep(self.data, owner, (f"{owner.__name__}.{name}", table, name, owner))
            named = sorted(table.keys() & (self.names | _UNNAMED))
            methods = [name for name in named if isinstance(table[name], _METHODS)]
            if methods:
                self._keep(self.code, owner, (f"{owner.__name__}'s methods", _Methods(table, methods), "", owner))
        names = frozenset(self.names)
        attributes = names | self.of_torch | {"forward"}
        data = tuple(self.data.values())
        code = tuple([(scope, name) for _, scope, name, _ in self.code.values()])
        paths = tuple([path for path, *_ in self.code.values()])
        found = tuple([scope[name] for scope, name in code])
        searched = frozenset(self.searched)
        filled = frozenset(self.filled - self.names)
        logs = tuple(self.logs.values())
        ids = identities(found)
        searching, asking = tuple(self.searching), tuple(self.asking.values())
        return Readable(names, attributes, filled, data, logs, code, paths, ids, searched, searching, asking)

    def enter(self, cls: type) -> None:
        """Search a class: what runs without being named, and from now on its methods that are."""
        for base in cls.__mro__:
            if base in self.classes:
                continue
            if own(base.__module__):
                self.of_torch |= _names_of_module(base)
                continue
            self.classes[base] = None
            for name, value in vars(base).items():
                self.members.setdefault(name, []).append(value)
                if issubclass(base, nn.Module):
                    self.of_modules.update(dict.fromkeys(functions_in(value), base))
                if name in self.names or name in _UNNAMED:
                    self.push(value)

    def push(self, value: object) -> None:
        """Search a function, or what a call of something else runs."""
        for function in functions_in(value):
            if function not in self.seen and not own(function.__module__):
                self.seen.add(function)
                self.todo.append(function)
        if isinstance(value, types.MethodType):
            value = value.__self__  # Function.apply, bound to the class whose backward runs
        if isinstance(value, type):
            self.enter(value)
        elif not own(type(value).__module__):
            self.enter(type(value))

    def run(self) -> None:
        while self.todo and len(self.codes) < FUNCTIONS:
            function = self.todo.pop()
            if function.__code__ not in self.codes:
                self.codes.add(function.__code__)
                self._visit(function)
            self._closure(function)

    def _visit(self, function: types.FunctionType) -> None:
        found = mentions(function.__code__)
        mentioned = found.names
        self.searched |= found.searched - {"self"}
        if "self" in found.searched and function in self.of_modules:
            self.searching.add(self.of_modules[function])
        for name in sorted(mentioned - self.names - _MAKING):
            for value in self.members.get(name, ()):
                self.push(value)
        self.names |= mentioned
        self.filled |= found.filled
        scope = function.__globals__
        if "type" in mentioned and "type" not in scope:
            self.asking[id(scope)] = scope
        for name in sorted((mentioned | found.filled) & scope.keys()):
            value = scope[name]
            if name in found.filled and type(value) in LOGS:
                self._keep(self.logs, scope, (f"{function.__module__}.{name}", scope, name, None))
                continue
            if isinstance(value, types.ModuleType):
                self._module(value, found)
            else:
                self._note(f"{function.__module__}.{name}", scope, name, made=name in found.called)

    def _module(self, module: types.ModuleType, found: Mentions, depth: int = 0) -> None:
        if own(module.__name__) or depth == _PACKAGES:
            return
        for name in sorted(found.names & vars(module).keys()):
            value = vars(module)[name]
            if isinstance(value, types.ModuleType):
                self._module(value, found, depth + 1)
            else:
                self._note(f"{module.__name__}.{name}", vars(module), name, made=name in found.called)

    def _closure(self, function: types.FunctionType) -> None:
        found = mentions(function.__code__)
        mentioned = found.names | found.filled
        for index, name in enumerate(function.__code__.co_freevars):
            scope = _Cell(function, index)
            if name in found.filled and type(scope[name]) in LOGS:
                self._keep(self.logs, scope, (f"{name} of {function.__qualname__}", scope, name, None))
                continue
            if name != "__class__" and (name in mentioned or not counts(scope[name])):
                self._note(f"{name} of {function.__qualname__}", scope, name)

    def _note(self, path: str, scope: Any, name: str, *, made: bool = False) -> None:
        """Remember a place, for data or for code, and search the code that it holds; ``made``: if a class, called."""
        value = scope[name]
        if _DUNDER(name):
            return
        if isinstance(value, CODE):
            self._keep(self.code, scope, (path, scope, name, None))
        elif counts(value):
            self._keep(self.data, scope, (path, scope, name, None))
        self.push(value)
        for base in value.__mro__ if made and isinstance(value, type) and not issubclass(value, nn.Module) else ():
            for method in _MAKING & vars(base).keys():
                self.push(vars(base)[method])

    @staticmethod
    def _keep(places: dict[tuple[int, str], Place], owner: object, place: Place) -> None:
        places.setdefault(scope_key(owner, place[2]), place)


def scope_key(scope: object, name: str) -> tuple[int, str]:
    """Return what tells one place from another: cells are looked at through scopes of their own."""
    return (scope.key if isinstance(scope, _Cell) else id(scope)), name


class _Cell:
    """A closure's cell as a scope of one name; the function that closes over it isn't kept alive."""

    __slots__ = ("_function", "_index", "key")

    def __init__(self, function: types.FunctionType, index: int) -> None:
        self._function = weakref.ref(function)
        self._index = index
        self.key = id((function.__closure__ or ())[index])

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        function = self._function()
        try:
            return None if function is None else (function.__closure__ or ())[self._index].cell_contents
        except ValueError:  # not filled yet
            return None

    def __setitem__(self, name: str, value: object) -> None:
        if (function := self._function()) is not None:
            (function.__closure__ or ())[self._index].cell_contents = value


class _Methods:
    """The methods of a class that code mentions, in one piece: models have hundreds."""

    __slots__ = ("_get", "_names", "_table")

    def __init__(self, table: Mapping[str, Any], names: list[str]) -> None:
        self._table, self._names = table, names
        self._get = operator.itemgetter(*names, names[0])  # of two names at least, so that it returns a tuple

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> tuple[object, ...]:
        try:
            return self._get(self._table)  # type: ignore[no-any-return]
        except KeyError:  # one was deleted
            return tuple(map(self._table.get, self._names))


# Methods that run without being named: of a module, a record, an autograd.Function; and where an object is made. A
# record's __eq__ and __repr__ mention every field.
_READING = (
    "__call__",
    "__getitem__",
    "__getattr__",
    "__len__",
    "__iter__",
    "__next__",
    "__bool__",
    "__int__",
    "__float__",
)
_UNNAMED = frozenset({*_READING, "forward", "backward", "setup_context", "jvp", "vjp", "vmap"})
_MAKING = frozenset({"__init__", "__new__", "__post_init__"})


@functools.lru_cache(maxsize=1_024)
def read_of(kind: type, names: frozenset[str]) -> frozenset[str]:
    """Names, and what the methods of a record's class mention: the forward may call any of them."""
    methods = [
        value
        for base in kind.__mro__
        for name, value in (vars(base).items() if not own(base.__module__) else ())
        if not name.startswith("__") or name in _READING
    ]
    return names.union(*[mentions(f.__code__).names for method in methods for f in functions_in(method)])


@functools.lru_cache(maxsize=1_024)
def _names_of_module(kind: type) -> frozenset[str]:
    """What a module class of torch's own reads of its attributes."""
    if not kind.__module__.startswith("torch.nn.modules.") or kind is nn.Module:
        return frozenset()
    methods = [value for name, value in vars(kind).items() if name not in ("__init__", "extra_repr", "__setstate__")]
    return frozenset(name for method in methods for f in functions_in(method) for name in mentions(f.__code__).names)


_DUNDER = re.compile("__.*__$").match
_LOADS = ("LOAD_NAME", "LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_SUPER_ATTR")
_FILLS = ("append", "appendleft", "extend", "add")  # what is only filled, a log for one, isn't read
LOGS = (list, deque, set)  # if it is one of these: another's method of that name may do anything
_NO_RESULT = ("KW_NAMES", "CACHE", "NOP", "RESUME", "EXTENDED_ARG")


@dataclass(frozen=True, slots=True)
class Mentions:
    """What a function's code reads, functions within it included.

    ``names`` are identifiers, and texts that getattr may take; ``called`` those of the names that it calls; ``filled``
    are identifiers of what it only appends or adds to; ``searched`` what a getattr of a computed name reads from: the
    name of a variable or of an attribute.
    """

    names: frozenset[str]
    called: frozenset[str]
    filled: frozenset[str]
    searched: frozenset[str]


@functools.lru_cache(maxsize=8_192)
def mentions(code: types.CodeType) -> Mentions:
    """Return what a function's code reads."""
    instructions = list(dis.get_instructions(code))
    names, called, filled, searched = set(), set(), set(), set(_searched(instructions))
    aliases: dict[str, str] = {}
    for now, after in zip(instructions, [*instructions[1:], None], strict=True):
        if now.opname in _LOADS and after and after.opname in _LOADS and after.argval in _FILLS:
            filled.add(now.argval)
        elif now.opname in _LOADS:
            names.add(now.argval)
            if now.opname == "LOAD_METHOD" or (now.opname in ("LOAD_GLOBAL", "LOAD_ATTR") and (now.arg or 0) & 1):
                called.add(now.argval)
            if after and after.opname == "STORE_FAST":  # config = self.config
                aliases[after.argval] = now.argval
        if after and after.opname == "LOAD_ATTR" and after.argval == "__dict__" and isinstance(now.argval, str):
            searched.add(now.argval)
    searched = {aliases.get(name, name) for name in searched}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = mentions(constant)
            names |= inner.names
            called |= inner.called
            filled |= inner.filled
            searched |= inner.searched
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)
    return Mentions(frozenset(names), frozenset(called), frozenset(filled - names), frozenset(searched))


def _searched(instructions: list[dis.Instruction]) -> Iterator[str]:
    """Yield the objects of each getattr that takes another name than a constant: who pushed its arguments?"""
    for start, instruction in enumerate(instructions):
        if instruction.opname not in ("LOAD_GLOBAL", "LOAD_NAME") or instruction.argval != "getattr":
            continue
        depth, owner, name = 0, "", ""
        for now in instructions[start + 1 :]:
            if now.opname in ("PRECALL", "CALL") and depth == now.arg:  # getattr's own
                if name != "LOAD_CONST" and owner:
                    yield owner
                break
            if now.opname.startswith(("RETURN", "RAISE")) or depth < 0:
                break
            if now.opname not in _NO_RESULT:
                depth += dis.stack_effect(now.opcode, now.arg, jump=False)
                if depth == 1 and now.opname.startswith("LOAD_") and isinstance(now.argval, str):
                    owner = now.argval
                elif depth == 2 and now.opname != "PRECALL":
                    name = now.opname


@functools.lru_cache(maxsize=4_096)
def own(module: str | None) -> bool:
    """Whether a module of code is one whose code isn't searched."""
    root = (module or "").partition(".")[0]
    return root in _OWN or root in sys.stdlib_module_names


def is_iterator(kind: type) -> bool:
    """Whether objects of a type are iterators of Python's own over values."""
    return hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools", "collections", "_collections")


def counts(value: object) -> bool:
    """Whether a value may decide what a forward computes: data, as opposed to code, tensors and registered modules."""
    kind: type = type(value)
    return kind in PLAIN or (_kind_counts(kind) and not isinstance(value, Tensor))


@functools.lru_cache(maxsize=4_096)
def _kind_counts(kind: type) -> bool:
    if issubclass(kind, (*CODE, types.ModuleType, Tensor)):
        return False
    if issubclass(kind, (Sequence, Set, Mapping, Enum, slice, functools.partial, nn.Module, *RECORDS)):
        return True
    if issubclass(kind, (ContextVar, weakref.ref)) or kind.__module__.partition(".")[0] in ("numpy", "random"):
        return True
    if is_iterator(kind):
        return True
    return not own(kind.__module__) and (kind.__dictoffset__ != 0 or hasattr(kind, "__slots__"))
