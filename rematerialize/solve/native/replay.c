/* What an order needs and which of its executions nobody reads: the solvers' own replay, not the judge's. */

#include "kernel.h"

#include <stdlib.h>
#include <string.h>

/* Peak of an order, in scaled bytes; -1 without memory. Writes how long it takes. O(length + edges). */
i64 replay(const Graph *g, const i64 *order, i64 length, i64 split, double *time_s) {
    i64 *delta = calloc((size_t)length + 2, sizeof(i64));
    i64 *birth = malloc(((size_t)g->values + 1) * sizeof(i64)), *death = malloc(((size_t)g->values + 1) * sizeof(i64));
    i64 found = -1;
    if (delta && birth && death) {
        for (i64 v = 0; v < g->values; v++) birth[v] = -1;
        for (i64 k = 0; k <= length; k++) {
            if (k == split)
                for (i64 v = 0; v < g->values; v++) {
                    if (g->flags[v] & OUTPUT && birth[v] >= 0) death[v] = length - 1;
                    if (g->flags[v] & TANGENT) birth[v] = k, death[v] = k - 1;
                }
            if (k == length) break;
            i64 op = order[k];
            for (i64 e = g->in_ptr[op]; e < g->in_ptr[op + 1]; e++)
                death[g->in_val[e]] = MAX(death[g->in_val[e]], k);
            for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++) {
                i64 v = g->out_val[e];
                if (birth[v] >= 0) delta[birth[v]] += g->size[v], delta[death[v] + 1] -= g->size[v];
                birth[v] = death[v] = k;
            }
        }
        for (i64 v = 0; v < g->values; v++) {
            if (birth[v] < 0) continue;
            if (g->flags[v] & GRADIENT) death[v] = length - 1;
            delta[birth[v]] += g->size[v];
            delta[death[v] + 1] -= g->size[v];
        }
        found = 0;
        *time_s = 0;
        for (i64 k = 0, live = 0; k < length; k++) {
            live += delta[k];
            *time_s += g->time_s[order[k]];
            found = MAX(found, live + g->transient[order[k]]);
        }
    }
    free(delta);
    free(birth);
    free(death);
    return found;
}

/* Take executions out of an order, in place, whose results nobody reads.

   Returns the new length and writes the new split; -1 without memory. O(length + edges). */
i64 prune(const Graph *g, i64 *order, i64 length, i64 split, i64 *new_split) {
    char *wanted = calloc((size_t)g->values + 1, 1), *kept = calloc((size_t)length + 1, 1);
    i64 count = -1;
    if (wanted && kept) {
        for (i64 v = 0; v < g->values; v++) wanted[v] = (g->flags[v] & GRADIENT) != 0;
        for (i64 k = length; k >= 0; k--) {
            if (k == split)
                for (i64 v = 0; v < g->values; v++) wanted[v] |= (g->flags[v] & OUTPUT) != 0;
            if (k == 0) break;
            i64 op = order[k - 1];
            int keep = op >= g->forwards;
            for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++) keep |= wanted[g->out_val[e]];
            if (!keep) continue;
            for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++) wanted[g->out_val[e]] = 0;
            for (i64 e = g->in_ptr[op]; e < g->in_ptr[op + 1]; e++) wanted[g->in_val[e]] = 1;
            kept[k - 1] = 1;
        }
        count = *new_split = 0;
        for (i64 k = 0; k < length; k++)
            if (kept[k]) {
                *new_split += k < split;
                order[count++] = order[k];
            }
    }
    free(wanted);
    free(kept);
    return count;
}
