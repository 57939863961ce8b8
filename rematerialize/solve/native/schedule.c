/* A schedule that can be edited.

   Executions stand on spaced slots, so that new ones fit in between. Every value has one list of
   events in slot order, a write per instance and a read per use: an instance is live from its write to
   the last read before the next write. Two primitives edit a schedule, `insert` and `removal`, each the
   exact inverse of the other; they log what they did, so that `undo_to` takes any move back.

   Invariants: (1) memory is exact for every execution (memory.c); (2) the instance of a forward output that
   stands at the end of the forward is live to the end whatever reads it (`held`). */

#include "kernel.h"

#include <stdlib.h>
#include <string.h>

#define FEW 6 /* events of a value that are walked over before the other end is looked at */

static i64 degree(const Graph *g, i64 op) {
    return g->in_ptr[op + 1] - g->in_ptr[op] + g->out_ptr[op + 1] - g->out_ptr[op];
}

static void append(Bench *b, i64 value, i64 slot, int write) {
    int32_t at = (int32_t)b->events++;
    b->event[at] = (Event){slot, (int32_t)value, write, b->tail[value], -1};
    if (b->tail[value] >= 0) b->event[b->tail[value]].after = at;
    else b->head[value] = at;
    b->tail[value] = at;
}

/* Memory of every execution of a schedule that was just laid out, from the events. O(slots + events). */
static void measure(Bench *b) {
    const Graph *g = &b->g;
    i64 *change = b->rank_spare;
    int spacing = lowest_bit((uint64_t)b->spacing); /* a power of two; executions stand at the ends of their spaces */
    memset(change, 0, (size_t)(b->length + 1) * sizeof(i64));
    for (i64 value = 0; value < g->values; value++) {
        int32_t at = b->head[value];
        while (at >= 0) {
            if (!b->event[at].write) { at = b->event[at].after; continue; }
            i64 start = b->event[at].slot, stop = g->flags[value] & TANGENT ? start : start + 1;
            int32_t last = b->event[at].after;
            while (last >= 0 && !b->event[last].write) {
                stop = MIN(b->event[last].slot + 1, b->slots);
                last = b->event[last].after;
            }
            int final = last < 0 || b->event[last].slot >= b->split;
            if (g->flags[value] & OUTPUT && start < b->split && final) stop = b->slots;
            if (start < stop) {
                change[start >> spacing] += g->size[value];
                change[stop >> spacing] -= g->size[value];
            }
            at = last;
        }
    }
    arrange(b, change);
}

/* Lay a valid plan out; 0 when there is no room for it. O(length + edges). */
int load(Bench *b, const i64 *order, i64 length, i64 split) {
    const Graph *g = &b->g;
    while (b->spacing > SPACING && length * b->spacing > b->slot_space) b->spacing /= 2;
    if (length * b->spacing > b->slot_space) return 0;
    i64 total = 2 * g->values;
    for (i64 k = 0; k < length; k++) total += degree(g, order[k]);
    if (total > b->event_space) return 0;
    b->slots = length * b->spacing;
    b->split = split * b->spacing;
    b->length = length;
    b->events = b->logged = b->ranges = b->pins = 0;
    b->makespan_s = 0.0;
    b->focus_low = 0;
    b->focus_high = b->slots;
    for (i64 value = 0; value < g->values; value++) b->head[value] = b->tail[value] = -1;
    for (i64 slot = 0; slot < b->slots; slot++) b->op_at[slot] = -1;
    for (i64 k = 0; k <= length; k++) {
        if (k == split)
            for (i64 value = 0; value < g->values; value++)
                if (g->flags[value] & TANGENT) append(b, value, b->split, 1);
        if (k == length) break;
        i64 op = order[k], slot = k * b->spacing + b->spacing - 1;
        b->op_at[slot] = (int32_t)op;
        b->first[slot] = (int32_t)b->events;
        for (i64 e = g->in_ptr[op]; e < g->in_ptr[op + 1]; e++) append(b, g->in_val[e], slot, 0);
        for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++) append(b, g->out_val[e], slot, 1);
        b->makespan_s += g->time_s[op];
    }
    for (i64 value = 0; value < g->values; value++)
        if (g->flags[value] & GRADIENT && b->tail[value] >= 0) append(b, value, END_SLOT, 0);
    measure(b);
    return 1;
}

/* Write the order to an array; return how many of it stand in the forward. */
i64 unload(const Bench *b, i64 *order) {
    i64 count = 0, split = 0;
    for (i64 slot = taken_from(b, 0); slot < b->slots; slot = taken_from(b, slot + 1)) {
        order[count++] = b->op_at[slot];
        split += slot < b->split;
    }
    return split;
}

/* Lay the schedule out again with room in front of every execution; 0 if it has become too long. */
int respace(Bench *b) {
    i64 split = unload(b, b->rank);
    return load(b, b->rank, b->length, split);
}

/* Last event of a value before a slot, -1 when there is none: from the end that is nearer, if not near the tail. */
int32_t last_before(const Bench *b, i64 value, i64 slot) {
    int32_t at = b->tail[value];
    for (int hop = 0; at >= 0 && b->event[at].slot >= slot; hop++) {
        if (hop == FEW) {
            int32_t early = b->head[value];
            if (slot - b->event[early].slot < b->event[at].slot - slot) {
                int32_t found = -1;
                for (; b->event[early].slot < slot; early = b->event[early].after) found = early;
                return found;
            }
        }
        at = b->event[at].before;
    }
    return at;
}

/* Whether an event belongs to the instance that the caller holds to the end. */
int held(const Bench *b, i64 value, int32_t event) {
    if (!(b->g.flags[value] & OUTPUT)) return 0;
    while (!b->event[event].write) event = b->event[event].before;
    if (b->event[event].slot >= b->split) return 0;
    do event = b->event[event].after;
    while (is_read(b, event));
    return event < 0 || b->event[event].slot >= b->split;
}

/* Change memory and note the range, for those who price a move. */
static void change(Bench *b, i64 start, i64 stop, i64 size) {
    stop = MIN(stop, b->slots);
    if (start >= stop || size == 0) return;
    if (!b->dry) add(b, start, stop, size);
    b->touched_low = MIN(b->touched_low, start);
    b->touched_high = MAX(b->touched_high, stop);
    if (b->ranges < b->event_space) b->range[b->ranges++] = (Range){start, stop, size};
}

static i64 last_read(const Bench *b, int32_t event) {
    while (is_read(b, b->event[event].after)) event = b->event[event].after;
    return b->event[event].slot;
}

static void join_list(Bench *b, int32_t at, i64 value, i64 slot, int write, int32_t previous) {
    int32_t following = previous >= 0 ? b->event[previous].after : b->head[value];
    b->event[at] = (Event){slot, (int32_t)value, write, previous, following};
    if (previous >= 0) b->event[previous].after = at;
    else b->head[value] = at;
    if (following >= 0) b->event[following].before = at;
    else b->tail[value] = at;
}

static void leave_list(Bench *b, int32_t at) {
    Event e = b->event[at];
    if (e.before >= 0) b->event[e.before].after = e.after;
    else b->head[e.value] = e.after;
    if (e.after >= 0) b->event[e.after].before = e.before;
    else b->tail[e.value] = e.before;
}

/* What is live at a free slot: what its neighbour holds without its own. Tangents appear in between at the split. */
static i64 live_at(const Bench *b, i64 slot) {
    i64 next = taken_from(b, slot), last;
    if (next < b->slots && (next < b->split || slot >= b->split)) return memory_at(b, next) - b->made[b->op_at[next]];
    if ((last = taken_before(b, slot)) < 0) return 0;
    i64 op = b->op_at[last], live = memory_at(b, last) - b->g.transient[op];
    int32_t stop = b->first[last] + (int32_t)degree(&b->g, op);
    for (int32_t at = b->first[last]; at < stop; at++) {
        i64 value = b->event[at].value;
        if (!is_read(b, b->event[at].after) && !held(b, value, at)) live -= b->g.size[value];
    }
    return live;
}

static void place(Bench *b, i64 op, i64 slot) {
    const Graph *g = &b->g;
    int32_t at = b->first[slot];
    if (!b->dry) open_slot(b, slot, live_at(b, slot) + g->transient[op]);
    b->op_at[slot] = (int32_t)op;
    for (i64 e = g->in_ptr[op]; e < g->in_ptr[op + 1]; e++) {
        i64 value = g->in_val[e];
        int32_t previous = last_before(b, value, slot);
        if (!is_read(b, b->event[previous].after) && !held(b, value, previous))
            change(b, b->event[previous].slot + 1, slot + 1, g->size[value]);
        join_list(b, at++, value, slot, 0, previous);
    }
    for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++) {
        i64 value = g->out_val[e];
        int32_t previous = last_before(b, value, slot);
        int32_t following = previous >= 0 ? b->event[previous].after : b->head[value];
        if (!is_read(b, following)) change(b, slot, slot + 1, g->size[value]);
        else if (held(b, value, previous)) change(b, slot, last_read(b, following) + 1, g->size[value]);
        else change(b, b->event[previous].slot + 1, slot, -g->size[value]);
        join_list(b, at++, value, slot, 1, previous);
    }
    b->makespan_s += g->time_s[op];
    b->length++;
}

static void displace(Bench *b, i64 slot) {
    const Graph *g = &b->g;
    i64 op = b->op_at[slot];
    int32_t outs = first_output(b, slot);
    int32_t stop = b->first[slot] + (int32_t)degree(g, op);
    for (int32_t at = outs; at < stop; at++) {
        i64 value = b->event[at].value;
        int32_t previous = b->event[at].before;
        if (!is_read(b, b->event[at].after)) change(b, slot, slot + 1, -g->size[value]);
        else if (held(b, value, previous)) change(b, slot, last_read(b, at) + 1, -g->size[value]);
        else change(b, b->event[previous].slot + 1, slot, g->size[value]);
        leave_list(b, at);
    }
    for (int32_t at = b->first[slot]; at < outs; at++) {
        i64 value = b->event[at].value;
        int32_t previous = b->event[at].before;
        if (!is_read(b, b->event[at].after) && !held(b, value, previous))
            change(b, b->event[previous].slot + 1, slot + 1, -g->size[value]);
        leave_list(b, at);
    }
    if (!b->dry) close_slot(b, slot);
    b->op_at[slot] = -1;
    b->makespan_s -= g->time_s[op];
    b->length--;
}

static void insert(Bench *b, i64 op, i64 slot) {
    b->first[slot] = (int32_t)b->events;
    b->events += degree(&b->g, op);
    place(b, op, slot);
    b->log_op[b->logged] = (int32_t)op;
    b->log_slot[b->logged++] = slot;
}

static void removal(Bench *b, i64 slot) {
    b->log_op[b->logged] = -1 - b->op_at[slot];
    b->log_first[b->logged] = b->first[slot]; /* another execution may take the slot before this is undone */
    b->log_slot[b->logged++] = slot;
    displace(b, slot);
}

/* Start pricing a move; what is logged stays. */
void begin(Bench *b) { b->ranges = 0; }

/* Take back everything that was logged after the first `mark` edits, last first. */
void undo_to(Bench *b, i64 mark) {
    while (b->logged > mark) {
        i64 op = b->log_op[--b->logged], slot = b->log_slot[b->logged];
        if (op >= 0) {
            displace(b, slot);
            b->events = b->first[slot]; /* the last to come is the first to go */
        } else {
            b->first[slot] = b->log_first[b->logged];
            place(b, -1 - op, slot);
        }
    }
    b->ranges = 0;
}

static int unread(const Bench *b, i64 slot) {
    const Graph *g = &b->g;
    i64 op = b->op_at[slot];
    int32_t at = first_output(b, slot);
    for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++, at++)
        if (is_read(b, b->event[at].after) || held(b, g->out_val[e], at)) return 0;
    return 1;
}

/* Remove what the edits logged from `mark` on made useless, and so on in turn. */
static void remove_unread(Bench *b, i64 mark) {
    const Graph *g = &b->g;
    for (i64 k = mark; k < b->logged; k++) {
        i64 op = b->log_op[k], slot = b->log_slot[k];
        int gone = op < 0;
        if (gone) op = -1 - op;
        const i64 *pointer = gone ? g->in_ptr : g->out_ptr, *values = gone ? g->in_val : g->out_val;
        for (i64 e = pointer[op]; e < pointer[op + 1]; e++) {
            int32_t at = last_before(b, values[e], slot);
            if (at < 0 || !b->event[at].write) continue;
            i64 made = b->event[at].slot, maker = b->op_at[made];
            if (maker >= 0 && maker < g->forwards && g->again[maker] && unread(b, made)) removal(b, made);
        }
    }
}

/* Whether the op at a slot has run before, so that its readers could read the instance before. */
int has_previous(const Bench *b, i64 slot) {
    const Graph *g = &b->g;
    i64 op = b->op_at[slot];
    if (slot < b->split)
        for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++)
            if (g->flags[g->out_val[e]] & OUTPUT) return 0;
    int32_t at = first_output(b, slot);
    return g->out_ptr[op] < g->out_ptr[op + 1] && b->head[b->event[at].value] != at;
}

/* Delete the recomputation at a slot and what was computed only for it. */
void retain(Bench *b, i64 slot) {
    i64 mark = b->logged;
    begin(b);
    removal(b, slot);
    remove_unread(b, mark);
    b->work++;
}

static i64 room(const Bench *b, i64 slot) {
    i64 stop = slot >= b->split ? b->split + 1 : 0; /* tangents appear at the split */
    return slot - MIN(MAX(taken_before(b, slot) + 1, stop), slot);
}

/* Write the ops to run again for a value in front of a reader to `needed`, in order; return how many.

   Inputs that are gone by then are recomputed too, unless they must not be or are small (at most
   `stretch` times the value): those live longer instead. -1: no room; -2: it can't be done. */
i64 missing(Bench *b, i64 value, i64 reader, double stretch) {
    const Graph *g = &b->g;
    i64 space = room(b, reader), count = 1, result = 0;
    double limit = stretch * (double)g->size[value];
    b->needed[0] = (int32_t)g->producer[value];
    b->mark[b->needed[0]] = 1;
    if (space < 1) result = -1;
    for (i64 done = 0; done < count && !result; done++) {
        i64 op = b->needed[done];
        for (i64 e = g->in_ptr[op]; e < g->in_ptr[op + 1] && !result; e++) {
            i64 read = g->in_val[e], maker = g->producer[read];
            if (maker < 0 || b->mark[maker]) continue;
            int32_t at = last_before(b, read, reader);
            if (at >= 0) {
                if (is_read(b, b->event[at].after) || held(b, read, at)) continue;
                if (!g->again[maker] || (double)g->size[read] <= limit) continue;
            } else if (!g->again[maker]) { result = -2; break; }
            if (count >= space) { result = -1; break; }
            b->mark[maker] = 1;
            b->needed[count++] = (int32_t)maker;
        }
    }
    for (i64 k = 0; k < count; k++) b->mark[b->needed[k]] = 0;
    if (result) return result;
    for (i64 k = 1; k < count; k++) { /* few, and nearly in order */
        int32_t op = b->needed[k];
        i64 place_at = k;
        for (; place_at > 0 && b->needed[place_at - 1] > op; place_at--) b->needed[place_at] = b->needed[place_at - 1];
        b->needed[place_at] = op;
    }
    return count;
}

/* Run the first `count` needed ops again right in front of a reader; 0 when events run out. */
int drop(Bench *b, i64 count, i64 reader) {
    i64 operands = 0, mark = b->logged;
    for (i64 k = 0; k < count; k++) operands += degree(&b->g, b->needed[k]);
    if (b->events + operands > b->event_space || b->logged + 2 * count + 64 > b->slot_space) return 0;
    begin(b);
    for (i64 k = 0; k < count; k++) insert(b, b->needed[k], reader - count + k);
    remove_unread(b, mark);
    b->work++;
    return 1;
}

/* Move the execution at a slot towards another, between what it reads and who reads it; 0 when it can't go. */
int shift(Bench *b, i64 slot, i64 wanted) {
    const Graph *g = &b->g;
    i64 op = b->op_at[slot], low = slot >= b->split ? b->split : -1, high = slot >= b->split ? b->slots : b->split;
    int32_t at = b->first[slot];
    for (i64 e = g->in_ptr[op]; e < g->in_ptr[op + 1]; e++, at++) {
        int32_t made = at;
        while (!b->event[made].write) made = b->event[made].before;
        low = MAX(low, b->event[made].slot);
    }
    for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++, at++) {
        int32_t next = b->event[at].after;
        if (next >= 0) high = MIN(high, b->event[next].slot);
    }
    wanted = MAX(low + 1, MIN(wanted, high - 1));
    i64 place_at = wanted;
    while (place_at > low && b->op_at[place_at] >= 0) place_at--;
    if (place_at <= low)
        for (place_at = wanted; place_at < high && b->op_at[place_at] >= 0;) place_at++;
    if (place_at >= high || place_at <= low) return 0;
    if (b->events + degree(g, op) > b->event_space || b->logged + 64 > b->slot_space) return 0;
    insert(b, op, place_at);
    removal(b, slot);
    b->work++;
    return 1;
}
