/* Making and unmaking benches, and what Python reads off them. */

#include "kernel.h"

#include <stdlib.h>

#define MAX(a, b) ((a) > (b) ? (a) : (b))

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
    b->op_at = calloc(slots, sizeof(int32_t));
    b->first = calloc(slots, sizeof(int32_t));
    b->memory = calloc(slots, sizeof(i64));
    b->taken = calloc(words, sizeof(uint64_t));
    b->before = calloc(words, sizeof(int32_t));
    b->priced_taken = calloc(words, sizeof(uint64_t));
    b->priced_before = calloc(words, sizeof(int32_t));
    b->block_max = calloc(words, sizeof(i64));
    b->block_add = calloc(words, sizeof(i64));
    b->made = calloc((size_t)g->ops + 1, sizeof(i64));
    b->event = calloc(events, sizeof(Event));
    b->head = calloc((size_t)g->values + 1, sizeof(int32_t));
    b->tail = calloc((size_t)g->values + 1, sizeof(int32_t));
    b->log_op = calloc(slots, sizeof(int32_t));
    b->log_first = calloc(slots, sizeof(int32_t));
    b->log_slot = calloc(slots, sizeof(i64));
    b->range = calloc(events, sizeof(Range));
    b->mark = calloc((size_t)g->ops + 1, sizeof(int32_t));
    b->needed = calloc((size_t)g->ops + 1, sizeof(int32_t));
    b->price = calloc(slots, sizeof(double));
    b->pick = calloc(widest, sizeof(i64));
    b->pick_reader = calloc(widest, sizeof(i64));
    b->worth = calloc(widest, sizeof(double));
    b->rank = calloc(widest, sizeof(i64));
    b->rank_spare = calloc(widest, sizeof(i64));
    b->saved = calloc(slots, sizeof(i64));
    b->random = 88172645463325252u;
    if (!b->op_at || !b->first || !b->taken || !b->before || !b->priced_taken || !b->priced_before || !b->memory ||
        !b->block_max || !b->block_add || !b->made || !b->event || !b->head || !b->tail ||
        !b->log_op || !b->log_first || !b->log_slot || !b->range || !b->mark || !b->needed || !b->price || !b->pick ||
        !b->pick_reader || !b->worth || !b->rank || !b->rank_spare || !b->saved) {
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
