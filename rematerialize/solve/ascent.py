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
from numba import njit

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
ROUNDING = 1e-11  # of the terms of a dual value
PERIOD = 200  # iterations between restarts


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
        best: float = _ascend(matrix, transposed, self.cost, self.least, self.low, self.high, iterations)
        return best


def _compress(row: Ints, column: Ints, factor: Floats, count: int) -> tuple[Ints, Ints, Floats]:
    order = np.argsort(row, kind="stable")
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=count), out=starts[1:])
    return starts, column[order], factor[order]


@njit(cache=True)
def _multiply(matrix, x, out):  # type: ignore[no-untyped-def]
    starts, columns, factors = matrix
    for row in range(len(out)):
        total = 0.0
        for at in range(starts[row], starts[row + 1]):
            total += factors[at] * x[columns[at]]
        out[row] = total


@njit(cache=True)
def _dual(transposed, cost, least, low, high, y, price):  # type: ignore[no-untyped-def]
    """Return the dual value of y, less what its sums may have been rounded up."""
    _multiply(transposed, y, price)
    total, size = 0.0, 0.0
    for row in range(len(y)):
        total += y[row] * least[row]
        size += abs(y[row] * least[row])
    for column in range(len(cost)):
        reduced = cost[column] - price[column]
        part = reduced * (low[column] if reduced > 0 else high[column])
        total += part
        size += abs(part) + (cost[column] + abs(price[column])) * high[column]
    return total - ROUNDING * size


@njit(cache=True)
def _steps(matrix):  # type: ignore[no-untyped-def]
    """Return 1 / (1 + the sum of the absolute entries) of each row."""
    out = np.empty(len(matrix[0]) - 1)
    for row in range(len(out)):
        total = 1.0
        for at in range(matrix[0][row], matrix[0][row + 1]):
            total += abs(matrix[2][at])
        out[row] = 1.0 / total
    return out


@njit(cache=True)
def _move(new, old):  # type: ignore[no-untyped-def]
    """Set the old vector to the new one; return how far that is."""
    total = 0.0
    for at in range(len(new)):
        total += (new[at] - old[at]) ** 2
        old[at] = new[at]
    return np.sqrt(total)


@njit(cache=True)
def _ascend(matrix, transposed, cost, least, low, high, iterations):  # type: ignore[no-untyped-def]
    """Return the largest dual value met by the primal-dual hybrid gradient. O(iterations x entries)."""
    rows, columns = len(least), len(cost)
    sigma, tau = _steps(matrix), _steps(transposed)
    x, x_sum, x_old, ahead, price = low.copy(), low * 0.0, low.copy(), low.copy(), low.copy()
    y, y_sum, y_old, load = np.zeros(rows), np.zeros(rows), np.zeros(rows), np.zeros(rows)
    best, weight, since = _dual(transposed, cost, least, low, high, y, price), 1.0, 0
    for _ in range(iterations):
        _multiply(transposed, y, price)
        for j in range(columns):
            new = min(high[j], max(low[j], x[j] - tau[j] / weight * (cost[j] - price[j])))
            ahead[j] = 2.0 * new - x[j]
            x[j] = new
            x_sum[j] += new
        _multiply(matrix, ahead, load)
        for i in range(rows):
            y[i] = max(0.0, y[i] + sigma[i] * weight * (least[i] - load[i]))
            y_sum[i] += y[i]
        since += 1
        if since == PERIOD:
            now = _dual(transposed, cost, least, low, high, y, price)
            for i in range(rows):
                load[i] = y_sum[i] / since
            mean = _dual(transposed, cost, least, low, high, load, price)
            best = max(best, now, mean)
            if mean >= now:
                for i in range(rows):
                    y[i] = load[i]
                for j in range(columns):
                    x[j] = x_sum[j] / since
            x_sum[:], y_sum[:], since = 0.0, 0.0, 0
            far, high_up = _move(x, x_old), _move(y, y_old)
            if far > 0.0 and high_up > 0.0:
                weight = np.sqrt(weight * high_up / far)
    return best
