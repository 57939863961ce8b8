/* The offline eviction sweep; the rule and its source stand in `solve/sweep.py`. */

#include "kernel.h"

#include <math.h>
#include <stdlib.h>

enum { NEIGHBOURS = 32 };  /* recomputations looked at when a value's cost is estimated */

typedef struct { double priority; i64 value; } Candidate;

typedef struct {
    const Graph *g;
    const i64 *user_ptr, *users;       /* ops that read each value, in order */
    i64 budget, slack, memory, clock, count, limit, lives, stamp;
    double size_power, distance_power;
    i64 *order;
    i64 *live, *place;                 /* live values; where each stands among them, or -1 */
    i64 *locks, *seen;
    i64 *stack, *next_input;           /* ops being computed, and the first input not yet looked at */
    Candidate *ranked;
} Sweep;

static void enter(Sweep *s, i64 value) {
    if (s->place[value] >= 0) return;
    s->place[value] = s->lives;
    s->live[s->lives++] = value;
    s->memory += s->g->size[value];
}

static void leave(Sweep *s, i64 value) {
    i64 last = s->live[--s->lives];
    s->live[s->place[value]] = last;
    s->place[last] = s->place[value];
    s->place[value] = -1;
    s->memory -= s->g->size[value];
}

/* Time to recompute a value from what is live, up to a bounded neighbourhood. */
static double recompute_s(Sweep *s, i64 value) {
    const Graph *g = s->g;
    i64 todo[4 * NEIGHBOURS], waiting = 1, known = 1;
    double total = 0.0;
    todo[0] = g->producer[value];
    s->seen[todo[0]] = ++s->stamp;
    while (waiting && known < NEIGHBOURS) {
        i64 op = todo[--waiting];
        total += g->time_s[op];
        for (i64 e = g->in_ptr[op]; e < g->in_ptr[op + 1]; e++) {
            i64 maker = g->producer[g->in_val[e]];
            if (maker < 0 || s->place[g->in_val[e]] >= 0 || s->seen[maker] == s->stamp) continue;
            if (waiting == 4 * NEIGHBOURS) return total;
            s->seen[maker] = s->stamp;
            todo[waiting++] = maker;
            known++;
        }
    }
    return total;
}

/* Score of evicting a value, least first; NAN when it has to stay. */
static double priority(Sweep *s, i64 value) {
    const Graph *g = s->g;
    i64 maker = g->producer[value], low = s->user_ptr[value], high = s->user_ptr[value + 1], stop = high;
    if (g->flags[value] & (OUTPUT | GRADIENT) || (maker >= 0 && maker < g->forwards && !g->again[maker])) return NAN;
    while (low < high) { /* the first use after the clock */
        i64 middle = (low + high) / 2;
        if (s->users[middle] <= s->clock) low = middle + 1;
        else high = middle;
    }
    int current = low > s->user_ptr[value] && s->users[low - 1] == s->clock;
    if (!current && low == stop) return -1.0;
    if (maker < 0 || !g->again[maker]) return NAN;
    double distance = current ? 1.0 : (double)(s->users[low] - s->clock);
    double size = (double)g->size[value];
    if (s->size_power != 1.0) size = pow(size, s->size_power);
    if (s->distance_power != 1.0) distance = pow(distance, s->distance_power);
    return recompute_s(s, value) / (size * distance);
}

static int order_of(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->priority != y->priority) return x->priority < y->priority ? -1 : 1;
    return x->value < y->value ? -1 : x->value > y->value;
}

static int evict(Sweep *s, i64 excess) {
    i64 room = excess + s->slack, count = 0;
    for (i64 k = 0; k < s->lives; k++) {
        i64 value = s->live[k];
        if (s->locks[value] || s->g->size[value] == 0) continue;
        double score = priority(s, value);
        if (!isnan(score)) s->ranked[count++] = (Candidate){score, value};
    }
    qsort(s->ranked, (size_t)count, sizeof(Candidate), order_of);
    for (i64 k = 0; k < count && room > 0; k++) {
        i64 value = s->ranked[k].value;
        leave(s, value);
        excess -= s->g->size[value];
        room -= s->g->size[value];
    }
    return excess <= 0;
}

static int run(Sweep *s, i64 op) {
    const Graph *g = s->g;
    i64 need = g->transient[op];
    for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++) need += g->size[g->out_val[e]];
    if (s->memory + need > s->budget && !evict(s, s->memory + need - s->budget)) return 0;
    for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++) enter(s, g->out_val[e]);
    s->order[s->count++] = op;
    return s->count <= s->limit;
}

static void lock(Sweep *s, i64 op, i64 by) {
    for (i64 e = s->g->in_ptr[op]; e < s->g->in_ptr[op + 1]; e++) s->locks[s->g->in_val[e]] += by;
}

/* Run an op, recomputing what it misses first (an explicit stack: chains can be long). */
static int execute(Sweep *s, i64 target) {
    const Graph *g = s->g;
    i64 depth = 1;
    s->stack[0] = target;
    s->next_input[0] = g->in_ptr[target];
    lock(s, target, 1); /* a value that isn't there yet is locked as soon as it is */
    while (depth) {
        i64 op = s->stack[depth - 1], e = s->next_input[depth - 1];
        while (e < g->in_ptr[op + 1] && s->place[g->in_val[e]] >= 0) e++;
        s->next_input[depth - 1] = e;
        if (e < g->in_ptr[op + 1]) {
            i64 maker = g->producer[g->in_val[e]];
            if (maker < 0 || depth + s->count > s->limit) return 0;
            s->stack[depth] = maker;
            s->next_input[depth++] = g->in_ptr[maker];
            lock(s, maker, 1);
            continue;
        }
        if (!run(s, op)) return 0;
        lock(s, op, -1);
        depth--;
    }
    return 1;
}

/* Walk a step within a budget; return the length of the order (its split is written), -1 when it doesn't fit. */
i64 sweep(const Graph *g, const i64 *user_ptr, const i64 *users, i64 budget, i64 slack, double size_power,
          double distance_power, i64 limit, i64 *order, i64 *split) {
    size_t values = (size_t)g->values + 1, depth = (size_t)limit + 2;
    Sweep s = {.g = g, .user_ptr = user_ptr, .users = users, .budget = budget, .slack = slack, .limit = limit,
               .size_power = size_power, .distance_power = distance_power, .order = order};
    s.live = calloc(values, sizeof(i64));
    s.place = calloc(values, sizeof(i64));
    s.locks = calloc(values, sizeof(i64));
    s.seen = calloc((size_t)g->ops + 1, sizeof(i64));
    s.stack = calloc(depth, sizeof(i64));
    s.next_input = calloc(depth, sizeof(i64));
    s.ranked = calloc(values, sizeof(Candidate));
    int fits = s.live && s.place && s.locks && s.seen && s.stack && s.next_input && s.ranked;
    if (fits)
        for (i64 v = 0; v < g->values; v++) s.place[v] = -1;
    for (i64 op = 0; fits && op <= g->ops; op++) {
        if (op == g->forwards) {
            *split = s.count;
            for (i64 v = 0; v < g->values; v++)
                if (g->flags[v] & TANGENT && user_ptr[v] < user_ptr[v + 1]) enter(&s, v);
        }
        s.clock = op;
        if (op < g->ops) fits = execute(&s, op);
    }
    free(s.live);
    free(s.place);
    free(s.locks);
    free(s.seen);
    free(s.stack);
    free(s.next_input);
    free(s.ranked);
    return fits ? s.count : -1;
}
