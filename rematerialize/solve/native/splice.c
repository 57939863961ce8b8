/* The fastest way through parts of several plans: a shortest path, part by part from the end (solve/splice.py). */

#include "kernel.h"

#include <math.h>
#include <stdlib.h>

typedef struct {
    i64 plans, parts, words, known;    /* words of a set of values; states that any plan has been in */
    const double *seconds;             /* plans x parts */
    const unsigned char *fits;         /* plans x parts */
    const int32_t *state;              /* plans x (parts - 1): before each part but the first */
    const int32_t *done;               /* per state: which backward ops have run, as a number */
    const uint64_t *needed;            /* states x words: what is read after it of what was made before */
    int32_t *onward;                   /* (parts - 1) x plans: the plan to go on with */
} Splice;

static int reads_no_more(const Splice *s, int32_t other, int32_t state) {
    const uint64_t *its = s->needed + other * s->words, *ours = s->needed + state * s->words;
    if (s->done[other] != s->done[state]) return 0;
    for (i64 word = 0; word < s->words; word++)
        if (its[word] & ~ours[word]) return 0;
    return 1;
}

/* Sort plans by how long they take from here on, those that take the same by number; they are nearly sorted. */
static void sort(int32_t *order, i64 count, const double *stay_s) {
    for (i64 k = 1; k < count; k++) {
        int32_t plan = order[k];
        i64 at = k;
        for (; at > 0; at--) {
            int32_t before = order[at - 1];
            if (stay_s[before] < stay_s[plan] || (stay_s[before] == stay_s[plan] && before < plan)) break;
            order[at] = before;
        }
        order[at] = plan;
    }
}

/* Fill `onward`; return the plan to begin with, -1 when none fits, -2 without memory. */
i64 splice(const Splice *s) {
    i64 best = -1, plans = s->plans;
    double *stay_s = malloc((size_t)plans * sizeof(double)), *rest_s = calloc((size_t)plans, sizeof(double));
    double best_s = HUGE_VAL;
    int32_t *order = malloc((size_t)plans * sizeof(int32_t));
    int32_t *first = malloc((size_t)plans * sizeof(int32_t));         /* the fastest plan of each state, in order */
    int32_t *next = malloc((size_t)(s->known + 1) * sizeof(int32_t)); /* per state: the plan to go on with */
    i64 *seen = calloc((size_t)s->known + 1, sizeof(i64));            /* per state: part in which it was met last */
    if (!stay_s || !rest_s || !order || !first || !next || !seen) best = -2;
    for (i64 plan = 0; plan < plans && best == -1; plan++) order[plan] = (int32_t)plan;
    for (i64 part = s->parts - 1; part > 0 && best == -1; part--) {
        const int32_t *state = s->state + part - 1;
        int32_t *chosen = s->onward + (part - 1) * plans;
        i64 states = 0, width = s->parts - 1;
        for (i64 plan = 0; plan < plans; plan++) {
            i64 at = plan * s->parts + part;
            stay_s[plan] = s->fits[at] ? s->seconds[at] + rest_s[plan] : HUGE_VAL;
        }
        sort(order, plans, stay_s);
        for (i64 k = 0; k < plans; k++) {
            int32_t here = state[order[k] * width];
            if (seen[here] == part) continue;
            seen[here] = part;
            first[states++] = order[k];
        }
        for (i64 k = 0; k < states; k++) {
            int32_t here = state[first[k] * width];
            i64 other = 0;
            while (!reads_no_more(s, state[first[other] * width], here)) other++; /* at the latest it itself */
            next[here] = first[other];
        }
        for (i64 plan = 0; plan < plans; plan++) {
            int32_t other = next[state[plan * width]];
            chosen[plan] = stay_s[other] < stay_s[plan] ? other : (int32_t)plan;
        }
        for (i64 plan = 0; plan < plans; plan++) rest_s[plan] = stay_s[chosen[plan]];
    }
    for (i64 plan = 0; plan < plans && best > -2; plan++) {
        double total_s = s->fits[plan * s->parts] ? s->seconds[plan * s->parts] + rest_s[plan] : HUGE_VAL;
        if (total_s < best_s) {
            best_s = total_s;
            best = plan;
        }
    }
    void *scratch[] = {stay_s, rest_s, order, first, next, seen};
    for (size_t k = 0; k < sizeof scratch / sizeof *scratch; k++) free(scratch[k]);
    return best;
}
