"""Lower bounds on a linear program by a first-order method: any iterate proves its own bound.

min c x subject to A x >= q, low <= x <= high: every y >= 0 bounds it from below by y q plus, for each
variable, the least of (c - A^T y) x within its limits. The y come from the primal-dual hybrid gradient
(Chambolle, Pock, "A first-order primal-dual algorithm for convex problems", 2011) with diagonal steps,
restarted from averages as in PDLP (Applegate et al., "Practical large-scale linear programming using
primal-dual hybrid gradient", NeurIPS 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rematerialize.solve.native import ascend

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Program:
    """A linear program; its matrix as entries (row, column, factor), each variable within finite limits."""

    cost: Floats
    low: Floats
    high: Floats
    least: Floats
    row: Ints
    column: Ints
    factor: Floats

    def dual(self, iterations: int) -> float:
        """Return the largest dual value met in so many iterations, rounded down. O(iterations x entries).

        Examples
        --------
        >>> one = np.ones(1)
        >>> at_least_half = Program(one, 0 * one, one, 0.5 * one, np.array([0]), np.array([0]), one)
        >>> 0.49 < at_least_half.dual(1000) <= 0.5
        True
        """
        matrix = _compress(self.row, self.column, self.factor, len(self.least))
        transposed = _compress(self.column, self.row, self.factor, len(self.cost))
        found = ascend((*matrix, *transposed, self.cost, self.least, self.low, self.high), iterations)
        if found is None:  # nothing compiled: the dual value of y = 0
            return float(np.minimum(self.cost * self.low, self.cost * self.high).sum()) * (1 - 1e-9)
        return found


def _compress(row: Ints, column: Ints, factor: Floats, count: int) -> tuple[Ints, Ints, Floats]:
    order = np.argsort(row, kind="stable")
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=count), out=starts[1:])
    return starts, column[order], factor[order]
