/* The inner loops of the lower bounds; what they prove stands in `solve/ascent.py` and `solve/closure.py`. */

#include "kernel.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PERIOD 200        /* iterations between restarts */
#define ROUNDING 1e-11    /* of the terms of a dual value */

typedef struct {
    const i64 *starts, *columns;
    const double *factors;
    i64 rows;
} Matrix;

typedef struct {
    i64 rows, columns;
    const i64 *starts, *at; const double *factors;             /* of A, by row */
    const i64 *starts_t, *at_t; const double *factors_t;       /* of its transpose */
    const double *cost, *least, *low, *high;
} Linear;

static void multiply(Matrix m, const double *x, double *out) {
    for (i64 row = 0; row < m.rows; row++) {
        double total = 0.0;
        for (i64 e = m.starts[row]; e < m.starts[row + 1]; e++) total += m.factors[e] * x[m.columns[e]];
        out[row] = total;
    }
}

/* The dual value of y, less what its sums may have been rounded up. */
static double dual(const Linear *p, Matrix transposed, const double *y, double *price) {
    double total = 0.0, size = 0.0;
    multiply(transposed, y, price);
    for (i64 i = 0; i < p->rows; i++) {
        total += y[i] * p->least[i];
        size += fabs(y[i] * p->least[i]);
    }
    for (i64 j = 0; j < p->columns; j++) {
        double reduced = p->cost[j] - price[j], part = reduced * (reduced > 0 ? p->low[j] : p->high[j]);
        total += part;
        size += fabs(part) + (p->cost[j] + fabs(price[j])) * p->high[j];
    }
    return total - ROUNDING * size;
}

static void set_steps(Matrix m, double *out) {
    for (i64 row = 0; row < m.rows; row++) {
        double total = 1.0;
        for (i64 e = m.starts[row]; e < m.starts[row + 1]; e++) total += fabs(m.factors[e]);
        out[row] = 1.0 / total;
    }
}

/* Set the old vector to the new one; return how far that is. */
static double move(const double *new, double *old, i64 count) {
    double total = 0.0;
    for (i64 k = 0; k < count; k++) {
        total += (new[k] - old[k]) * (new[k] - old[k]);
        old[k] = new[k];
    }
    return sqrt(total);
}

/* Largest dual value met by the primal-dual hybrid gradient; -inf without memory. O(iterations x entries). */
double ascend(const Linear *p, i64 iterations) {
    Matrix a = {p->starts, p->at, p->factors, p->rows}, t = {p->starts_t, p->at_t, p->factors_t, p->columns};
    i64 rows = p->rows, columns = p->columns, since = 0;
    double *all = calloc((size_t)(5 * rows + 6 * columns) + 1, sizeof(double));
    if (!all) return -HUGE_VAL;
    double *sigma = all, *y = sigma + rows, *y_sum = y + rows, *y_old = y_sum + rows, *load_of = y_old + rows;
    double *tau = load_of + rows, *x = tau + columns, *x_sum = x + columns, *x_old = x_sum + columns;
    double *ahead = x_old + columns, *price = ahead + columns, weight = 1.0;
    set_steps(a, sigma);
    set_steps(t, tau);
    memcpy(x, p->low, (size_t)columns * sizeof(double));
    memcpy(x_old, p->low, (size_t)columns * sizeof(double));
    double best = dual(p, t, y, price);
    for (i64 iteration = 0; iteration < iterations; iteration++) {
        multiply(t, y, price);
        for (i64 j = 0; j < columns; j++) {
            double now = x[j] - tau[j] / weight * (p->cost[j] - price[j]);
            now = now < p->low[j] ? p->low[j] : now;
            now = now > p->high[j] ? p->high[j] : now;
            ahead[j] = 2.0 * now - x[j];
            x[j] = now;
            x_sum[j] += now;
        }
        multiply(a, ahead, load_of);
        for (i64 i = 0; i < rows; i++) {
            double now = y[i] + sigma[i] * weight * (p->least[i] - load_of[i]);
            y[i] = now > 0.0 ? now : 0.0;
            y_sum[i] += y[i];
        }
        if (++since < PERIOD) continue;
        double last = dual(p, t, y, price);
        for (i64 i = 0; i < rows; i++) load_of[i] = y_sum[i] / (double)since;
        double mean = dual(p, t, load_of, price);
        best = fmax(best, fmax(last, mean));
        if (mean >= last) {
            memcpy(y, load_of, (size_t)rows * sizeof(double));
            for (i64 j = 0; j < columns; j++) x[j] = x_sum[j] / (double)since;
        }
        memset(x_sum, 0, (size_t)columns * sizeof(double));
        memset(y_sum, 0, (size_t)rows * sizeof(double));
        since = 0;
        double far = move(x, x_old, columns), up = move(y, y_old, rows);
        if (far > 0.0 && up > 0.0) weight = sqrt(weight * up / far);
    }
    free(all);
    return best;
}

/* What flows from the demanded values into the ops that make them, at a price per byte kept, less the room's price.

   `passed` is scratch, one per value. O(values + edges). */
double closure_flow(double price, i64 values, i64 ops, const double *time_s, const double *size, const i64 *source,
                    const i64 *made_at, const i64 *made, const i64 *read_at, const i64 *read, double room,
                    double *passed) {
    double total = 0.0;
    for (i64 v = 0; v < values; v++) passed[v] = source[v] ? price * size[v] : 0.0;
    for (i64 op = ops - 1; op >= 0; op--) {
        double left = 0.0;
        for (i64 e = made_at[op]; e < made_at[op + 1]; e++) left += passed[made[e]];
        double absorbed = left < time_s[op] ? left : time_s[op];
        total += absorbed;
        left -= absorbed;
        for (i64 e = read_at[op]; e < read_at[op + 1]; e++) {
            double space = price * size[read[e]] - passed[read[e]], more = left < space ? left : space;
            passed[read[e]] += more;
            left -= more;
        }
    }
    return total - price * room;
}
