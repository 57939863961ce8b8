"""The least that must be recomputed after a moment, given the room for what is kept there.

Keep values within the room; whatever else is demanded later is made again, along with all that this
takes: a knapsack under precedence. With a price per byte in place of the room it is a minimum cut, and by
duality any flow in its network is a bound: flow enters at demanded values, passes a value up to price x
size, and is absorbed by the op that makes it up to its time_s; what an op can't absorb goes on to what the
op reads. Here one pass over the ops in reverse pushes it greedily, for several prices:

    recomputed >= flow(price) - price x room      for every price >= 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rematerialize.solve.native import closure_flow
from rematerialize.solve.necessity import Necessity

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
PRICES = 24  # tried on each of ROUNDS ever finer grids
ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Closure:
    """The network of a step: only values and ops that can be made again."""

    time_s: Floats
    size: Floats
    made: tuple[Ints, Ints]
    read: tuple[Ints, Ints]

    @classmethod
    def of(cls, need: Necessity) -> Closure:
        """Return the network of a step's forward; what needs no run before the split absorbs nothing."""
        step = need.step
        again = [op for op in range(step.forwards) if step.recomputable[op]]
        made = {op: [v for v in step.outputs[op] if v not in step.held_outputs] for op in again}
        read = {op: need.reads(op, again=True) for op in again}
        return cls(
            np.array([step.time_s[op] if need.forced[op] else 0.0 for op in range(step.forwards)]),
            np.array(need.sizes, np.float64),
            _lists([made.get(op, []) for op in range(step.forwards)]),
            _lists([read.get(op, []) for op in range(step.forwards)]),
        )

    def least_s(self, demanded: list[int], free: list[int], room: int) -> float:
        """Return a bound in seconds. O(prices x edges).

        Parameters
        ----------
        demanded : list of int
            Values that something later reads.
        free : list of int
            Values that are there in any case; ``room`` doesn't count them.
        room : int
            For all other values that are kept, in the units of `Necessity`.
        """
        source, size = np.zeros(len(self.size), np.int64), self.size.copy()
        source[demanded] = 1
        size[free] = 0.0
        best = 0.0
        rates = self.time_s[self.time_s > 0]
        sizes = size[size > 0]
        if not len(rates) or not len(sizes):
            return best
        low, high = np.log(rates.min() / sizes.max()), np.log(self.time_s.sum() / sizes.min())
        arrays, passed = (self.time_s, size, source, *self.made, *self.read), np.zeros(len(size))
        for _ in range(ROUNDS):
            prices = np.linspace(low, high, PRICES)
            values = [closure_flow(float(np.exp(p)), arrays, float(room), passed) for p in prices]
            at = int(np.argmax(values))
            best = max(best, values[at])
            low, high = prices[max(at - 1, 0)], prices[min(at + 1, PRICES - 1)]
        return best


def _lists(items: list[list[int]]) -> tuple[Ints, Ints]:
    starts = np.zeros(len(items) + 1, np.int64)
    np.cumsum([len(item) for item in items], out=starts[1:])
    return starts, np.array([value for item in items for value in item], np.int64)
