/* The table of rotor's DP and its schedules; the recurrence and its meaning stand in `solve/rotor.py`. */

#include "kernel.h"

#include <math.h>
#include <stdlib.h>

typedef struct {
    i64 count, slots, slot_bytes;      /* stages, memory slots */
    const double *forward_s, *backward_s;
    const i64 *value_slots, *saved_slots;                             /* rounded up */
    const i64 *value, *held, *transit, *saving, *backward;            /* bytes */
    double *cost;                      /* [count, count, slots + 1], filled where low <= high */
    i64 *least;                        /* [count, count]: slots that some schedule needs */
    i64 *enough;                       /* [count, count]: slots beyond which nothing is gained */
} Rotor;

#define ROUNDING 1e-9   /* relative, more than that of any sum of times */

typedef struct { i64 low, high, slot; } Task;

static i64 most_of(i64 a, i64 b) { return a > b ? a : b; }
static i64 slots_of(const Rotor *r, i64 bytes) { return (bytes + r->slot_bytes - 1) / r->slot_bytes; }
static double *row(const Rotor *r, i64 low, i64 high) { return r->cost + (low * r->count + high) * (r->slots + 1); }

static i64 saving_needs(const Rotor *r, i64 low, i64 high) {
    i64 need = slots_of(r, most_of(r->held[high + 1] + r->saving[low], r->backward[low]));
    return most_of(need, r->saved_slots[low]);
}

/* Lower best[m - from] for from <= m <= to; where `choice` is asked for, write the last k (or low) that did.

   A split at k costs at least `moved` more than running every stage once, so it can't help the slots, last
   ones first, that do better already; a higher k can't help them either. */
static void relax(const Rotor *r, i64 low, i64 high, i64 from, i64 to, double *best, i64 *choice) {
    i64 n = r->count, kept = r->saved_slots[low], start = most_of(from, saving_needs(r, low, high));
    double own = r->forward_s[low] + r->backward_s[low], before = best[0];
    const double *above = high > low ? row(r, low + 1, high) : NULL;
    for (i64 m = start; m <= to; m++) best[m - from] = above ? own + above[m - kept] : own;
    if (choice && best[0] < before) *choice = low;
    i64 rise = r->transit[low];
    double moved = 0.0, once = 0.0;
    for (i64 stage = low; stage <= high; stage++) once += r->forward_s[stage] + r->backward_s[stage];
    for (i64 k = low + 1; k <= high; k++) {
        if (k > low + 1) rise = most_of(rise, r->transit[k - 1] + r->value[k - 1]);
        moved += r->forward_s[k - 1];
        while (to >= from && best[to - from] < (once + moved) * (1 - ROUNDING)) to--;
        if (to < from) return;
        kept = r->value_slots[k];
        start = most_of(most_of(from, slots_of(r, r->held[high + 1] + rise)), kept + r->least[k * n + high]);
        start = most_of(start, r->least[low * n + k - 1]);
        before = best[0];
        const double *upper = row(r, k, high), *lower = row(r, low, k - 1);
        for (i64 m = start; m <= to; m++) {
            double time_s = moved + upper[m - kept] + lower[m];
            best[m - from] = time_s < best[m - from] ? time_s : best[m - from];
        }
        if (choice && best[0] < before) *choice = k;
    }
}

/* Fill the tables. O(count^3 x slots). */
void rotor_fill(const Rotor *r) {
    i64 n = r->count;
    for (i64 low = n - 1; low >= 0; low--)
        for (i64 high = low; high < n; high++) {
            double *best = row(r, low, high);
            i64 enough = saving_needs(r, low, high), m = 0;
            if (high > low) enough = most_of(enough, r->saved_slots[low] + r->enough[(low + 1) * n + high]);
            i64 to = enough < r->slots ? enough : r->slots;
            for (i64 at = 0; at <= to; at++) best[at] = HUGE_VAL;
            relax(r, low, high, 0, to, best, NULL);
            for (i64 at = to + 1; at <= r->slots; at++) best[at] = best[to];
            while (m <= r->slots && best[m] == HUGE_VAL) m++;
            r->least[low * n + high] = m;
            r->enough[low * n + high] = enough;
        }
}

/* Write the schedule of stages first .. last in a number of slots, each action as 3 stage + (0 F, 1 S, 2 B).

   There is room for n (n + 3) / 2 of them, n = last - first + 1. Returns how many there are, -1 without
   memory. O(length + splits x stages). */
i64 rotor_actions(const Rotor *r, i64 first, i64 last, i64 slot, int32_t *actions) {
    Task *stack = malloc((size_t)(2 * (last - first) + 4) * sizeof(Task));
    i64 depth = 0, length = 0;
    if (!stack) return -1;
    stack[depth++] = (Task){first, last, slot};
    while (depth > 0) {
        Task task = stack[--depth];
        i64 low = task.low, high = task.high, k = -1;
        if (high < 0) {   /* the backward of a stage that was saved */
            actions[length++] = (int32_t)(3 * low + 2);
            continue;
        }
        double best = HUGE_VAL;
        relax(r, low, high, task.slot, task.slot, &best, &k);
        if (k < 0) break;   /* no schedule: the caller asked below the least memory */
        if (k == low) {
            actions[length++] = (int32_t)(3 * low + 1);
            stack[depth++] = (Task){low, -1, 0};
            if (high > low) stack[depth++] = (Task){low + 1, high, task.slot - r->saved_slots[low]};
        } else {
            for (i64 stage = low; stage < k; stage++) actions[length++] = (int32_t)(3 * stage);
            stack[depth++] = (Task){low, k - 1, task.slot};
            stack[depth++] = (Task){k, high, task.slot - r->value_slots[k]};
        }
    }
    free(stack);
    return length;
}
