"""The training graph: one training step at the level of storages, frozen and checkable.

A storage is what owns bytes; views own none and are folded into the storage that they look at.
The JSON form is ``rematerialize.graph/1``. Reading is lenient about keys it doesn't know and strict
about everything else: whatever is wrong becomes one GraphError that names the op or the storage.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rematerialize.errors import GraphError

Phase = Literal["forward", "backward"]
FORMAT = "rematerialize.graph/1"
LONGEST_S = 1e300  # of a step: makespans with recomputations, and their ratios, stay finite


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel call (or a fused group of them) of the step.

    Attributes
    ----------
    name : str
        Unique among the ops of a graph.
    phase : {"forward", "backward"}
        A backward op is computed exactly once; a forward op as often as a schedule asks.
    time_s : float
        Cost of one execution in seconds.
    inputs, outputs : tuple of str
        Storage names read and (newly) written.
    transient_bytes : int
        Workspace that lives only while the op runs.
    recomputable : bool
        False: computed at most once, in the forward.
    target, source, module : str
        What it runs, the user's line that asked for it ("model.py:12"), and the qualified name of the module that
        was being called ("layers.3.attention"; "" is the model itself). A backward op has its forward op's.
    """

    name: str
    phase: Phase
    time_s: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    transient_bytes: int = 0
    recomputable: bool = True
    target: str = ""
    source: str = ""
    module: str = ""


@dataclass(frozen=True, slots=True)
class TrainingGraph:
    """One training step: ops in an executable order, all forward ops before all backward ops.

    Attributes
    ----------
    ops : tuple of Op
    storages : mapping of str to int
        Size of each storage in bytes.
    resident : frozenset of str
        Live before, during and after the step; never counted in the peak.
    tangents : tuple of str
        Appear when the backward starts, counted until their last use.
    outputs : tuple of str
        Forward results, live from their production to the end of the step.
    gradients : tuple of str
        Live from their production to the end of the step.
    labels : mapping of str to str
        What people call a storage: "layers.0.weight float32[64, 64]". For reports only, and not of every storage.

    Examples
    --------
    >>> square = Op("square", "forward", 1.0, ("x",), ("y",))
    >>> double = Op("double", "backward", 1.0, ("x", "dy"), ("dx",))
    >>> graph = TrainingGraph((square, double), {"x": 4, "y": 4, "dy": 4, "dx": 4},
    ...                       frozenset({"x"}), ("dy",), ("y",), ("dx",)).verify()
    >>> TrainingGraph.from_json(graph.to_json()) == graph
    True
    """

    ops: tuple[Op, ...]
    storages: Mapping[str, int]
    resident: frozenset[str]
    tangents: tuple[str, ...]
    outputs: tuple[str, ...]
    gradients: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)

    def verify(self) -> TrainingGraph:
        """Return the graph itself; raise GraphError at the first rule that it breaks. O(edges)."""
        _verify_storages(self)
        _verify_ops(self)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the graph, in a fixed key order."""
        labelled = {"labels": dict(self.labels)} if self.labels else {}
        return {
            "format": FORMAT,
            "storages": dict(self.storages),
            "resident": sorted(self.resident),
            "tangents": list(self.tangents),
            "ops": [_op_to_dict(op) for op in self.ops],
            "outputs": list(self.outputs),
            "gradients": list(self.gradients),
            **labelled,
        }

    def to_json(self) -> str:
        """Return the text of a ``rematerialize.graph/1`` file; floats survive the round trip exactly."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, source: str | bytes | Mapping[str, Any]) -> TrainingGraph:
        """Read a graph from the text of a file, or from the object already parsed, and verify it.

        Raises
        ------
        GraphError
            Not JSON, another format, a missing key, a wrong type, or a rule of the graph broken.
        """
        data = source if isinstance(source, Mapping) else _parse(source)
        if data.get("format") != FORMAT:
            raise GraphError(f"graph: format is {data.get('format')!r}, need {FORMAT!r}")
        storages = _get(data, "storages", "graph")
        ops = _get(data, "ops", "graph")
        if not isinstance(storages, Mapping):
            raise GraphError(f"graph: storages must be an object of sizes, got {type(storages).__name__}")
        if not isinstance(ops, (list, tuple)):
            raise GraphError(f"graph: ops must be a list, got {type(ops).__name__}")
        resident = _names(data, "resident", "graph")
        _no_duplicates(resident, "resident")
        return cls(
            ops=tuple(_op_from_dict(position, op) for position, op in enumerate(ops)),
            storages=dict(storages),
            resident=frozenset(resident),
            tangents=_names(data, "tangents", "graph"),
            outputs=_names(data, "outputs", "graph"),
            gradients=_names(data, "gradients", "graph"),
            labels=_labels(data),
        ).verify()

    def content_hash(self) -> str:
        """Return the SHA-256 of what a plan depends on: everything but what is there for readers."""
        data = self.to_dict()
        data.pop("labels", None)
        data["storages"] = dict(sorted(self.storages.items()))
        for op in data["ops"]:
            for readers in ("target", "source", "module"):
                op.pop(readers, None)
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def dump(self) -> str:
        """Return a stable, readable listing: one line per op, sizes in bytes."""
        lines = [
            f"graph {len(self.ops)} ops, {len(self.storages)} storages, {len(self.resident)} resident",
            f"tangents {' '.join(self.tangents)}",
        ]
        for op in self.ops:
            made = " ".join(f"{name}:{self.storages[name]}" for name in op.outputs)
            flags = "" if op.recomputable else "  once"
            workspace = f"  +{op.transient_bytes}" if op.transient_bytes else ""
            arrow = f"{made or '()'} = {op.name}({' '.join(op.inputs)})"
            lines.append(f"{op.phase[0]} {arrow}  {op.time_s:.3g}s{workspace}{flags}")
        lines += [f"outputs {' '.join(self.outputs)}", f"gradients {' '.join(self.gradients)}"]
        return "\n".join(lines) + "\n"


def _op_to_dict(op: Op) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": op.name,
        "phase": op.phase,
        "time_s": op.time_s,
        "transient_bytes": op.transient_bytes,
        "inputs": list(op.inputs),
        "outputs": list(op.outputs),
        "recomputable": op.recomputable,
    }
    if op.target:
        data["target"] = op.target
    if op.source:
        data["source"] = op.source
    if op.module:
        data["module"] = op.module
    return data


def _op_from_dict(position: int, data: Any) -> Op:
    if not isinstance(data, Mapping):
        raise GraphError(f"op number {position}: must be an object, got {type(data).__name__}")
    name = _get(data, "name", f"op number {position}")
    if not isinstance(name, str):
        raise GraphError(f"op number {position}: name must be a string, got {name!r}")
    where = f"op {name!r}"
    time_s = _get(data, "time_s", where)
    if isinstance(time_s, int) and not isinstance(time_s, bool):
        try:
            time_s = float(time_s)
        except OverflowError:
            raise GraphError(f"{where}: time_s is too large for a float") from None
    return Op(
        name=name,
        phase=_get(data, "phase", where),
        time_s=time_s,
        inputs=_names(data, "inputs", where),
        outputs=_names(data, "outputs", where),
        transient_bytes=data.get("transient_bytes", 0),
        recomputable=data.get("recomputable", True),
        target=data.get("target", ""),
        source=data.get("source", ""),
        module=data.get("module", ""),
    )


def _labels(data: Mapping[str, Any]) -> dict[str, str]:
    labels = data.get("labels", {})
    if not isinstance(labels, Mapping) or not all(isinstance(label, str) for label in labels.values()):
        raise GraphError("graph: labels must be an object of strings")
    return dict(labels)


def _parse(text: str | bytes) -> Mapping[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            _no_duplicates([key for key, _ in pairs], "keys of one JSON object")
        return found

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except GraphError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise GraphError(f"graph: not a JSON file ({error})") from None
    if not isinstance(data, dict):
        raise GraphError(f"graph: the file must hold one object, got {type(data).__name__}")
    return data


def _get(data: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in data:
        raise GraphError(f"{where}: the key {key!r} is missing")
    return data[key]


def _names(data: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    names = _get(data, key, where)
    if not isinstance(names, (list, tuple)):
        raise GraphError(f"{where}: {key} must be a list of names, got {type(names).__name__}")
    for name in names:
        if not isinstance(name, str):
            raise GraphError(f"{where}: {key} must hold names, got {name!r}")
    return tuple(names)


def _no_duplicates(names: Iterable[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise GraphError(f"{name!r} stands twice in {where}")
        seen.add(name)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _verify_storages(graph: TrainingGraph) -> None:
    for name, size in graph.storages.items():
        if not isinstance(name, str):
            raise GraphError(f"storage {name!r}: its name must be a string")
        if not _is_size(size):
            raise GraphError(f"storage {name!r}: size must be a whole number of bytes >= 0, got {size!r}")
    groups = {
        "resident": sorted(graph.resident),
        "tangents": graph.tangents,
        "outputs": graph.outputs,
        "gradients": graph.gradients,
    }
    for where, names in groups.items():
        _no_duplicates(names, where)
        for name in names:
            if name not in graph.storages:
                raise GraphError(f"{where}: unknown storage {name!r}")
    for name in graph.tangents:
        if name in graph.resident:
            raise GraphError(f"storage {name!r} is both resident and a tangent")
        if name in graph.outputs:
            raise GraphError(f"storage {name!r} is a tangent and can't be a forward output")


def _verify_op(op: Op) -> None:
    where = f"op {op.name!r}"
    if op.phase not in ("forward", "backward"):
        raise GraphError(f"{where}: phase must be 'forward' or 'backward', got {op.phase!r}")
    if not isinstance(op.time_s, float) or not math.isfinite(op.time_s) or op.time_s < 0:
        raise GraphError(f"{where}: time_s must be a finite number >= 0, got {op.time_s!r}")
    if not _is_size(op.transient_bytes):
        raise GraphError(f"{where}: transient_bytes must be a whole number >= 0, got {op.transient_bytes!r}")
    if not isinstance(op.recomputable, bool):
        raise GraphError(f"{where}: recomputable must be true or false, got {op.recomputable!r}")
    if not all(isinstance(text, str) for text in (op.target, op.source, op.module)):
        raise GraphError(f"{where}: target, source and module must be strings")


def _verify_ops(graph: TrainingGraph) -> None:
    phase_of: dict[str, Phase] = {}
    produced_at = {out: op for op in graph.ops for out in op.outputs}
    _no_duplicates((op.name for op in graph.ops), "ops")
    backward_started: str | None = None
    total_s = 0.0
    for op in graph.ops:
        _verify_op(op)
        total_s += op.time_s
        if total_s > LONGEST_S:
            raise GraphError(f"op {op.name!r}: with its time_s of {op.time_s!r} the step exceeds {LONGEST_S:g} s")
        if op.phase == "backward":
            backward_started = backward_started or op.name
        elif backward_started is not None:
            raise GraphError(f"op {op.name!r}: a forward op after the backward op {backward_started!r}")
        for name in op.inputs:
            _verify_input(graph, op, name, phase_of, produced_at.get(name))
        for name in op.outputs:
            if name not in graph.storages:
                raise GraphError(f"op {op.name!r}: unknown output storage {name!r}")
            if name in graph.resident or name in graph.tangents:
                raise GraphError(f"op {op.name!r}: writes {name!r}, which is resident or a tangent")
            if name in phase_of:
                raise GraphError(f"op {op.name!r}: storage {name!r} was already produced by another output")
            phase_of[name] = op.phase
    for name in graph.outputs:
        if phase_of.get(name, "resident" if name in graph.resident else "") not in ("forward", "resident"):
            raise GraphError(f"output {name!r} is not produced by any forward op")
    for name in graph.gradients:
        if name not in phase_of and name not in graph.resident and name not in graph.tangents:
            raise GraphError(f"gradient {name!r} is not produced by any op")


def _verify_input(graph: TrainingGraph, op: Op, name: str, phase_of: Mapping[str, Phase], producer: Op | None) -> None:
    if name not in graph.storages:
        raise GraphError(f"op {op.name!r}: unknown input storage {name!r}")
    if name in graph.resident or name in phase_of:
        return
    if name in graph.tangents:
        if op.phase == "backward":
            return
        raise GraphError(f"op {op.name!r}: a forward op can't read the tangent {name!r}")
    if producer is None:
        raise GraphError(f"op {op.name!r}: input {name!r} is neither resident, a tangent nor produced")
    if op.phase == "forward" and producer.phase == "backward":
        raise GraphError(f"op {op.name!r}: a forward op can't read {name!r}, made by the backward op {producer.name!r}")
    raise GraphError(f"op {op.name!r}: reads {name!r} before the op {producer.name!r} produces it (a cycle?)")
