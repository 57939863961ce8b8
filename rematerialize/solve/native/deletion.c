/* What deleting a recomputation would change, worked out without doing it.

   A greedy pass looks at every recomputation, and most of them can't go. `consider` notes the ranges that `retain`
   would change, in its order, from the events as they stand, leaving out those of the executions that would be gone. */

#include "kernel.h"

#define MOST_GONE 32 /* executions that one deletion may take with it before it takes less to try */

typedef struct { i64 slot[MOST_GONE]; int count; } Gone;

static int is_gone(const Gone *gone, i64 slot) {
    for (int k = 0; k < gone->count; k++)
        if (gone->slot[k] == slot) return 1;
    return 0;
}

static int32_t kept_after(const Bench *b, const Gone *gone, int32_t event) {
    do event = b->event[event].after;
    while (event >= 0 && is_gone(gone, b->event[event].slot));
    return event;
}

static int32_t kept_before(const Bench *b, const Gone *gone, int32_t event) {
    do event = b->event[event].before;
    while (event >= 0 && is_gone(gone, b->event[event].slot));
    return event;
}

static void note(Bench *b, i64 low, i64 high, i64 size) {
    high = MIN(high, b->slots);
    if (low < high && size != 0 && b->ranges < b->event_space) b->range[b->ranges++] = (Range){low, high, size};
}

/* Note what taking the newest of those that are gone away changes: see `displace`. */
static void note_gone(Bench *b, const Gone *gone) {
    const Graph *g = &b->g;
    i64 slot = gone->slot[gone->count - 1], op = b->op_at[slot];
    int32_t at = first_output(b, slot);
    for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++, at++) {
        i64 size = g->size[g->out_val[e]];
        int32_t before = kept_before(b, gone, at), after = kept_after(b, gone, at);
        if (!is_read(b, after)) note(b, slot, slot + 1, -size);
        else if (held(b, g->out_val[e], before)) {
            i64 last = slot;
            for (; is_read(b, after); after = kept_after(b, gone, after)) last = b->event[after].slot;
            note(b, slot, last + 1, -size);
        } else note(b, b->event[before].slot + 1, slot, size);
    }
    at = b->first[slot];
    for (i64 e = g->in_ptr[op]; e < g->in_ptr[op + 1]; e++, at++) {
        int32_t before = kept_before(b, gone, at);
        if (!is_read(b, kept_after(b, gone, at)) && !held(b, g->in_val[e], before))
            note(b, b->event[before].slot + 1, slot + 1, -g->size[g->in_val[e]]);
    }
}

/* Whether nobody would read what the execution at a slot makes; -1 where that takes more than is looked at here. */
static int unread_without(const Bench *b, const Gone *gone, i64 slot) {
    const Graph *g = &b->g;
    i64 op = b->op_at[slot];
    int32_t at = first_output(b, slot);
    for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++, at++)
        if (is_read(b, kept_after(b, gone, at))) return 0;
    for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++)
        if (g->flags[g->out_val[e]] & OUTPUT) return -1;
    return gone->count < MOST_GONE ? 1 : -1;
}

/* Note what would go with the executions that are gone, in turn; 0 where that takes more than is looked at here. */
static int follow(Bench *b, Gone *gone) {
    const Graph *g = &b->g;
    for (int k = 0; k < gone->count; k++) {
        i64 slot = gone->slot[k], op = b->op_at[slot];
        int32_t at = b->first[slot];
        for (i64 e = g->in_ptr[op]; e < g->in_ptr[op + 1]; e++, at++) {
            int32_t before = kept_before(b, gone, at);
            if (before < 0 || !b->event[before].write) continue;
            i64 made = b->event[before].slot, maker = b->op_at[made];
            if (maker < 0 || maker >= g->forwards || !g->again[maker]) continue;
            int unread = unread_without(b, gone, made);
            if (unread < 0) return 0;
            if (!unread) continue;
            gone->slot[gone->count++] = made;
            note_gone(b, gone);
        }
    }
    return 1;
}

/* The next place after a slot where a range begins or ends or an execution goes, at most a limit; and how much ranges
   change memory from the slot up to there. */
static i64 next_cut(const Bench *b, const Gone *gone, i64 slot, i64 limit, i64 *change) {
    *change = 0;
    for (i64 k = 0; k < b->ranges; k++) {
        Range r = b->range[k];
        if (r.low > slot) limit = MIN(limit, r.low);
        else if (r.high > slot) {
            limit = MIN(limit, r.high);
            *change += r.size;
        }
    }
    for (int k = 0; k < gone->count; k++) {
        if (gone->slot[k] > slot) limit = MIN(limit, gone->slot[k]);
        else if (gone->slot[k] == slot) limit = MIN(limit, slot + 1);
    }
    return limit;
}

/* Whether a range that grows would stay within a budget; all that grow do so by `growth`. */
static int range_fits(const Bench *b, const Gone *gone, Range grown, i64 growth, i64 budget) {
    if (most(b, grown.low, grown.high) + growth <= budget) return 1;
    for (i64 slot = grown.low, stop, change; slot < grown.high; slot = stop) {
        stop = next_cut(b, gone, slot, grown.high, &change);
        if (!is_gone(gone, slot) && most(b, slot, stop) + change > budget) return 0;
    }
    return 1;
}

/* Note the ranges that deleting the recomputation at a slot would change, and the time that it would save.

   Returns 1 when it would fit a budget, 0 when it wouldn't, -1 where that is better tried. */
int consider(Bench *b, i64 slot, i64 budget, double *saved_s) {
    Gone gone = {{slot}, 1};
    begin(b);
    note_gone(b, &gone);
    if (!follow(b, &gone)) return -1;
    i64 growth = 0;
    for (i64 k = 0; k < b->ranges; k++) growth += MAX(b->range[k].size, 0);
    for (i64 k = 0; k < b->ranges; k++) {
        if (b->range[k].size <= 0) continue;
        if (!range_fits(b, &gone, b->range[k], growth, budget)) return 0;
    }
    double left_s = b->makespan_s;
    for (int k = 0; k < gone.count; k++) left_s -= b->g.time_s[b->op_at[gone.slot[k]]];
    *saved_s = b->makespan_s - left_s;
    return 1;
}
