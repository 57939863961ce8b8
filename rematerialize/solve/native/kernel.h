/* The solvers' inner loops: a schedule that can be edited, greedy moves on it, a chain's tables.

   Plain C without Python in it: `solve/native/__init__.py` binds it. Sizes are scaled so that sums fit
   64 bits; nothing here depends on time, threads or addresses, so results repeat anywhere. */

#ifndef REMATERIALIZE_KERNEL_H
#define REMATERIALIZE_KERNEL_H

#include <stdint.h>

typedef int64_t i64;

/* Loops over slots: compiled for wider registers, too, and chosen when loaded; integers, so results are the same. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#define SPACING 8                   /* least slots per execution when a schedule is laid out */
#define WIDENINGS 2                 /* how often they may be doubled */
#define PINS 8                      /* gaps that a move can keep shut */
#define NOTHING (-((i64)1 << 61))   /* the most memory of no executions at all */
#define END_SLOT ((i64)1 << 60)     /* the slot of a reader that never lets go */
#define WORD 6                      /* slots per word of `taken`, as a power of two */
#define LEAST_SHIFT 4               /* executions per block of memory when laid out, as a power of two, at least */

enum { OUTPUT = 1, GRADIENT = 2, TANGENT = 4 };

/* A step; arrays are the caller's. */
typedef struct {
    i64 ops, forwards, values;
    const i64 *in_ptr, *in_val, *out_ptr, *out_val;   /* operands of each op */
    const i64 *size, *transient, *again, *producer, *flags;
    const double *time_s;
} Graph;

/* One use (or the making) of a value: an event in its list, by slot. */
typedef struct {
    i64 slot;
    int32_t value, write;
    int32_t before, after;
} Event;

typedef struct { i64 low, high, size; } Range;

typedef struct {
    Graph g;
    i64 slots, split, length;      /* of the schedule that is laid out */
    i64 slot_space, event_space;   /* room for longer ones */
    i64 spacing;                   /* slots per execution: no more can be recomputed in one place */
    int varied;                    /* whether searches change the spacing */
    int block_shift;               /* slots per block of the memory profile, as a power of two */
    i64 events, logged, ranges, pins;
    int dry;                       /* whether edits only note what they would change in memory */
    double makespan_s;
    int32_t *op_at;                /* per slot: op or -1 */
    int32_t *first;                /* per slot: first event of its execution */
    i64 words;                     /* of `taken` that are in use: those of all blocks */
    uint64_t *taken;               /* a bit per slot */
    int32_t *before;               /* per word: how many executions stand before it */
    i64 *memory, *block_max, *block_add;   /* see memory.c */
    i64 *made;                     /* per op: its transient and its outputs */
    Event *event;
    int32_t *head, *tail;          /* per value */
    int32_t *log_op;               /* op inserted, or -1 - op removed */
    int32_t *log_first;
    i64 *log_slot;
    Range *range;                  /* what the present move changes */
    int32_t *mark, *needed;        /* per op, for `missing` */
    double *price;                 /* running sum before each execution; also of excess */
    uint64_t *priced_taken;        /* where they stood then */
    int32_t *priced_before;
    i64 *pick;                     /* candidates of a greedy pass */
    i64 *pick_reader;
    double *worth;
    i64 *rank, *rank_spare;
    i64 *saved;                    /* the best order of a search */
    uint64_t random;
    i64 touched_low, touched_high; /* hull of all that changed since a search last reset it */
    i64 focus_low, focus_high;     /* where `spend` looks for recomputations to delete */
    Range pin[PINS];               /* gaps that the present move has shut and mustn't open; size: the value */
    i64 work;                      /* moves tried, for limits that don't depend on the clock */
} Bench;

#if defined(__GNUC__)
static inline int ones(uint64_t bits) { return __builtin_popcountll(bits); }
static inline int lowest_bit(uint64_t bits) { return __builtin_ctzll(bits); }
static inline int highest_bit(uint64_t bits) { return 63 - __builtin_clzll(bits); }
#else
static inline int ones(uint64_t bits) {
    int count = 0;
    for (; bits; bits &= bits - 1) count++;
    return count;
}
static inline int lowest_bit(uint64_t bits) { return ones((bits & (~bits + 1)) - 1); }
static inline int highest_bit(uint64_t bits) {
    int at = 0;
    while (bits >>= 1) at++;
    return at;
}
#endif

/* How many executions stand before a slot. */
static inline i64 count_before(const uint64_t *taken, const int32_t *before, i64 slot) {
    return before[slot >> WORD] + ones(taken[slot >> WORD] & (((uint64_t)1 << (slot & 63)) - 1));
}

static inline i64 rank_of(const Bench *b, i64 slot) { return count_before(b->taken, b->before, slot); }

/* The running sum of prices before a slot, of when they were set. */
static inline double price_before(const Bench *b, i64 slot) {
    return b->price[count_before(b->priced_taken, b->priced_before, slot)];
}

/* Executions of blocks before one. */
static inline i64 block_rank(const Bench *b, i64 block) { return b->before[block << (b->block_shift - WORD)]; }

static inline i64 blocks(const Bench *b) { return b->words >> (b->block_shift - WORD); }

static inline int is_read(const Bench *b, int32_t event) { return event >= 0 && !b->event[event].write; }

/* The first event of what the execution at a slot makes; those of what it reads stand before it. */
static inline int32_t first_output(const Bench *b, i64 slot) {
    i64 op = b->op_at[slot];
    return b->first[slot] + (int32_t)(b->g.in_ptr[op + 1] - b->g.in_ptr[op]);
}

/* memory.c */
void arrange(Bench *b, const i64 *change);
void open_slot(Bench *b, i64 slot, i64 memory);
void close_slot(Bench *b, i64 slot);
i64 taken_from(const Bench *b, i64 slot);
i64 taken_before(const Bench *b, i64 slot);
int around(const Bench *b, i64 *slot, i64 *seen);
i64 slot_of(const Bench *b, i64 rank);
i64 memory_at(const Bench *b, i64 slot);
void add(Bench *b, i64 start, i64 stop, i64 size);
i64 most(const Bench *b, i64 start, i64 stop);
i64 peak(const Bench *b);
i64 fullest(const Bench *b);

/* schedule.c */
int load(Bench *b, const i64 *order, i64 length, i64 split);
i64 unload(const Bench *b, i64 *order);
int respace(Bench *b);
int32_t last_before(const Bench *b, i64 value, i64 slot);
int held(const Bench *b, i64 value, int32_t event);
void begin(Bench *b);
void undo_to(Bench *b, i64 mark);
int has_previous(const Bench *b, i64 slot);
void retain(Bench *b, i64 slot);
i64 missing(Bench *b, i64 value, i64 reader, double stretch);
int drop(Bench *b, i64 count, i64 reader);
int shift(Bench *b, i64 slot, i64 wanted);

/* deletion.c */
int consider(Bench *b, i64 slot, i64 budget, double *saved_s);

/* polish.c */
int spend(Bench *b, i64 budget, i64 rounds, double noise);
double excess(const Bench *b, i64 target);
int descend(Bench *b, i64 target, i64 rounds, double noise, double stretch, int may_respace);
void settle(Bench *b, i64 budget, i64 slot, i64 count);
void sort_by_worth(Bench *b, i64 count);
double uniform(Bench *b);

#endif
