/* Local search at one level: large-neighbourhood moves, accepted by a falling threshold.

   Each iteration either deletes a few recomputations near a place and pays for them elsewhere (swap), drops
   values across a place (shake), moves executions (to where their bytes cost least, or at random), or goes a
   little below the level (oscillation, Glover 1989), then spends what is left over. What isn't better than the
   threshold (Dueck and Scheuer 1990) is taken back. */

#include "kernel.h"

#define WORSE 0.1 /* how much more than the last excess a new one may be, at first */

static i64 random_below(Bench *b, i64 count) { return (i64)(uniform(b) * (double)count); }

/* Keep what the execution at a slot makes from being dropped where the instance before is going to be held instead. */
static void pin(Bench *b, i64 slot) {
    int32_t made = first_output(b, slot);
    int32_t before = b->event[made].before, after = b->event[made].after;
    if (b->pins < PINS && before >= 0 && is_read(b, after))
        b->pin[b->pins++] = (Range){b->event[before].slot, b->event[after].slot, b->event[made].value};
}

/* Delete up to `count` recomputations from a random place on; with `pinned` they aren't what pays for it. */
static void delete_near(Bench *b, i64 count, int pinned) {
    i64 slot = random_below(b, b->slots), seen = 0;
    for (; count > 0 && around(b, &slot, &seen); seen++, slot++) {
        i64 op = b->op_at[slot];
        if (op >= b->g.forwards || !has_previous(b, slot) || uniform(b) < 0.3) continue;
        if (pinned) pin(b, slot);
        retain(b, slot);
        count--;
    }
}

/* Drop up to `count` values in front of readers from a random place on. */
static void drop_near(Bench *b, i64 count, double stretch) {
    i64 slot = random_below(b, b->slots), seen = 0;
    for (; count > 0 && around(b, &slot, &seen); seen++, slot++) {
        i64 op = b->op_at[slot];
        for (i64 e = b->g.in_ptr[op]; e < b->g.in_ptr[op + 1] && count > 0; e++) {
            i64 value = b->g.in_val[e], maker = b->g.producer[value];
            if (maker < 0 || !b->g.again[maker] || b->g.flags[value] & OUTPUT || uniform(b) < 0.5) continue;
            int32_t previous = last_before(b, value, slot);
            if (previous < 0 || b->event[previous].slot + b->spacing >= slot) continue;
            i64 needed = missing(b, value, slot, stretch);
            if (needed > 0 && drop(b, needed, slot)) count--;
        }
    }
}

/* Move up to `count` executions from a random place on, each by up to a quarter of the schedule. */
static void shift_near(Bench *b, i64 count) {
    i64 slot = random_below(b, b->slots), seen = 0;
    begin(b);
    for (; count > 0 && around(b, &slot, &seen); seen++, slot++) {
        if (uniform(b) < 0.3) continue;
        double reach = uniform(b);
        i64 by = (i64)(reach * reach * (double)(b->slots >> 2));
        count -= shift(b, slot, uniform(b) < 0.5 ? slot - by : slot + by);
    }
}

/* Where any of an execution's outputs is first read; END_SLOT when none is. */
static i64 first_reader(const Bench *b, i64 slot) {
    const Graph *g = &b->g;
    i64 op = b->op_at[slot], found = END_SLOT;
    int32_t at = first_output(b, slot);
    for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++, at++)
        if (is_read(b, b->event[at].after) && b->event[b->event[at].after].slot < found)
            found = b->event[b->event[at].after].slot;
    return found;
}

/* Run what is held across the fullest slot only right before it is read, and what it alone reads with it. */
static void sink(Bench *b, i64 depth) {
    const Graph *g = &b->g;
    i64 full = fullest(b), slot = random_below(b, full + 1), seen = 0;
    b->work += b->slots >> 9;
    for (; seen <= full; seen++, slot = slot > 0 ? slot - 1 : full) {
        if (b->op_at[slot] < 0 || slot >= full || first_reader(b, slot) >= b->slots) continue;
        if (first_reader(b, slot) > full && uniform(b) < 0.5) break;
    }
    if (seen > full) return;
    while (depth-- > 0) {
        i64 op = b->op_at[slot], next = -1, target = first_reader(b, slot) - 1;
        i64 inputs = g->in_ptr[op + 1] - g->in_ptr[op];
        if (target >= b->slots || target <= slot || !shift(b, slot, target)) return;
        while (target > slot && b->op_at[target] != op) target--;
        for (i64 k = 0; k < inputs; k++) { /* its largest input that nobody else reads any more goes next */
            int32_t at = b->first[target] + (int32_t)k, before = b->event[at].before;
            if (is_read(b, b->event[at].after) || !b->event[before].write) continue;
            i64 made = b->event[before].slot;
            if (made >= b->split && b->op_at[made] >= 0 && uniform(b) < 0.8) next = made;
        }
        if (next < 0) return;
        slot = next;
    }
}

/* Lay the next schedules out closer or, every other time, wider: more can be recomputed in one place, but all takes
   longer. */
static void vary(Bench *b) {
    if (b->varied) b->spacing = SPACING << (uniform(b) < 0.5 ? 0 : 1 + random_below(b, WIDENINGS));
}

static int perturb(Bench *b, i64 budget) {
    static const double stretches[] = {0.0, 0.25, 1.0};
    double stretch = stretches[random_below(b, 3)], kind = uniform(b);
    b->pins = 0;
    if (kind < 0.4) {
        double move = uniform(b);
        if (move < 0.2) sink(b, 1 + random_below(b, 8));
        else if (move < 0.8) settle(b, budget, random_below(b, b->slots), 4 + random_below(b, 28));
        else shift_near(b, 1 + random_below(b, 4));
        return descend(b, budget, 12, 0.6, stretch, 0);
    }
    if (kind < 0.6) {
        delete_near(b, 1 + random_below(b, 4), b->varied && uniform(b) < 0.5);
        return descend(b, budget, 12, 0.6, stretch, 0);
    }
    if (kind < 0.8) {
        drop_near(b, 1 + random_below(b, 3), stretch);
        return descend(b, budget, 12, 0.6, stretch, 0);
    }
    return descend(b, budget - (i64)((double)budget * 0.08 * uniform(b)), 12, 0.6, stretch, 0);
}

/* Improve the feasible schedule on the bench until `work` moves were tried; leave the best one there.

   Returns 1 when it got faster. */
int improve(Bench *b, i64 budget, i64 work, double threshold, uint64_t seed) {
    i64 length = b->length, split = unload(b, b->saved), until = b->work + work, start = b->work, idle = 0;
    double best_s = b->makespan_s, first_s = best_s;
    b->random = seed * 2654435761u + 88172645463325252u;
    if (work >= length) { /* for once all of it, beside what `work` counts */
        settle(b, budget, 0, length);
        b->work = start;
    }
    while (b->work < until) {
        double now_s = b->makespan_s;
        double allowed = 1 + threshold * (1 - (double)(b->work - start) / (double)MAX(work, 1));
        b->logged = 0;
        b->work += 8; /* an iteration that finds nothing to do counts too */
        b->touched_low = b->slots;
        b->touched_high = 0;
        int fits = perturb(b, budget);
        b->focus_low = b->touched_low;
        b->focus_high = b->touched_high;
        if (fits) spend(b, budget, 20, 0.4);
        if (!fits || b->makespan_s > best_s * allowed || peak(b) > budget) {
            undo_to(b, 0);
            b->makespan_s = now_s;
            if (++idle < 50) continue;
        }
        idle = 0;
        if (b->makespan_s < best_s * (1 - 1e-12)) {
            best_s = b->makespan_s;
            length = b->length;
            split = unload(b, b->saved);
        }
        vary(b);
        if (!respace(b) || b->makespan_s > best_s * allowed) load(b, b->saved, length, split);
    }
    load(b, b->saved, length, split);
    return best_s < first_s;
}

/* Look for a schedule within a target by noisy descents from random neighbours of the one on the bench.

   A descent that gets stuck is gone on from when it left less above the target than any before, or a little more than
   the last (Dueck and Scheuer 1990). Returns 1 when the target is reached, 0 when `work` moves were tried. */
int lower(Bench *b, i64 target, i64 work, uint64_t seed) {
    static const double stretches[] = {0.0, 0.25, 1.0, 4.0};
    i64 length = b->length, split = unload(b, b->saved), until = b->work + work, start = b->work;
    double now = excess(b, target);
    b->random = seed * 2654435761u + 88172645463325252u;
    for (i64 trial = 0; b->work < until; trial++) {
        double stretch = stretches[random_below(b, 4)];
        b->logged = 0;
        b->work += 8 + (b->slots >> 8);
        if (trial % 4 == 1) delete_near(b, 1 + random_below(b, 6), 0);
        if (trial % 4 == 2) drop_near(b, 1 + random_below(b, 6), stretch);
        if (trial % 4 == 3) {
            double move = uniform(b);
            if (move < 0.3) settle(b, target, random_below(b, b->slots), b->length);
            else if (move < 0.7)
                for (i64 k = random_below(b, 4); k >= 0; k--) sink(b, 1 + random_below(b, 12));
            else shift_near(b, 1 + random_below(b, 6));
        }
        if (descend(b, target, 30, 0.8, stretch, 1)) return 1;
        double found = excess(b, target), left = 1 - (double)(b->work - start) / (double)MAX(work, 1);
        if (found <= now * (1 + WORSE * MAX(left, 0.0))) {
            spend(b, target, 1, 0.4);
            now = excess(b, target);
            length = b->length;
            split = unload(b, b->saved);
        }
        vary(b);
        if (!load(b, b->saved, length, split)) return 0;
    }
    return 0;
}
