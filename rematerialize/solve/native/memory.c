/* Memory over a schedule: exact at every execution, with sums over ranges of slots.

   Executions stand on slots with free ones in between, and only they have an entry, so that what a range costs doesn't
   depend on how wide a schedule is laid out. Slots come in blocks of 1 << block_shift; a block's entries stand side by
   side in `memory` from the block's first slot on, in order. Where a slot's entry is follows from the bits of `taken`
   before it, counted by `before` up to its word.

   Invariants: (1) memory + block_add is exact for every execution; (2) block_max is the largest of a block, hugely
   negative without any. */

#include "kernel.h"

#include <string.h>

/* First entry of a block at or after a slot; those before the block count as its first. */
static inline i64 entry(const Bench *b, i64 block, i64 slot) {
    i64 start = block << b->block_shift;
    return start + (slot > start ? rank_of(b, slot) - block_rank(b, block) : 0);
}

/* One past a block's last entry before a slot. */
static inline i64 entries_until(const Bench *b, i64 block, i64 slot) {
    i64 start = block << b->block_shift, stop = (block + 1) << b->block_shift;
    return start + (slot < stop ? rank_of(b, slot) : block_rank(b, block + 1)) - block_rank(b, block);
}

static inline i64 largest(const i64 *memory, i64 first, i64 stop) {
    i64 found = NOTHING;
    for (i64 at = first; at < stop; at++) found = MAX(found, memory[at]);
    return found;
}

static inline void refresh(Bench *b, i64 block) {
    i64 start = block << b->block_shift;
    b->block_max[block] = largest(b->memory, start, entries_until(b, block, b->slots)) + b->block_add[block];
}

/* Set all entries of a schedule that was just laid out, from what changes at each execution and stays. O(slots). */
WIDE void arrange(Bench *b, const i64 *change) {
    int spacing = lowest_bit((uint64_t)b->spacing), shift = spacing + LEAST_SHIFT; /* both are powers of two */
    while ((i64)4 << 2 * (shift - spacing) < b->length) shift++; /* some sqrt(length) entries */
    b->block_shift = MAX(shift, WORD);
    i64 count = (b->slots >> b->block_shift) + 1, live = 0, rank = 0, at = 0;
    b->words = count << (b->block_shift - WORD);
    memset(b->taken, 0, (size_t)(b->words + 1) * sizeof(uint64_t));
    for (i64 slot = b->spacing - 1; slot < b->slots; slot += b->spacing)
        b->taken[slot >> WORD] |= (uint64_t)1 << (slot & 63);
    for (i64 word = 0; word <= b->words; word++) {
        b->before[word] = (int32_t)at;
        at += ones(b->taken[word]);
    }
    for (i64 block = 0; block < count; block++) {
        i64 stop = block_rank(b, block + 1), to = block << b->block_shift;
        for (; rank < stop; rank++, to++) {
            live += change[rank];
            b->memory[to] = live + b->g.transient[b->op_at[(rank + 1) * b->spacing - 1]];
        }
        b->block_add[block] = 0;
        refresh(b, block);
    }
}

/* Give a free slot an entry. */
WIDE void open_slot(Bench *b, i64 slot, i64 memory) {
    i64 block = slot >> b->block_shift, at = entry(b, block, slot), stop = entries_until(b, block, b->slots);
    memmove(b->memory + at + 1, b->memory + at, (size_t)(stop - at) * sizeof(i64));
    b->memory[at] = memory - b->block_add[block];
    b->block_max[block] = MAX(b->block_max[block], memory);
    b->taken[slot >> WORD] |= (uint64_t)1 << (slot & 63);
    for (i64 word = (slot >> WORD) + 1; word <= b->words; word++) b->before[word]++;
}

/* Free a slot that has one. */
WIDE void close_slot(Bench *b, i64 slot) {
    i64 block = slot >> b->block_shift, at = entry(b, block, slot), stop = entries_until(b, block, b->slots);
    memmove(b->memory + at, b->memory + at + 1, (size_t)(stop - at - 1) * sizeof(i64));
    b->taken[slot >> WORD] &= ~((uint64_t)1 << (slot & 63));
    for (i64 word = (slot >> WORD) + 1; word <= b->words; word++) b->before[word]--;
    refresh(b, block);
}

/* First taken slot at or after one; all of them when there is none. */
i64 taken_from(const Bench *b, i64 slot) {
    if (slot >= b->slots) return b->slots;
    i64 word = slot >> WORD;
    uint64_t bits = b->taken[word] & ~(uint64_t)0 << (slot & 63);
    while (!bits) {
        if (++word >= b->words) return b->slots;
        bits = b->taken[word];
    }
    return (word << WORD) + lowest_bit(bits);
}

/* Last taken slot before one; -1 when there is none. */
i64 taken_before(const Bench *b, i64 slot) {
    i64 word = slot >> WORD;
    uint64_t bits = b->taken[word] & (((uint64_t)1 << (slot & 63)) - 1);
    while (!bits) {
        if (--word < 0) return -1;
        bits = b->taken[word];
    }
    return (word << WORD) + highest_bit(bits);
}

/* Move on to the next taken slot, from the last slot to the first; 0 after a whole turn. `seen`: slots passed. */
int around(const Bench *b, i64 *slot, i64 *seen) {
    for (int turn = 0; turn < 2; turn++) {
        i64 next = taken_from(b, *slot);
        *seen += next - *slot;
        *slot = next;
        if (next < b->slots) return *seen < b->slots;
        *slot = 0;
    }
    return 0;
}

/* Slot of an execution. */
WIDE i64 slot_of(const Bench *b, i64 rank) {
    i64 low = 0, high = b->words;
    while (high - low > 1) {
        i64 middle = (low + high) >> 1;
        if (b->before[middle] <= rank) low = middle;
        else high = middle;
    }
    uint64_t bits = b->taken[low];
    for (i64 left = rank - b->before[low]; left > 0; left--) bits &= bits - 1;
    return (low << WORD) + lowest_bit(bits);
}

/* Memory at a taken slot. */
WIDE i64 memory_at(const Bench *b, i64 slot) {
    i64 block = slot >> b->block_shift;
    return b->memory[entry(b, block, slot)] + b->block_add[block];
}

static inline void add_within(Bench *b, i64 block, i64 low, i64 high, i64 size) {
    i64 found = NOTHING;
    for (i64 at = low; at < high; at++) {
        b->memory[at] += size;
        found = MAX(found, b->memory[at]);
    }
    if (size > 0) b->block_max[block] = MAX(b->block_max[block], found + b->block_add[block]);
    else if (low < high) refresh(b, block);
}

/* Change memory in the slots [start, stop). */
WIDE void add(Bench *b, i64 start, i64 stop, i64 size) {
    i64 first = start >> b->block_shift, last = (stop - 1) >> b->block_shift;
    if (first == last) {
        add_within(b, first, entry(b, first, start), entries_until(b, first, stop), size);
        return;
    }
    add_within(b, first, entry(b, first, start), entries_until(b, first, b->slots), size);
    for (i64 block = first + 1; block < last; block++) b->block_add[block] += size;
    for (i64 block = first + 1; block < last; block++) b->block_max[block] += size;
    add_within(b, last, last << b->block_shift, entries_until(b, last, stop), size);
}

/* Largest memory in the slots [start, stop). */
WIDE i64 most(const Bench *b, i64 start, i64 stop) {
    i64 found = NOTHING;
    stop = MIN(stop, b->slots);
    for (i64 block = start >> b->block_shift; block << b->block_shift < stop; block++) {
        if (b->block_max[block] <= found) continue;
        if (start <= block << b->block_shift && stop >= MIN((block + 1) << b->block_shift, b->slots))
            found = b->block_max[block];
        else {
            i64 in = largest(b->memory, entry(b, block, start), entries_until(b, block, stop));
            found = MAX(found, in + b->block_add[block]);
        }
    }
    return found;
}

i64 peak(const Bench *b) {
    i64 found = 0;
    for (i64 block = 0, count = blocks(b); block < count; block++) found = MAX(found, b->block_max[block]);
    return found;
}

/* First slot of the most memory. */
i64 fullest(const Bench *b) {
    i64 top = peak(b);
    for (i64 block = 0, count = blocks(b); block < count; block++) {
        if (b->block_max[block] < top) continue;
        i64 start = block << b->block_shift, stop = entries_until(b, block, b->slots);
        for (i64 at = start; at < stop; at++)
            if (b->memory[at] + b->block_add[block] >= top) return slot_of(b, block_rank(b, block) + at - start);
    }
    return 0;
}
