"""Binding of the compiled inner loops: a schedule that can be edited, as an object.

The C beside this file is built when the package is installed. Without it (no compiler on the machine)
`available` is False, and the portfolio does without local search: valid plans, slower ones.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rematerialize.solve.step import Plan, Step

_OUTPUT, _GRADIENT, _TANGENT = 1, 2, 4
_I64 = ctypes.c_int64
_ROOM = 1 << 55  # sizes are scaled so that a few instances of every value fit 64 bits


def _load() -> ctypes.CDLL | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_kernel{suffix}"
        if path.exists():
            try:
                return _declare(ctypes.CDLL(str(path)))
            except (AttributeError, OSError) as error:
                warnings.warn(
                    f"the compiled kernel {path.name} doesn't fit this version of rematerialize ({error}); plans are "
                    "made without it, and are slower: install the package again",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, real = ctypes.c_void_p, _I64, ctypes.c_double
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "bench_new": (pointer, [pointer, number, ctypes.c_int]),
        "bench_free": (None, [pointer]),
        "bench_limit": (None, [pointer, number, ctypes.c_int]),
        "bench_length": (number, [pointer]),
        "bench_work": (number, [pointer]),
        "bench_makespan_s": (real, [pointer]),
        "load": (ctypes.c_int, [pointer, pointer, number, number]),
        "unload": (number, [pointer, pointer]),
        "peak": (number, [pointer]),
        "spend": (ctypes.c_int, [pointer, number, number, real]),
        "descend": (ctypes.c_int, [pointer, number, number, real, real, ctypes.c_int]),
        "replay": (number, [pointer, pointer, number, number, pointer]),
        "prune": (number, [pointer, pointer, number, number, pointer]),
        "sweep": (
            number,
            [pointer, pointer, pointer, number, number, real, real, number, pointer, pointer],
        ),
        "ascend": (real, [pointer, number]),
        "closure_flow": (real, [real, number, number, *[pointer] * 7, real, pointer]),
        "chain_fill": (None, [pointer]),
        "rotor_fill": (None, [pointer]),
        "rotor_actions": (number, [pointer, number, number, number, pointer]),
        "join_fill": (None, [pointer]),
        "join_pieces": (number, [pointer, number, pointer]),
        "splice": (number, [pointer]),
        "lower": (ctypes.c_int, [pointer, number, number, ctypes.c_uint64]),
        "improve": (ctypes.c_int, [pointer, number, number, real, ctypes.c_uint64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_library = _load()
available = _library is not None


class _Arrays(ctypes.Structure):
    _fields_ = (
        *((name, _I64) for name in ("ops", "forwards", "values")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "in_ptr", "in_val", "out_ptr", "out_val", "size", "transient", "again", "producer", "flags", "time_s",
            )
        ),
    )  # fmt: skip


class _Chain(ctypes.Structure):
    _fields_ = (
        *((name, _I64) for name in ("count", "slots", "options")),
        ("slot_bytes", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "first_option", "kept", "forward_peak", "backward_peak", "time_s",
                "base", "shift", "transit_s", "rise", "cost", "choice",
            )
        ),
    )  # fmt: skip


class _Rotor(ctypes.Structure):
    _fields_ = (
        *((name, _I64) for name in ("count", "slots", "slot_bytes")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "forward_s", "backward_s", "value_slots", "saved_slots",
                "value", "held", "transit", "saving", "backward", "cost", "least", "enough",
            )
        ),
    )  # fmt: skip


class _Join(ctypes.Structure):
    _fields_ = (
        *((name, _I64) for name in ("count", "longest", "slots", "slot_bytes", "base", "states")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "length", "stride", "forward_s", "backward_s",
                "value", "held", "saved", "transit", "saving", "backward", "piece_s", "head_s", "cost", "least",
            )
        ),
    )  # fmt: skip


def chain_fill(slot_bytes: float, options: int, tables: Mapping[str, NDArray[Any]]) -> bool:
    """Fill the ``cost`` and ``choice`` tables of `solve.chain`; False when nothing is compiled.

    ``tables`` holds C-contiguous arrays by the names of ``Chain`` in chain.c, in that order.
    """
    if _library is None:
        return False
    count, slots = tables["choice"].shape[1], tables["choice"].shape[2] - 1
    _library.chain_fill(
        ctypes.byref(_Chain(count, slots, options, slot_bytes, *(table.ctypes.data for table in tables.values())))
    )
    return True


class RotorTables:
    """The tables of `solve.rotor`, filled.

    Parameters
    ----------
    slot_bytes : int
    tables : mapping of str to array
        C-contiguous, by the names of ``Rotor`` in rotor.c and in that order; its last three are written.
    """

    def __init__(self, slot_bytes: int, tables: Mapping[str, NDArray[Any]]) -> None:
        assert _library is not None, "the compiled kernel is missing"
        self._library, self._tables = _library, tables  # the structure below points into them
        self.cost = tables["cost"]
        count, width = self.cost.shape[1:]
        self._structure = _Rotor(count, width - 1, slot_bytes, *(table.ctypes.data for table in tables.values()))
        _library.rotor_fill(ctypes.byref(self._structure))

    def actions(self, first: int, last: int, slot: int) -> list[int]:
        """Return the schedule of stages first .. last (inclusive): 3 stage + 0 for F, 1 for S, 2 for B."""
        count = last - first + 1
        found: NDArray[np.int32] = np.zeros(count * (count + 3) // 2, dtype=np.int32)
        length = self._library.rotor_actions(ctypes.byref(self._structure), first, last, slot, found.ctypes.data)
        codes: list[int] = found[: max(length, 0)].tolist()
        return codes


class JoinTables:
    """The tables of `solve.join`, filled.

    Parameters
    ----------
    numbers : sequence of int
        The first members of ``Join`` in join.c.
    tables : mapping of str to array
        C-contiguous, by the names of its pointers and in that order; the last two are written.
    """

    def __init__(self, numbers: Sequence[int], tables: Mapping[str, NDArray[Any]]) -> None:
        assert _library is not None, "the compiled kernel is missing"
        self._library, self._tables = _library, tables  # the structure below points into them
        self.cost = tables["cost"]
        self._rows = int(tables["length"].sum()) + 1
        self._structure = _Join(*numbers, *(table.ctypes.data for table in tables.values()))
        _library.join_fill(ctypes.byref(self._structure))

    def pieces(self, slots: int) -> list[list[int]] | None:
        """Return the stack as (tower, start, stop, slots) and last (slots of the head, 0, 0, 0); None if none fits."""
        rows: NDArray[np.int64] = np.zeros((self._rows, 4), dtype=np.int64)
        count = self._library.join_pieces(ctypes.byref(self._structure), slots, rows.ctypes.data)
        found: list[list[int]] = rows[: count + 1].tolist()
        return found if count >= 0 else None


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, _I64) for name in ("rows", "columns")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "starts", "at", "factors", "starts_t", "at_t", "factors_t", "cost", "least", "low", "high",
            )
        ),
    )  # fmt: skip


def ascend(arrays: Sequence[NDArray[Any]], iterations: int) -> float | None:
    """Run the dual ascent of `solve.ascent`; None when nothing is compiled.

    ``arrays`` are C-contiguous, in the order of ``Linear`` in bounds.c, the matrix and its transpose by rows.
    """
    if _library is None:
        return None
    rows, columns = len(arrays[0]) - 1, len(arrays[3]) - 1
    structure = _Linear(rows, columns, *(array.ctypes.data for array in arrays))
    return float(_library.ascend(ctypes.byref(structure), iterations))


def closure_flow(price: float, arrays: Sequence[NDArray[Any]], room: float, passed: NDArray[np.float64]) -> float:
    """Return the flow of `solve.closure` at a price; 0 when nothing is compiled.

    ``arrays``: seconds per op, bytes and source per value, then made and read, each as starts and values.
    """
    if _library is None:
        return 0.0
    addresses = [array.ctypes.data for array in arrays]
    values, ops = len(passed), len(arrays[0])
    return float(_library.closure_flow(price, values, ops, *addresses, room, passed.ctypes.data))


class _Splice(ctypes.Structure):
    _fields_ = (
        *((name, _I64) for name in ("plans", "parts", "words", "known")),
        *((name, ctypes.c_void_p) for name in ("seconds", "fits", "state", "done", "needed", "onward")),
    )


def fastest_splice(arrays: Sequence[NDArray[Any]]) -> tuple[int, NDArray[np.int32]] | None:
    """Return with which plan to begin, and before each part but the first with which to go on; None if none fits.

    ``arrays`` are C-contiguous: seconds (float64) and whether they fit (bool) of every part of each plan, the states
    (int32) before each part but the first, and per state what is done (int32) and what is needed (uint64, as bits).
    """
    assert _library is not None, "only compiled searches make plans to splice"
    (plans, parts), (known, words) = arrays[0].shape, arrays[4].shape
    onward = np.empty((parts - 1, plans), np.int32)
    structure = _Splice(plans, parts, words, known, *(array.ctypes.data for array in (*arrays, onward)))
    first = int(_library.splice(ctypes.byref(structure)))
    if first == -2:
        raise MemoryError("splicing plans")
    return None if first < 0 else (first, onward)


class FlatStep:
    """A step as arrays for the compiled code.

    Attributes
    ----------
    step : Step
    scale : int
        What sizes were divided by, rounded up (1 unless the step holds 2^55 bytes or more).
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        flags = [0] * len(step.size_bytes)
        groups = ((step.held_outputs, _OUTPUT), (step.held_gradients, _GRADIENT), (step.tangents, _TANGENT))
        for values, flag in groups:
            for value in values:
                flags[value] |= flag
        total = sum(step.size_bytes) + max(step.transient_bytes, default=0)
        self.scale = max(-(-total // _ROOM), 1)
        tables: dict[str, Sequence[int]] = {
            "in_ptr": [0, *accumulate(map(len, step.inputs))],
            "in_val": [value for row in step.inputs for value in row],
            "out_ptr": [0, *accumulate(map(len, step.outputs))],
            "out_val": [value for row in step.outputs for value in row],
            "size": [-(-size // self.scale) for size in step.size_bytes],
            "transient": [-(-size // self.scale) for size in step.transient_bytes],
            "again": step.recomputable,
            "producer": step.producer,
            "flags": flags,
        }
        arrays = {name: np.array(table, dtype=np.int64) for name, table in tables.items()}
        arrays["time_s"] = np.array(step.time_s, dtype=np.float64)
        self._users: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._arrays = arrays  # the structure below points into them
        self.structure = _Arrays(
            len(step.names), step.forwards, len(step.size_bytes), *(array.ctypes.data for array in arrays.values())
        )

    def replay(self, plan: Plan) -> tuple[int, float]:
        """Return the peak memory in bytes and the makespan in seconds of a plan. O(length + edges)."""
        if _library is None or self.scale > 1:
            return self.step.peak_bytes(plan), self.step.duration_s(plan.order)
        order: NDArray[np.int64] = np.array(plan.order, dtype=np.int64)
        structure, time_s = ctypes.byref(self.structure), ctypes.c_double()
        peak = _library.replay(structure, order.ctypes.data, len(order), plan.split, ctypes.byref(time_s))
        return int(peak), time_s.value

    def peak_bytes(self, plan: Plan) -> int:
        """Return the peak memory of a plan. O(length + edges)."""
        return self.replay(plan)[0]

    def prune(self, order: Sequence[int] | NDArray[np.int64], split: int) -> Plan:
        """Return the plan without executions whose results nobody reads. O(length + edges)."""
        array: NDArray[np.int64] = np.array(order, dtype=np.int64)
        if _library is None:
            return self.step.prune(array.tolist(), split)
        kept = _I64()
        structure = ctypes.byref(self.structure)
        count = _library.prune(structure, array.ctypes.data, len(array), split, ctypes.byref(kept))
        return Plan(tuple(array[:count].tolist()), kept.value)

    def sweep(
        self, budget_bytes: int, *, slack_bytes: int, size_power: float, distance_power: float, longest: int
    ) -> Plan | None:
        """Walk the step within a budget, evicting what is cheapest to have again (`solve.sweep`); None if stuck."""
        assert _library is not None, "the compiled kernel is missing"
        if self._users is None:
            users = self.step.users
            pointer = np.array([0, *accumulate(map(len, users))], dtype=np.int64)
            self._users = pointer, np.array([op for row in users for op in row], dtype=np.int64)
        pointer, users_of = self._users
        order: NDArray[np.int64] = np.zeros(longest + 2, dtype=np.int64)
        split = _I64()
        length = _library.sweep(
            ctypes.byref(self.structure),
            pointer.ctypes.data,
            users_of.ctypes.data,
            budget_bytes // self.scale,
            slack_bytes // self.scale,
            size_power,
            distance_power,
            longest,
            order.ctypes.data,
            ctypes.byref(split),
        )
        return None if length < 0 else self.prune(order[:length], split.value)


class Workbench:
    """A schedule under construction, with exact memory (in scaled bytes, rounded up) after every move.

    Parameters
    ----------
    flat : FlatStep
    length : int
        Executions that there has to be room for.
    varied : bool
        Whether searches lay schedules out closer and wider in turn: that takes more memory, but the wider ones have
        room for recomputing more in one place.
    """

    def __init__(self, flat: FlatStep, length: int, *, varied: bool = False) -> None:
        assert _library is not None, "the compiled kernel is missing"
        self._library = _library
        self._flat = flat
        self.length = length
        self.varied = varied
        self._bench = _library.bench_new(ctypes.byref(flat.structure), length, varied)
        if not self._bench:
            raise MemoryError(f"no memory for schedules of {length} executions")

    def __del__(self) -> None:
        if getattr(self, "_bench", None):
            self._library.bench_free(self._bench)

    def limit(self, length: int, *, varied: bool = False) -> None:
        """Behave like a bench made for so many executions, at most ``self.length``; before `load`.

        Only one made for varied searches can be told to vary.
        """
        assert self.varied or not varied, "this bench has no room for that"
        self._library.bench_limit(self._bench, length, varied)

    def load(self, plan: Plan) -> bool:
        """Lay a valid plan out; False when it is too long for this bench. O(length + edges)."""
        order: NDArray[np.int64] = np.array(plan.order, dtype=np.int64)
        return bool(self._library.load(self._bench, order.ctypes.data, len(order), plan.split))

    def plan(self) -> Plan:
        """Return the present plan."""
        order: NDArray[np.int64] = np.zeros(self._library.bench_length(self._bench), dtype=np.int64)
        split = self._library.unload(self._bench, order.ctypes.data)
        return Plan(tuple(order.tolist()), int(split))

    @property
    def time_s(self) -> float:
        """The present makespan."""
        return float(self._library.bench_makespan_s(self._bench))

    @property
    def work(self) -> int:
        """Moves tried since this bench was made."""
        return int(self._library.bench_work(self._bench))

    def peak_bytes(self) -> int:
        """Return the present peak (rounded up to whole scaled bytes)."""
        return int(self._library.peak(self._bench)) * self._flat.scale

    def spend(self, budget_bytes: int, *, rounds: int = 20, noise: float = 0.0) -> bool:
        """Delete recomputations while the peak stays within a budget; True if any went."""
        return bool(self._library.spend(self._bench, budget_bytes // self._flat.scale, rounds, noise))

    def descend(self, target_bytes: int, *, rounds: int = 40, noise: float = 0.0, stretch: float = 0.25) -> bool:
        """Insert recomputations until the peak is at most a target; False when stuck."""
        target = target_bytes // self._flat.scale
        return bool(self._library.descend(self._bench, target, rounds, noise, stretch, 1))

    def lower(self, target_bytes: int, work: int, *, seed: int = 1) -> bool:
        """Look around the present plan for one within a target; False if none was found: another plan is there then."""
        return bool(self._library.lower(self._bench, target_bytes // self._flat.scale, work, seed))

    def improve(self, budget_bytes: int, work: int, *, threshold: float = 0.003, seed: int = 1) -> bool:
        """Search around a plan within its budget until so many moves were tried; True if it got faster."""
        budget = budget_bytes // self._flat.scale
        return bool(self._library.improve(self._bench, budget, work, threshold, seed))
