"""A schedule: which ops to run, in which order, recomputations included.

The JSON form is ``rematerialize.schedule/1``. Frees are implicit: a storage instance dies after the
op that uses it last; computing an op again makes new instances of its outputs, and later uses read
the newest.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """The op names to run in the forward and in the backward, in order.

    Attributes
    ----------
    forward : tuple of str
        Forward ops, possibly some of them several times.
    backward : tuple of str
        Every backward op once, forward ops again wherever they are recomputed.
    budget_bytes : int
        The budget that it was made for.
    solver : str
        Registry name of the solver that found it.
    peak_bytes : int
        Peak memory by the simulator, in bytes.
    time_s : float
        Makespan: the sum of the times of everything that it runs.
    minimum_bytes : int
        The smallest budget for which the solver found a schedule.
    """

    forward: tuple[str, ...]
    backward: tuple[str, ...]
    budget_bytes: int
    solver: str
    peak_bytes: int
    time_s: float
    minimum_bytes: int
