/* Making and unmaking benches, and what Python reads off them. */

#include "kernel.h"

#include <stdlib.h>

void bench_free(Bench *b) {
    if (!b) return;
    void *parts[] = {b->op_at, b->first, b->taken, b->before, b->memory, b->block_max, b->block_add, b->made,
                     b->event, b->head, b->tail, b->log_op, b->log_first, b->log_slot, b->range, b->mark, b->needed,
                     b->price, b->priced_taken, b->priced_before, b->pick, b->pick_reader, b->worth, b->rank,
                     b->rank_spare, b->saved};
    for (size_t k = 0; k < sizeof parts / sizeof *parts; k++) free(parts[k]);
    free(b);
}

/* Leave room for schedules of `length` executions, at most those it was made for, and let searches vary the spacing or
   not, which takes a bench made for that: what a search finds depends on both. */
void bench_limit(Bench *b, i64 length, int varied) {
    i64 operands = b->g.in_ptr[b->g.ops] + b->g.out_ptr[b->g.ops];
    b->varied = varied;
    b->spacing = varied ? SPACING << WIDENINGS : SPACING;
    b->slot_space = (length + 1) * b->spacing;
    b->event_space = operands * (2 + 2 * length / MAX(b->g.ops, 1)) + 2 * b->g.values + 256;
}

static void *room(size_t count, size_t size, int *failed) {
    void *found = calloc(count, size);
    if (!found) *failed = 1;
    return found;
}

/* A bench with room for schedules of `length` executions; 0 without memory. The graph's arrays stay the caller's. */
Bench *bench_new(const Graph *g, i64 length, int varied) {
    Bench *b = calloc(1, sizeof *b);
    if (!b) return 0;
    b->g = *g;
    bench_limit(b, length, varied);
    size_t slots = (size_t)b->slot_space + 2, events = (size_t)b->event_space + 2;
    /* Whole blocks: up to one more than there are slots for, of as many slots or the least. */
    size_t words = 2 * (slots >> WORD) + (SPACING << WIDENINGS << LEAST_SHIFT >> WORD) + 2;
    size_t widest = slots > events ? slots : events;
    int failed = 0;
    b->op_at = room(slots, sizeof(int32_t), &failed);
    b->first = room(slots, sizeof(int32_t), &failed);
    b->memory = room(slots, sizeof(i64), &failed);
    b->taken = room(words, sizeof(uint64_t), &failed);
    b->before = room(words, sizeof(int32_t), &failed);
    b->priced_taken = room(words, sizeof(uint64_t), &failed);
    b->priced_before = room(words, sizeof(int32_t), &failed);
    b->block_max = room(words, sizeof(i64), &failed);
    b->block_add = room(words, sizeof(i64), &failed);
    b->made = room((size_t)g->ops + 1, sizeof(i64), &failed);
    b->event = room(events, sizeof(Event), &failed);
    b->head = room((size_t)g->values + 1, sizeof(int32_t), &failed);
    b->tail = room((size_t)g->values + 1, sizeof(int32_t), &failed);
    b->log_op = room(slots, sizeof(int32_t), &failed);
    b->log_first = room(slots, sizeof(int32_t), &failed);
    b->log_slot = room(slots, sizeof(i64), &failed);
    b->range = room(events, sizeof(Range), &failed);
    b->mark = room((size_t)g->ops + 1, sizeof(int32_t), &failed);
    b->needed = room((size_t)g->ops + 1, sizeof(int32_t), &failed);
    b->price = room(slots, sizeof(double), &failed);
    b->pick = room(widest, sizeof(i64), &failed);
    b->pick_reader = room(widest, sizeof(i64), &failed);
    b->worth = room(widest, sizeof(double), &failed);
    b->rank = room(widest, sizeof(i64), &failed);
    b->rank_spare = room(widest, sizeof(i64), &failed);
    b->saved = room(slots, sizeof(i64), &failed);
    b->random = 88172645463325252u;
    if (failed) {
        bench_free(b);
        return 0;
    }
    for (i64 op = 0; op < g->ops; op++) {
        b->made[op] = g->transient[op];
        for (i64 e = g->out_ptr[op]; e < g->out_ptr[op + 1]; e++) b->made[op] += g->size[g->out_val[e]];
    }
    return b;
}

i64 bench_length(const Bench *b) { return b->length; }
i64 bench_work(const Bench *b) { return b->work; }
double bench_makespan_s(const Bench *b) { return b->makespan_s; }
