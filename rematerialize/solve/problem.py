"""The chain problem, as the literature has it: stages, what they cost, and what can be done with them.

The model is that of Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, "Optimal checkpointing for
heterogeneous chains" (2019). Stage l = 0 .. n-1 takes the value a_l and makes a_{l+1}; its backward reads
a_l and abar_l, which is everything that the stage saved, a_{l+1} included. A schedule is a sequence of

    F_l  run the stage and save nothing; a_l may be dropped or kept
    S_l  run the stage and save abar_l; a_l is kept (the paper's F_all)
    B_l  the backward of the stage, once each, from n-1 down to 0
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Action:
    """F, S or B of a stage."""

    kind: Literal["F", "S", "B"]
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}"


def vocabulary(stages: int) -> tuple[Action, ...]:
    """Return every action of a chain: that of code 3 stage + (0 for F, 1 for S, 2 for B) at its code."""
    kinds: tuple[Literal["F", "S", "B"], ...] = ("F", "S", "B")
    return tuple(Action(kind, stage) for stage in range(stages) for kind in kinds)


@dataclass(frozen=True, slots=True)
class Chain:
    """Times in seconds and sizes in bytes of a chain of n stages.

    Attributes
    ----------
    forward_s, backward_s : tuple of float
        Of each stage.
    value_bytes : tuple of int
        Of a_0 .. a_n. Nobody counts a_0 as long as nobody can drop it: a budget is for all the others.
    saved_bytes : tuple of int
        Of abar_l, a_{l+1} included.
    held_bytes : tuple of int
        ``held_bytes[t]``: gradients in memory when the backward of stages t .. n-1 is done; the last is
        what is there before the backward begins.
    transit_peak_bytes, saving_peak_bytes : tuple of int
        Memory beyond a_l while F_l and while S_l run, outputs included.
    backward_peak_bytes : tuple of int
        Memory beyond a_l and abar_l while B_l runs, gradients included.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    value_bytes: tuple[int, ...]
    saved_bytes: tuple[int, ...]
    held_bytes: tuple[int, ...]
    transit_peak_bytes: tuple[int, ...]
    saving_peak_bytes: tuple[int, ...]
    backward_peak_bytes: tuple[int, ...]

    @classmethod
    def of_paper(
        cls,
        forward_s: Sequence[float],
        backward_s: Sequence[float],
        value_bytes: Sequence[int],
        saved_bytes: Sequence[int],
        forward_overhead_bytes: Sequence[int],
        backward_overhead_bytes: Sequence[int],
    ) -> Chain:
        """Return the chain of the paper's parameters u_F, u_B, w_a, w_abar, o_F, o_B.

        The gradient of a_l is as large as a_l; that of a_n appears with the first backward.

        Examples
        --------
        >>> Chain.of_paper([1.0], [2.0], [4, 3], [5], [1], [0]).backward_peak_bytes
        (7,)
        """
        values, count = tuple(value_bytes), len(forward_s)
        return cls(
            tuple(forward_s),
            tuple(backward_s),
            values,
            tuple(saved_bytes),
            (*values[:-1], 0),
            tuple(values[at + 1] + forward_overhead_bytes[at] for at in range(count)),
            tuple(saved_bytes[at] + forward_overhead_bytes[at] for at in range(count)),
            tuple(values[at] + values[at + 1] + backward_overhead_bytes[at] for at in range(count)),
        )

    def rounded(self, slot_bytes: int) -> Chain:
        """Return the chain with every size rounded to the nearest multiple of a slot.

        For those who let a judge decide: rounding up is safe, but it adds up over everything that is kept.
        """
        names = [name for name in self.__slots__ if name.endswith("_bytes")]
        half = slot_bytes // 2
        near = {name: tuple((size + half) // slot_bytes * slot_bytes for size in getattr(self, name)) for name in names}
        return replace(self, **near)

    def __len__(self) -> int:
        return len(self.forward_s)


def spell(actions: Iterable[Action]) -> str:
    """Return a schedule as text.

    >>> spell([Action("F", 0), Action("S", 1), Action("B", 1)])
    'F0 S1 B1'
    """
    return " ".join(map(str, actions))
