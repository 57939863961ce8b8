"""The Python values that a forward can read besides tensors: a trace bakes them in, so a plan holds for them only.

Which ones a forward reads can't be known without running it, so names decide: what the code of the model's classes,
of its hooks and of the functions that it holds mentions, and the functions that this code calls by name
(`python_code`). An attribute of a config object, an entry of a list, a class attribute or a global variable that bears
such a name is part of the signature; anything else, such as a trainer that a model points to, is not.

A random generator or an iterator counts with its state: one from which the forward draws moves at every call.
"""

from __future__ import annotations

import functools
import random
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from rematerialize.python_code import (
    LOGS,
    PLAIN,
    RECORDS,
    Readable,
    changeable,
    functions_in,
    identities,
    is_iterator,
    mentions,
    own,
    read_of,
    readable,
)

DEPTH = 6  # of objects within objects
MANY = 4_000  # entries of a container beyond which only its length counts
_ROUNDS = 8  # of searches, each of which starts from the classes and functions that the one before met
_MODULE = frozenset(vars(nn.Module()))

PythonState = tuple[tuple[str, Hashable], ...]


def python_state(modules: list[nn.Module], function: object = None) -> PythonState:
    """Return a name and a fingerprint for each Python value that the modules' forwards can read.

    ``function`` is the first module's forward, if that is an attribute of its own. Plain attributes of the modules
    themselves are left out: `signature` has them.
    """
    return look_around(modules, function)[0]


def look_around(modules: list[nn.Module], function: object = None) -> tuple[PythonState, Look, Readable]:
    """Return the state, what was looked at for it, and the places outside of the modules where it stands."""
    classes = frozenset(map(type, modules))
    met = _met_beside(classes)
    held, always = _held_by(modules)
    if function is not None:
        always.append((f"{type(modules[0]).__name__}.forward", function))
    functions = {found for _, value in always for found in functions_in(value)}
    for _ in range(_ROUNDS):
        known, code = _current(classes.union(met), functions)
        look = Look(known.names, modules)
        found = [(path, look.at(value)) for path, value in always]
        found += [
            (f"{kind.__name__}.{name}", look.whole(value) if name in known.searched else look.at(value))
            for kind, name, value in held
            if name in known.attributes
            or (name in known.filled and type(value) not in LOGS)
            or (issubclass(kind, known.searching) and _is_record(value))
        ]
        if look.kinds <= met and look.functions <= functions:
            break
        met |= look.kinds
        functions |= look.functions
    found += [
        (path, look.whole(scope[name]) if name in known.searched else look.at(scope[name]))
        for path, scope, name, _ in known.data
        if name in scope
    ]
    found += zip(known.code_paths, code, strict=True)
    return tuple(found), look, known


def changed(before: PythonState, now: PythonState) -> list[str]:
    """Return the names of what differs between two states."""
    return sorted({name for name, _ in {*before} ^ {*now}})


def fingerprint(value: object) -> Hashable:
    """Return what tells a value that is passed to a forward from another, every field of an object included."""
    return Look(None).at(value)


@functools.lru_cache(maxsize=128)
def _met_beside(classes: frozenset[type]) -> set[type]:
    """Classes of the objects that modules of these classes were seen to hold: the next search starts from them, too."""
    return set()


def _current(classes: frozenset[type], functions: set[types.FunctionType]) -> tuple[Readable, tuple[object, ...]]:
    """What these can read, and the functions and classes that it found; searched again when one was replaced."""
    roots = frozenset(map(weakref.ref, functions))
    replaced: tuple[object, ...] = ()
    known = readable(classes, roots)
    for _ in range(_ROUNDS):
        code = changeable(known)
        ids = identities(code)
        if ids == known.code_ids:
            return known, code
        replaced = (*replaced, ids)
        known = readable(classes, roots, replaced)
    return known, ids  # it moves while it is read


def _held_by(modules: list[nn.Module]) -> tuple[list[tuple[type, str, Any]], list[tuple[str, Any]]]:
    """What modules hold besides tensors, modules and plain values, which `signature` has; and inner modules' hooks.

    The outer one's hooks run around the planned step, and its forward is the planner.
    """
    held: list[tuple[type, str, Any]] = []
    hooks: list[tuple[str, Any]] = []
    outer = modules[0]
    for module in modules:
        table = module.__dict__
        held += [
            (type(module), name, value)
            for name, value in table.items()
            if name not in _MODULE
            and type(value) not in _ELSEWHERE
            and not isinstance(value, Tensor)
            and (name != "forward" or module is not outer)
        ]
        if (
            table["_forward_hooks"]
            or table["_forward_pre_hooks"]
            or table["_backward_hooks"]
            or table["_backward_pre_hooks"]
        ) and module is not outer:
            hooks += [(f"a hook of {type(module).__name__}", hook) for hook in _hooks_of(module)]
    return held, hooks


_ELSEWHERE = PLAIN | {torch.Generator, Tensor}


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield from vars(module)[kind].values()


def _is_record(value: object) -> bool:
    """Whether a value is made to hold values, as opposed to a trainer that holds everything."""
    return isinstance(value, (Mapping, Sequence, Set, *RECORDS)) or hasattr(value, "__dataclass_fields__")


class Look:
    """Fingerprints of values; an object that several modules share is looked at once.

    ``names`` limits the fields of objects to those that the code mentions; None takes all. ``registered`` are modules
    that count elsewhere. ``functions`` and ``kinds`` are the functions and users' classes of what it met, ``states``
    the objects that can move in place.
    """

    def __init__(self, names: frozenset[str] | None, registered: Iterable[nn.Module] = ()) -> None:
        self.names = names
        self.registered = registered
        self.known: set[int] = set()  # ids of the registered, once they are needed
        self.memo: dict[int, Hashable] = {}
        self.temporary: list[object] = []  # kept, so that no id in the memo is used again
        self.functions: set[types.FunctionType] = set()
        self.kinds: set[type] = set()
        self.objects: dict[int, Any] = {}

    def at(self, value: Any, depth: int = 0) -> Hashable:
        kind: type = type(value)
        if kind in PLAIN:
            return (kind, value)
        if kind is tuple and PLAIN.issuperset(map(type, value)):
            return (value, *map(type, value))
        if id(value) in self.memo:
            return self.memo[id(value)]
        way = _way(kind)
        if depth >= DEPTH and way not in _ENDS:
            return kind
        self.memo[id(value)] = kind.__name__  # what contains itself ends here
        result = self.memo[id(value)] = way(self, value, depth + 1)
        return result

    def whole(self, value: Any) -> Hashable:
        """With every field: the code computes their names."""
        names, self.names = self.names, None
        self.memo.pop(id(value), None)
        try:
            return self.at(value)
        finally:
            self.names = names

    def only_kind(self, value: Any, depth: int) -> Hashable:
        kind: type = type(value)
        return kind

    def tensor(self, value: Any, depth: int) -> Hashable:
        return Tensor  # a trace has others in its place

    def itself(self, value: Any, depth: int) -> Hashable:
        return value  # type: ignore[no-any-return]

    def a_class(self, value: Any, depth: int) -> Hashable:
        if not own(value.__module__):
            self.kinds.add(value)  # its attributes are found by the search
        return value  # type: ignore[no-any-return]

    def subclass_of_plain(self, value: Any, depth: int) -> Hashable:
        plain = next(base for base in type(value).__mro__ if base in PLAIN)
        return (type(value), plain(value))

    def module(self, value: Any, depth: int) -> Hashable:
        """A registered module counts elsewhere; another with its mode, plain values, hooks and modules within."""
        if not self.known:
            self.known.update(map(id, self.registered))
        if id(value) in self.known:
            return (type(value), id(value))
        kind: type = type(value)
        table = vars(value)
        names = None if self.names is None else read_of(kind, self.names)
        if not own(kind.__module__):
            self.kinds.add(kind)
        plain = [
            (name, self.at(entry, depth))
            for name, entry in table.items()
            if name not in _MODULE
            and not isinstance(entry, Tensor)
            and (type(entry) in PLAIN or own(kind.__module__) or names is None or name in names)
        ]
        inner = [self.at(child, depth) for child in table["_modules"].values() if child is not None]
        hooks = [self.at(hook, depth) for hook in _hooks_of(value)]
        return (kind, id(value), table["training"], tuple(plain), tuple(inner), tuple(hooks))

    def function(self, value: Any, depth: int) -> Hashable:
        """Its code, and what it holds besides: two closures that were made alike are the same."""
        module, closure, defaults = value.__module__, value.__closure__, value.__defaults__
        if not own(module):
            self.functions.add(value)
        if not (closure or defaults or value.__kwdefaults__ or value.__dict__):
            return (value.__code__, module)
        mentioned = mentions(value.__code__).names
        within = self if self.names is not None else Look(mentioned)
        cells = []
        for name, cell in zip(value.__code__.co_freevars, closure or (), strict=True):
            if name in mentioned and name != "__class__":
                try:
                    cells.append(within.at(cell.cell_contents, depth))
                except ValueError:  # not filled yet
                    cells.append(None)
        fields = [
            (name, within.at(entry, depth)) for name, entry in vars(value).items() if name in (within.names or ())
        ]
        held = (within.at(defaults, depth), within.at(value.__kwdefaults__, depth), *cells, *fields)
        return (value.__code__, module, held)

    def method(self, value: Any, depth: int) -> Hashable:
        return (type(value), self.at(value.__func__, depth), self.at(value.__self__, depth))

    def builtin(self, value: Any, depth: int) -> Hashable:
        """A method of an object in C (``rng.random``) counts with its object."""
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType | type) or id(owner) in _of_the_process():
            return value  # type: ignore[no-any-return]
        return (type(value), value.__name__, self.at(owner, depth))

    def cached(self, value: Any, depth: int) -> Hashable:
        return (type(value), self.at(value.__wrapped__, depth))

    def partial(self, value: Any, depth: int) -> Hashable:
        return (type(value), self.at(value.func, depth), self.at(value.args, depth), self.at(value.keywords, depth))

    def slice(self, value: Any, depth: int) -> Hashable:
        return (slice, self.at(value.start, depth), self.at(value.stop, depth), self.at(value.step, depth))

    def referent(self, value: Any, depth: int) -> Hashable:
        return (type(value), self.at(value(), depth))

    def context(self, value: Any, depth: int) -> Hashable:
        return (type(value), self.at(value.get(None), depth))

    def array(self, value: Any, depth: int) -> Hashable:
        """Shape, type and bytes: two arrays with these in common are the same constant."""
        if getattr(value, "dtype", None) is None or not hasattr(value, "tobytes"):
            return (type(value), repr(value))
        return (
            type(value),
            value.shape,
            str(value.dtype),
            value.tobytes() if value.dtype != object else id(value),
        )

    def generator(self, value: Any, depth: int) -> Hashable:
        self.objects[id(value)] = value
        return (type(value), frozen(state_of(value)))

    def iterator(self, value: Any, depth: int) -> Hashable:
        """Where an iterator stands, by the way in which it is copied."""
        self.objects[id(value)] = value
        if isinstance(value, types.GeneratorType):
            frame = value.gi_frame
            local = {} if frame is None else frame.f_locals
            self.temporary.append(local)
            return (type(value), frame and frame.f_lasti, tuple(self.at(entry, depth) for entry in local.values()))
        parts = _parts_of(value)
        self.temporary.append(parts)
        return (type(value), parts if isinstance(parts, str) else self.nested(parts, depth))

    def nested(self, parts: Any, depth: int) -> Hashable:
        """Tuples that were made for this look."""
        if type(parts) is tuple:
            return tuple([self.nested(part, depth) for part in parts])
        return self.at(parts, depth)

    def mapping(self, value: Any, depth: int) -> Hashable:
        if len(value) > MANY:
            return (type(value), len(value))
        self.objects[id(value)] = value
        items = value.items()
        if not isinstance(value, dict):  # a user's may make its entries as they are read
            self.temporary.append(items := list(items))
        return (type(value), self.entries(items, depth))

    def entries(self, items: Iterable[tuple[Any, Any]], depth: int) -> Hashable:
        """Names or keys with what stands there; most are plain, and a call for each would cost the most."""
        return tuple(
            [
                (
                    key if type(key) is str else self.at(key, depth),
                    (type(entry), entry) if type(entry) in PLAIN else self.at(entry, depth),
                )
                for key, entry in items
                if not isinstance(entry, Tensor)
            ]
        )

    def sequence(self, value: Any, depth: int) -> Hashable:
        if len(value) > MANY:
            return (type(value), len(value))
        self.objects[id(value)] = value
        entries = value
        if not isinstance(value, list | tuple):
            self.temporary.append(entries := list(value))
        return (type(value), tuple([self.at(entry, depth) for entry in entries if not isinstance(entry, Tensor)]))

    def set(self, value: Any, depth: int) -> Hashable:
        return (type(value), frozenset([self.at(entry, depth) for entry in value]))

    def fields(self, value: Any, depth: int) -> Hashable:
        kind: type = type(value)
        self.objects[id(value)] = value
        if not own(kind.__module__):
            self.kinds.add(kind)
        fields = getattr(value, "__dict__", {})
        if slots := slots_of(kind):
            fields = {**fields, **{name: getattr(value, name) for name in slots if hasattr(value, name)}}
        reads = None if self.names is None else read_of(kind, self.names)
        if reads is not None:
            fields = {name: entry for name, entry in fields.items() if name in reads}
        return (kind, self.entries(fields.items(), depth))


Way = Callable[[Look, Any, int], Hashable]
_WAYS: tuple[tuple[tuple[type, ...], Way], ...] = (
    ((Tensor,), Look.tensor),
    ((nn.Module,), Look.module),
    ((type,), Look.a_class),
    ((types.ModuleType, Enum, torch.Generator), Look.itself),  # the step draws from the generator that the trace saw
    ((types.FunctionType,), Look.function),
    ((types.MethodType,), Look.method),
    ((types.BuiltinFunctionType, types.MethodWrapperType), Look.builtin),
    ((functools._lru_cache_wrapper,), Look.cached),
    ((functools.partial,), Look.partial),
    ((slice,), Look.slice),
    ((weakref.ref,), Look.referent),
    ((ContextVar,), Look.context),
    ((random.Random,), Look.generator),
)
_ENDS = (Look.only_kind, Look.tensor, Look.itself, Look.a_class, Look.array, Look.generator, Look.subclass_of_plain)


@functools.lru_cache(maxsize=4_096)
def _way(kind: type) -> Way:
    """How values of a type are looked at."""
    for kinds, way in _WAYS:
        if issubclass(kind, kinds):
            return way
    root = kind.__module__.partition(".")[0]
    if root == "numpy":
        drawn = kind.__module__.startswith("numpy.random")
        return Look.generator if drawn and not issubclass(kind, type) else Look.array
    if issubclass(kind, tuple(base for base in PLAIN if base in (int, float, complex, str, bytes))):
        return Look.subclass_of_plain
    if issubclass(kind, Mapping):
        return Look.mapping
    if issubclass(kind, Sequence):
        return Look.sequence
    if issubclass(kind, Set):
        return Look.set
    if own(kind.__module__) and not issubclass(kind, RECORDS):
        return Look.iterator if is_iterator(kind) else Look.only_kind
    return Look.fields


@functools.lru_cache(maxsize=1_024)
def slots_of(kind: type) -> tuple[str, ...]:
    """Return the names of a class's slots, its bases' included."""
    slots = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    return tuple({name for given in slots for name in ((given,) if isinstance(given, str) else tuple(given))})


def _of_the_process() -> frozenset[int]:
    """The generators of Python's and numpy's modules: what draws from them is refused in any case."""
    numpy = sys.modules.get("numpy")
    drawing: list[Any] = [random.random, *([numpy.random.rand] if numpy is not None else [])]
    return frozenset(id(function.__self__) for function in drawing)


def state_of(generator: Any) -> Any:
    """The state of a generator of Python's or of numpy's."""
    if isinstance(generator, random.Random):
        try:
            return generator.getstate()
        except NotImplementedError:  # the system's has none
            return None
    if hasattr(generator, "get_state"):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.state


def frozen(state: Any) -> Hashable:
    """A generator's state as a value that can be compared."""
    if isinstance(state, Mapping):
        return tuple([(name, frozen(value)) for name, value in state.items()])
    return state.tobytes() if hasattr(state, "tobytes") else state  # type: ignore[no-any-return]


def _parts_of(iterator: Any) -> Any:
    if type(iterator).__name__ == "count":
        return repr(iterator)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return iterator.__reduce__()
    except TypeError:  # a file, for one
        return ""
