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

#define SPACING 8                   /* least slots per execution when a schedule is laid out */
#define WIDENINGS 2                 /* how often they may be doubled */
#define PINS 8                      /* gaps that a move can keep shut */
#define FREE_SLOT ((i64)1 << 61)    /* subtracted from the memory of a free slot: it is never the peak */
#define END_SLOT ((i64)1 << 60)     /* the slot of a reader that never lets go */
#define LEAST_SHIFT 5               /* of blocks of the memory profile, see `block_shift` */

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
    double makespan_s;
    int32_t *op_at;                /* per slot: op or -1 */
    int32_t *first;                /* per slot: first event of its execution */
    i64 *memory, *block_max, *block_add;
    Event *event;
    int32_t *head, *tail;          /* per value */
    int32_t *log_op;               /* op inserted, or -1 - op removed */
    int32_t *log_first;
    i64 *log_slot;
    Range *range;                  /* what the present move changes */
    int32_t *mark, *needed;        /* per op, for `missing` */
    double *price;                 /* per slot, running sum; also excess */
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

static inline i64 memory_at(const Bench *b, i64 slot) { return b->memory[slot] + b->block_add[slot >> b->block_shift]; }

static inline int is_read(const Bench *b, int32_t event) { return event >= 0 && !b->event[event].write; }

/* schedule.c */
int load(Bench *b, const i64 *order, i64 length, i64 split);
i64 unload(const Bench *b, i64 *order);
int respace(Bench *b);
i64 most(const Bench *b, i64 start, i64 stop);
i64 peak(const Bench *b);
int32_t last_before(const Bench *b, i64 value, i64 slot);
int held(const Bench *b, i64 value, int32_t event);
void begin(Bench *b);
void undo_to(Bench *b, i64 mark);
int has_previous(const Bench *b, i64 slot);
void retain(Bench *b, i64 slot);
i64 missing(Bench *b, i64 value, i64 reader, double stretch);
int drop(Bench *b, i64 count, i64 reader);
int shift(Bench *b, i64 slot, i64 wanted);

/* polish.c */
int spend(Bench *b, i64 budget, i64 rounds, double noise);
double excess(const Bench *b, i64 target);
int descend(Bench *b, i64 target, i64 rounds, double noise, double stretch, int may_respace);
void settle(Bench *b, i64 budget, i64 slot, i64 count);
void sort_by_worth(Bench *b, i64 count);
double uniform(Bench *b);

#endif
