"""Python state around a trace: put back what the forward changes, refuse what a planned step can't repeat.

A planned step runs the recorded tensor operations, not the forward's Python. Caches that the forward fills are
harmless: they are put back, and what they hold is part of the step. Plain values that it sets (a size, a mode) the step
sets, too. Counters, Python's own random numbers, losses left on an attribute, and tensors that the next call reads
would silently be missed: they are refused.
"""

from __future__ import annotations

import copy
import functools
import gc
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rematerialize import torch_private as private
from rematerialize.capture.containers import CONTAINERS, entries, plain, refill, set_entry
from rematerialize.errors import CaptureError
from rematerialize.python_code import RECORDS, own

_LIBRARIES = ("torch", "sympy", "numpy", "rematerialize")
_PLAIN = (int, float, bool, str, complex, type(None))
_CODE = (*_PLAIN, type, types.ModuleType, types.CodeType, nn.Module)  # hold no values of a call's
_TABLES = ("_parameters", "_buffers", "_modules")
_ABSENT = object()
_DEPTH = 4  # of containers and records within those of a module
_MANY = 10_000  # entries of a container that isn't looked into: a data set, not a state

_LOST = (
    "the forward changes {names}, which a planned step can't repeat: make a counter a buffer (register_buffer), return "
    "a loss instead of leaving it on the module, draw random numbers with torch"
)
_MADE = "the forward makes {names} at its first call: call the model once, under torch.no_grad(), before it is planned"
_REPLACED = (
    "the forward puts another module in the place of {names}, which a planned step can't repeat: if only its first "
    "call does, call the model once, under torch.no_grad(), before it is planned; else make the module outside of it"
)
_KEPT = (
    "the forward reads {name} as an earlier call left it, and a planned step leaves nothing there: keep it in a buffer "
    "that the forward changes in place (register_buffer, then self.{last}.copy_(value)), or return it and pass it in"
)


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

    def forget(self) -> dict[str, list[Tensor]]:
        """Clear those that were missed since; returns their names, with the tensors that they held."""
        held = {}
        for function, misses in zip(self.functions, self.misses, strict=True):
            if function.cache_info().misses != misses:
                held[getattr(function, "__name__", "a function")] = [*_within(function, set())]
                function.cache_clear()
        return held


@dataclass(frozen=True, slots=True)
class Holder:
    """A place where a forward can leave things: the attributes of a module or a record, or a container.

    ``name`` is what people call it, ``module`` the module whose attributes these are, ``owner`` the name of the module
    below which it is, ``called`` the identifier by which code reads it, "" where none does.
    """

    name: str
    table: Any
    module: nn.Module | None = None
    attributes: bool = False
    owner: str = ""
    called: str = ""

    def name_of(self, key: Any) -> str:
        """What people call an entry."""
        if self.attributes:
            return f"{self.name}.{key}".lstrip(".")
        return f"{self.name}[{key!r}]"


def holders_of(model: nn.Module) -> list[Holder]:
    """Every place below a model where its forward can leave things, each once. O(what they hold)."""
    found: list[Holder] = []
    seen: set[int] = set()

    def visit(name: str, value: Any, depth: int, owner: str) -> None:
        if depth > _DEPTH or id(value) in seen or isinstance(value, Tensor):
            return
        if isinstance(value, nn.Module):
            for prefix, module in value.named_modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    full = ".".join(filter(None, (name, prefix)))
                    add(Holder(full, vars(module), module, True, full), depth)
        elif isinstance(value, CONTAINERS):
            seen.add(id(value))
            if len(value) <= _MANY:
                add(Holder(name, value, owner=owner, called=name.partition("[")[0].rpartition(".")[2]), depth)
        elif _is_record(value):
            seen.add(id(value))
            add(Holder(name, vars(value), None, True, owner), depth)

    def add(holder: Holder, depth: int) -> None:
        found.append(holder)
        for key, value in entries(holder.table):
            if holder.module is None or key not in _TABLES:
                visit(holder.name_of(key), value, depth + 1, holder.owner)

    visit("", model, 0, "")
    return found


def logs_of(places: Iterable[tuple[str, Any, str]]) -> list[Holder]:
    """Containers outside of the model that its forward fills: what people call them, they, and how they are read."""
    return [
        Holder(path, value, called=called)
        for path, value, called in places
        if isinstance(value, CONTAINERS) and len(value) <= _MANY
    ]


Values: TypeAlias = dict[tuple[int, Any], Any]
"""Values, by the number of the holder where they stand and the key."""


@dataclass(slots=True)
class Left:
    """What the last traced call left.

    Attributes
    ----------
    values : Values
        Plain values other than it found there.
    tensors : dict
        Where it left tensors, or new containers and records of them, by the holder's number and the key: what they
        were computed from, as ``origins`` tells; None where it can't be known.
    tripwires : Values
        The same, with what refuses every use in the place of each tensor.
    cached : dict
        Names of ``functools.lru_cache`` functions that it filled, with the origins of the tensors there.
    objects : bool
        Whether it left anything else: containers, functions, objects.
    """

    values: Values = field(default_factory=dict)
    tensors: dict[tuple[int, Any], Set[int] | None] = field(default_factory=dict)
    tripwires: Values = field(default_factory=dict)
    cached: dict[str, Set[int] | None] = field(default_factory=dict)
    objects: bool = False


class unchanged_python:
    """A context for one call of a forward: on exit everything is as it was, or a CaptureError says what isn't.

    ``left`` is told what the forward had left there.

    Parameters
    ----------
    holders : sequence of Holder
    caches : FunctionCaches
    left : Left
    origins : callable
        Tensor to the primals from which it was computed, None where nothing is recorded.
    read : collection of str
        Names of attributes that the forward reads: a list among them that grows is a state.
    given : collection of int
        Ids of the tensors that the step is given: a list of weights is no loss.
    start : Values, optional
        What an earlier call left. This one finds it there, and must leave it: what moves on is a counter.
    poisoned : Values, optional
        Some of another call's ``Left.tripwires``: whatever reads there what that call left is refused.
    """

    def __init__(
        self,
        holders: Sequence[Holder],
        caches: FunctionCaches,
        left: Left,
        origins: Callable[[Tensor], Set[int] | None],
        *,
        read: Container[str] = (),
        given: Container[int] = (),
        start: Values | None = None,
        poisoned: Values | None = None,
    ) -> None:
        self.holders = holders
        self.caches = caches
        self.left = left
        self.origins = origins
        self.read = read
        self.given = given
        self.start = start or {}
        self.poisoned = poisoned or {}

    def __enter__(self) -> None:
        self.before = contents(self.holders)
        self.tables = [[dict(h.table[t]) for t in _TABLES] if h.module is not None else [] for h in self.holders]
        put(self.holders, self.start)
        for (index, key), tripwire in self.poisoned.items():
            set_entry(self.holders[index].table, key, tripwire)
        self.random = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = numpy.random.get_state() if numpy is not None else None
        self.caches.note()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        cached = self.caches.forget()
        found = self._restore_generators()
        made: list[str] = []
        self.left.values, self.left.tensors, self.left.tripwires, self.left.objects = {}, {}, {}, False
        self.left.cached = {name: self._origins(tensors) for name, tensors in cached.items()}
        replaced: list[str] = []
        for index, holder in enumerate(self.holders):
            made += self._made(index, holder)
            replaced += self._replaced(index, holder)
            found += self._moved(index, holder)
            found += self._kept(index, holder)
            refill(holder.table, self.before[index])
        for told, names in ((_MADE, made), (_REPLACED, replaced), (_LOST, found)) if kind is None else ():
            if names:
                raise CaptureError(told.format(names=", ".join(names[:3])))

    def _made(self, index: int, holder: Holder) -> list[str]:
        """Parameters, buffers and parts that weren't there; what was there and is another is seen elsewhere."""
        made = []
        for name, before in zip(_TABLES, self.tables[index], strict=False):
            table = holder.table[name]
            made += [repr(holder.name_of(k)) for k, v in table.items() if v is not None and before.get(k) is None]
        return made

    def _replaced(self, index: int, holder: Holder) -> list[str]:
        """Parts that are others than before: what the forward draws for their weights, it draws at one call only."""
        if holder.module is None:
            return []
        before = self.tables[index][_TABLES.index("_modules")]
        now = holder.module._modules
        return [repr(holder.name_of(k)) for k, part in before.items() if part is not None and now.get(k) is not part]

    def _moved(self, index: int, holder: Holder) -> list[str]:
        """Note plain values that the forward set to others than it found; returns the names of those that move on."""
        moved = []
        for key, now in entries(holder.table) if not isinstance(holder.table, set) else ():
            before = self.start.get((index, key), _entry(self.before[index], key))
            if not isinstance(now, _PLAIN) or not _settles(before) or (type(now) is type(before) and now == before):
                continue
            if isinstance(holder.table, list | deque) and before is _ABSENT:  # a log, unless it's read
                if holder.called in self.read:
                    moved.append(holder.name)
                continue
            if self.start:
                moved.append(holder.name_of(key))
            self.left.values[index, key] = now
        if isinstance(holder.table, set) and holder.table != self.before[index] and holder.called in self.read:
            moved.append(holder.name)
        return moved

    def _kept(self, index: int, holder: Holder) -> list[str]:
        """Note tensors and objects that the forward left; returns the names of tensors that must not be lost.

        A weight with a ``_orig`` parameter is computed from it at each call (spectral_norm, prune).
        """
        lost = []
        known = {id(value) for _, value in entries(self.before[index])}
        for key, now in entries(holder.table):
            if isinstance(now, (_LeftBehind, *_PLAIN)) or id(now) in known:
                continue
            if now is self.poisoned.get((index, key)) or (holder.module is not None and key in _TABLES):
                continue
            if not isinstance(now, Tensor):
                if isinstance(now, list | tuple | dict) and any(
                    isinstance(value, Tensor)
                    and not isinstance(value, _LeftBehind)
                    and value.requires_grad
                    and id(value) not in self.given
                    for value in _flat(now)
                ):
                    lost.append(holder.name_of(key))
                elif isinstance(holder.table, set) or not self._noted((index, key), now):
                    self.left.objects = True
                continue
            before = _entry(self.before[index], key)
            derived = isinstance(before, Tensor) and before.grad_fn is not None  # weight_norm's weight
            if derived or (holder.module is not None and f"{key}_orig" in holder.module._parameters):
                continue
            if now.requires_grad:
                lost.append(holder.name_of(key))
            elif not isinstance(holder.table, set):
                self._noted((index, key), now)
        return lost

    def _noted(self, place: tuple[int, Any], value: Any) -> bool:
        """Note what the tensors of a value were computed from; returns whether it is one or has any."""
        tensors: list[Tensor] = []
        tripwire = _tripwire(value, self.holders[place[0]].name_of(place[1]), tensors)
        if tensors:
            self.left.tensors[place] = self._origins(tensors)
            self.left.tripwires[place] = tripwire
        return bool(tensors)

    def _origins(self, tensors: Sequence[Tensor]) -> Set[int] | None:
        origins = [self.origins(tensor) for tensor in tensors]
        known = [found for found in origins if found is not None]
        return frozenset().union(*known) if len(known) == len(origins) else None

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


class _LeftBehind(Tensor):
    """Stands where a call left a tensor: any use of it is a reading of what an earlier call computed."""

    _place: str

    @classmethod
    def under(cls, place: str) -> _LeftBehind:
        with private.outside_of_modes():
            made = torch.Tensor._make_subclass(cls, torch.empty(0))
        made._place = place
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        place = next((str(vars(a)["_place"]) for a in _flat((*args, kwargs)) if isinstance(a, cls)), "an attribute")
        raise _kept(place)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # where it stands for a function
        raise _kept(self._place)

    def __next__(self) -> Any:
        raise _kept(self._place)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("_") else _kept(self._place)


def _kept(place: str) -> CaptureError:
    return CaptureError(_KEPT.format(name=repr(place), last=place.rpartition(".")[2].partition("[")[0]))


def _tripwire(value: Any, place: str, tensors: list[Tensor], depth: int = 0) -> Any:
    """Return a copy of what a call left with tripwires in the place of its tensors, which are added to ``tensors``."""
    made = []
    leaves, spec = private.tree_flatten(value)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if not isinstance(leaf, _LeftBehind):
                tensors.append(leaf)
                leaf = _LeftBehind.under(place)
        elif depth < _DEPTH and not isinstance(leaf, nn.Module) and _is_record(leaf):
            fields = {name: _tripwire(field, place, tensors, depth + 1) for name, field in vars(leaf).items()}
            leaf = copy.copy(leaf)
            vars(leaf).update(fields)
        elif held := [*_within(leaf, set())]:
            tensors += held
            leaf = _LeftBehind.under(place)
        made.append(leaf)
    return private.tree_unflatten(made, spec)


def _within(value: Any, seen: set[int], depth: int = 0) -> Iterable[Tensor]:
    """The tensors that an object of any other kind holds: a function by its closure, an iterator, one with slots."""
    if isinstance(value, Tensor):
        if not isinstance(value, _LeftBehind):
            yield value
        return
    large = isinstance(value, CONTAINERS) and len(value) > _MANY
    if depth > _DEPTH or large or id(value) in seen or isinstance(value, _CODE):
        return
    seen.add(id(value))
    names = value.__globals__ if isinstance(value, types.FunctionType) else None
    for inner in gc.get_referents(value):
        if inner is not names:
            yield from _within(inner, seen, depth + 1)


def _flat(values: Any) -> Iterable[Any]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, list | tuple | dict):
            yield from _flat(value)
        else:
            yield value


def contents(holders: Sequence[Holder]) -> list[Any]:
    """Return what the holders hold now, for `put_back`."""
    return [plain(holder.table) for holder in holders]


def put_back(holder: Holder, before: Any) -> bool:
    """Put back what a holder held; return whether it still did."""
    return not refill(holder.table, before)


def put(holders: Sequence[Holder], values: Values) -> None:
    """Put plain values where they belong."""
    for (index, key), value in values.items():
        set_entry(holders[index].table, key, value)


class kept_whole:
    """The model as it was, should a trace end where nothing else puts it back: ctrl-C at any line, or a refusal."""

    def __init__(self, holders: Sequence[Holder]) -> None:
        tables = [holder.table[name] for holder in holders if holder.module is not None for name in _TABLES]
        self.before = [(table, plain(table)) for table in (*(holder.table for holder in holders), *tables)]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            for table, before in self.before:
                refill(table, before)


def _is_record(value: Any) -> bool:
    """Whether a value is an object of a user's class, or of one that stands for such."""
    if isinstance(value, type | types.ModuleType | types.FunctionType) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, RECORDS) or not own(type(value).__module__)


def _settles(before: Any) -> bool:
    return before is None or before is _ABSENT or isinstance(before, _PLAIN)


def _entry(container: Any, key: Any) -> Any:
    """What stands at a key or a position; ``_ABSENT`` where nothing does."""
    if isinstance(container, dict):
        return container.get(key, _ABSENT)
    return container[key] if isinstance(container, list | deque) and key < len(container) else _ABSENT
