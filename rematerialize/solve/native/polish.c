/* Greedy moves on a schedule: spend what memory is left over, and go down to a level.

   `spend` deletes recomputations while that fits, the one that saves the most time per priced byte-slot
   first. `descend` inserts recomputations until the peak is at most a target, the one that costs the
   least time per byte-slot of excess first. Both take noise, so that they can be repeated to other ends. */

#include "kernel.h"

#include <math.h>
#include <string.h>

/* A number in [0, 1); xorshift, so that plans repeat anywhere. */
double uniform(Bench *b) {
    b->random ^= b->random << 13;
    b->random ^= b->random >> 7;
    b->random ^= b->random << 17;
    return (double)(b->random >> 11) / 9007199254740992.0;
}

/* Sort rank[0..count) by worth, ascending and stable: bottom-up merge sort. */
void sort_by_worth(Bench *b, i64 count) {
    i64 *from = b->rank, *to = b->rank_spare;
    for (i64 k = 0; k < count; k++) from[k] = k;
    for (i64 width = 1; width < count; width *= 2) {
        for (i64 low = 0; low < count; low += 2 * width) {
            i64 mid = MIN(low + width, count), high = MIN(low + 2 * width, count), i = low, j = mid;
            for (i64 k = low; k < high; k++)
                to[k] = j >= high || (i < mid && b->worth[from[i]] <= b->worth[from[j]]) ? from[i++] : from[j++];
        }
        i64 *swap = from;
        from = to;
        to = swap;
    }
    if (from != b->rank)
        for (i64 k = 0; k < count; k++) b->rank[k] = from[k];
}

/* Prices are those of the executions that stand there now, and of ranges of slots. */
static void remember_slots(Bench *b) {
    memcpy(b->priced_taken, b->taken, (size_t)(b->words + 1) * sizeof(uint64_t));
    memcpy(b->priced_before, b->before, (size_t)(b->words + 1) * sizeof(int32_t));
}

/* Running sum of what a byte costs at each execution: steep where memory is nearly full. */
WIDE static void set_prices(Bench *b, i64 budget) {
    double total = 0.0;
    i64 rank = 0;
    remember_slots(b);
    for (i64 block = 0, count = blocks(b); block < count; block++) {
        const i64 *memory = b->memory + (block << b->block_shift) - rank;
        for (i64 stop = block_rank(b, block + 1); rank < stop; rank++) {
            i64 here = memory[rank] + b->block_add[block];
            b->price[rank] = total;
            if (here <= 0) continue;
            double full = (double)here / (double)MAX(budget, 1);
            full *= full;
            full *= full;
            full *= full;
            total += full * full + 1e-6;
        }
    }
    b->price[rank] = total;
}

WIDE static double priced(const Bench *b) {
    double cost = 0.0;
    for (i64 k = 0; k < b->ranges; k++) {
        Range r = b->range[k];
        if (r.high - r.low > 1) cost += (double)r.size * (price_before(b, r.high) - price_before(b, r.low));
    }
    return cost;
}

/* Whether what the present move made grow stays within a budget. */
static int fits(const Bench *b, i64 budget) {
    for (i64 k = 0; k < b->ranges; k++)
        if (b->range[k].size > 0 && most(b, b->range[k].low, b->range[k].high) > budget) return 0;
    return 1;
}

static double noisy(Bench *b, double value, double noise) {
    return noise > 0 ? value * (1 + noise * (uniform(b) - 0.5)) : value;
}

/* Whether holding what the execution at a slot makes, from its use before on, would cross the focus. */
static int in_focus(const Bench *b, i64 op, i64 slot) {
    int32_t made = first_output(b, slot);
    return slot >= b->focus_low && b->event[b->event[made].before].slot < b->focus_high;
}

static int spend_once(Bench *b, i64 budget, double noise) {
    i64 count = 0;
    int applied = 0;
    set_prices(b, budget);
    b->work += b->slots >> 9;
    for (i64 slot = taken_from(b, b->focus_low); slot < b->slots; slot = taken_from(b, slot + 1)) {
        i64 op = b->op_at[slot], mark = b->logged;
        if (op >= b->g.forwards || !has_previous(b, slot) || !in_focus(b, op, slot)) continue;
        double before_s = b->makespan_s, gain = 0;
        int possible = consider(b, slot, budget, &gain);
        if (possible >= 0) b->work++;
        else {
            retain(b, slot);
            possible = fits(b, budget);
            gain = before_s - b->makespan_s;
        }
        if (possible) {
            double cost = priced(b);
            b->pick[count] = slot;
            b->worth[count++] = noisy(b, cost > 0 ? -gain / cost : -HUGE_VAL, cost > 0 ? noise : 0);
        }
        undo_to(b, mark);
        b->makespan_s = before_s;
    }
    sort_by_worth(b, count);
    for (i64 k = 0; k < count; k++) {
        i64 slot = b->pick[b->rank[k]], mark = b->logged;
        if (b->op_at[slot] < 0 || !has_previous(b, slot)) continue;
        double before_s = b->makespan_s, gain;
        int possible = consider(b, slot, budget, &gain);
        if (!possible) {
            b->work++;
            continue;
        }
        retain(b, slot);
        if (possible > 0 || fits(b, budget)) applied = 1;
        else {
            undo_to(b, mark);
            b->makespan_s = before_s;
        }
    }
    return applied;
}

/* Delete recomputations while the peak stays within the budget; 1 if any went. */
int spend(Bench *b, i64 budget, i64 rounds, double noise) {
    int changed = 0;
    for (i64 round = 0; round < rounds && spend_once(b, budget, noise); round++) changed = 1;
    return changed;
}

/* Move up to `count` executions from a slot on to where their bytes cost least: time is the same, but room is made. */
void settle(Bench *b, i64 budget, i64 slot, i64 count) {
    set_prices(b, budget);
    b->work += b->slots >> 9;
    for (i64 seen = 0; count > 0 && around(b, &slot, &seen); seen++, slot++) {
        count--;
        for (int later = 0; later < 2; later++) {
            i64 mark = b->logged;
            double before_s = b->makespan_s;
            begin(b);
            b->dry = 1; /* most wouldn't pay */
            double cost = shift(b, slot, later ? b->slots : 0) ? priced(b) : 0;
            undo_to(b, mark);
            b->makespan_s = before_s;
            b->dry = 0;
            if (cost >= 0) continue;
            b->work--; /* counted */
            shift(b, slot, later ? b->slots : 0);
            if (fits(b, budget)) break;
            undo_to(b, mark);
            b->makespan_s = before_s;
        }
    }
}

WIDE double excess(const Bench *b, i64 target) {
    double total = 0.0;
    for (i64 block = 0, count = blocks(b), rank = 0; block < count; block++) {
        const i64 *memory = b->memory + (block << b->block_shift) - rank;
        i64 most_here = target - b->block_add[block], stop = block_rank(b, block + 1);
        if (b->block_max[block] > target)
            for (i64 at = rank; at < stop; at++) total += (double)MAX(memory[at] - most_here, 0);
        rank = stop;
    }
    return total;
}

/* By how much the present move changed the excess over a target. */
WIDE static double excess_change(Bench *b, i64 mark, i64 target) {
    i64 start = b->slots, stop = 0;
    double change = 0.0;
    for (i64 k = 0; k < b->ranges; k++) {
        start = MIN(start, b->range[k].low);
        stop = MAX(stop, b->range[k].high);
    }
    for (i64 k = mark; k < b->logged; k++) {
        start = MIN(start, b->log_slot[k]);
        stop = MAX(stop, b->log_slot[k] + 1);
    }
    b->work += (stop - start) >> 9;
    i64 low = rank_of(b, start), high = rank_of(b, stop), *then = b->rank_spare;
    memset(then, 0, (size_t)(high - low + 1) * sizeof(i64));
    for (i64 k = 0; k < b->ranges; k++) {
        then[rank_of(b, b->range[k].low) - low] -= b->range[k].size;
        then[rank_of(b, b->range[k].high) - low] += b->range[k].size;
    }
    for (i64 block = start >> b->block_shift, rank = low, shift = 0; rank < high; block++) {
        const i64 *memory = b->memory + (block << b->block_shift) - block_rank(b, block);
        i64 most_here = target - b->block_add[block], until = MIN(block_rank(b, block + 1), high);
        for (; rank < until; rank++) {
            shift += then[rank - low];
            i64 now = memory[rank] - most_here, old = now + shift;
            change += (double)(MAX(now, 0) - MAX(old, 0));
        }
    }
    return change;
}

/* Whether a gap of a value overlaps one that must stay shut. */
static int pinned(const Bench *b, i64 value, i64 low, i64 reader) {
    for (i64 k = 0; k < b->pins; k++)
        if (b->pin[k].size == value && b->pin[k].low < reader && b->pin[k].high > low) return 1;
    return 0;
}

/* Collect the gaps between uses that lie across the excess; return how many had no room in front. */
WIDE static i64 droppable(Bench *b, i64 first, i64 last, double noise, double stretch, i64 *found) {
    const Graph *g = &b->g;
    i64 count = 0, blocked = 0;
    for (i64 value = 0; value < g->values; value++) {
        i64 maker = g->producer[value];
        if (maker < 0 || !g->again[maker] || g->size[value] == 0 || g->flags[value] & OUTPUT) continue;
        for (int32_t at = b->head[value], next; at >= 0; at = next) {
            next = b->event[at].after;
            if (!is_read(b, next) || b->event[next].slot >= b->slots) continue;
            i64 low = b->event[at].slot, reader = b->event[next].slot;
            if (low >= last) break;
            if (reader <= first || pinned(b, value, low, reader)) continue;
            double relief = price_before(b, reader) - price_before(b, low + 1);
            if (relief <= 0) continue;
            i64 needed = missing(b, value, reader, stretch);
            if (needed == -1) blocked++;
            if (needed <= 0) continue;
            double cost = 0.0;
            for (i64 k = 0; k < needed; k++) cost += g->time_s[b->needed[k]];
            b->pick[count] = value;
            b->pick_reader[count] = reader;
            b->worth[count++] = noisy(b, cost / ((double)g->size[value] * relief), noise);
        }
    }
    *found = count;
    return blocked;
}

/* Drop if that lowers the excess over the target; take it back otherwise. */
static int try_drop(Bench *b, i64 value, i64 reader, i64 target, double stretch) {
    if (b->op_at[reader] < 0) return 0;
    int32_t previous = last_before(b, value, reader), following;
    if (previous < 0) return 0;
    following = b->event[previous].after;
    if (!is_read(b, following) || b->event[following].slot != reader) return 0;
    if (most(b, b->event[previous].slot + 1, reader) <= target) return 0;
    i64 needed = missing(b, value, reader, stretch), mark = b->logged;
    double before_s = b->makespan_s;
    if (needed <= 0 || !drop(b, needed, reader)) return 0;
    if (excess_change(b, mark, target) < 0) return 1;
    undo_to(b, mark);
    b->makespan_s = before_s;
    return 0;
}

/* Running sum of the excess over a target before each execution; first and last that are over it. */
WIDE static void over_target(Bench *b, i64 target, i64 *first, i64 *last) {
    double running = 0.0;
    i64 rank = 0;
    remember_slots(b);
    for (i64 block = 0, count = blocks(b); block < count; block++) {
        const i64 *memory = b->memory + (block << b->block_shift) - rank;
        for (i64 stop = block_rank(b, block + 1); rank < stop; rank++) {
            i64 over = memory[rank] + b->block_add[block] - target;
            b->price[rank] = running;
            if (over <= 0) continue;
            running += (double)over;
            *last = rank;
            if (*first < 0) *first = rank;
        }
    }
    b->price[rank] = running;
}

static int descend_once(Bench *b, i64 target, double noise, double stretch, int may_respace) {
    i64 first = -1, last = -1, count, done = 0;
    over_target(b, target, &first, &last);
    b->work += b->slots >> 8;
    if (first < 0) return 0;
    i64 blocked = droppable(b, slot_of(b, first), slot_of(b, last), noise, stretch, &count);
    sort_by_worth(b, count);
    for (i64 k = 0; k < count; k++) {
        i64 pick = b->rank[k];
        done += try_drop(b, b->pick[pick], b->pick_reader[pick], target, stretch);
        if (done && (done >= 8 + count / 16 || peak(b) <= target)) break;
    }
    if (may_respace && blocked && done < 4) return respace(b);
    return done > 0;
}

/* Insert recomputations until the peak is at most the target; 0 when stuck. */
int descend(Bench *b, i64 target, i64 rounds, double noise, double stretch, int may_respace) {
    double left = HUGE_VAL;
    int stalled = 0;
    for (i64 round = 0; round < rounds && peak(b) > target; round++) {
        if (stalled > 2 || !descend_once(b, target, noise, stretch, may_respace)) break;
        double now = excess(b, target);
        stalled = now > 0.98 * left ? stalled + 1 : 0;
        left = now;
    }
    return peak(b) <= target;
}
