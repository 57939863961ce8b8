/* The tables of the chain DP; the recurrence and its meaning stand in `solve/chain.py`. */

#include "kernel.h"

#include <math.h>

typedef struct {
    i64 count, slots, options;         /* segments, memory slots, most options of a segment */
    double slot_bytes;
    const i64 *first_option;           /* [count + 1] */
    const i64 *kept;                   /* per option, in slots */
    const double *forward_peak, *backward_peak, *time_s;   /* per option, bytes and seconds */
    const double *base;                /* [count], bytes */
    const i64 *shift;                  /* [count, count], in slots */
    const double *transit_s;           /* [count + 1], running sum */
    const double *rise;                /* [count, count]: peak of the transit from low up to k, bytes */
    double *cost;                      /* [count + 1, count, slots + 1] */
    int32_t *choice;
} Chain;

static i64 nearest(double value) { return (i64)rint(value); }

static void offer_option(const Chain *c, i64 low, i64 high, i64 option, double *cost, int32_t *choice) {
    double peak = c->forward_peak[option] + c->base[high];
    if (c->backward_peak[option] > peak) peak = c->backward_peak[option];
    i64 from = (i64)(peak / c->slot_bytes + 0.5), kept = c->kept[option], width = c->slots + 1;
    if (kept > from) from = kept;
    const double *above = c->cost + ((low + 1) * c->count + high) * width;
    int32_t number = (int32_t)(option - c->first_option[low]);
    for (i64 m = from; m <= c->slots; m++) {
        double value = (high > low ? above[m - kept] : 0.0) + c->time_s[option];
        if (value < cost[m]) {
            cost[m] = value;
            choice[m] = number;
        }
    }
}

static void offer_split(const Chain *c, i64 low, i64 high, i64 k, double *cost, int32_t *choice) {
    i64 width = c->slots + 1, shift = c->shift[low * c->count + k];
    i64 from = nearest((c->rise[low * c->count + k - 1] + c->base[high]) / c->slot_bytes);
    if (shift > from) from = shift;
    const double *upper = c->cost + (k * c->count + high) * width;
    const double *lower = c->cost + (low * c->count + k - 1) * width;
    double transit = c->transit_s[k] - c->transit_s[low];
    int32_t number = (int32_t)(c->options + k);
    for (i64 m = from; m <= c->slots; m++) {
        double value = upper[m - shift] + lower[m] + transit;
        if (value < cost[m]) {
            cost[m] = value;
            choice[m] = number;
        }
    }
}

/* Fill the tables. O(count^3 x slots). */
void chain_fill(const Chain *c) {
    i64 width = c->slots + 1;
    for (i64 low = c->count - 1; low >= 0; low--)
        for (i64 high = low; high < c->count; high++) {
            double *cost = c->cost + (low * c->count + high) * width;
            int32_t *choice = c->choice + (low * c->count + high) * width;
            for (i64 m = 0; m < width; m++) {
                cost[m] = HUGE_VAL;
                choice[m] = -1;
            }
            for (i64 o = c->first_option[low]; o < c->first_option[low + 1]; o++)
                offer_option(c, low, high, o, cost, choice);
            for (i64 k = low + 1; k <= high; k++) offer_split(c, low, high, k, cost, choice);
        }
}
