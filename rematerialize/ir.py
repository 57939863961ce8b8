"""The training graph: one training step at the level of storages, frozen and checkable.

A storage is what owns bytes; views own none and are folded into the storage that they look at.
The JSON form is ``rematerialize.graph/1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward"]


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
    target, source : str
        What it runs, and the user's line that asked for it ("model.py:12").
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
    """

    ops: tuple[Op, ...]
    storages: Mapping[str, int]
    resident: frozenset[str]
    tangents: tuple[str, ...]
    outputs: tuple[str, ...]
    gradients: tuple[str, ...]
