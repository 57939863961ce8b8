/* The program over the stack of a join network; the recurrence and its meaning stand in `solve/join.py`. */

#include "kernel.h"

#include <math.h>
#include <stddef.h>

#define MOST_TOWERS 8
#define ROUNDING 1e-9   /* relative, more than that of any sum of times */

typedef struct {
    i64 count, longest, slots, slot_bytes, base, states;   /* towers, stages of the longest, .. */
    const i64 *length, *stride;                            /* per tower */
    const double *forward_s, *backward_s;                  /* [count, longest] */
    const i64 *value, *held, *saved, *transit, *saving, *backward;   /* [count, longest + 1], bytes */
    const double *piece_s;             /* [count, longest, longest, slots + 1]: rotor's tables */
    const double *head_s;              /* [slots + 1] */
    double *cost;                      /* [states, slots + 1]: the rest of the step, by free slots */
    i64 *least;                        /* [states]: free slots that some schedule needs */
} Join;

/* One entry of the stack: a stage saved (stop == start), or a value kept and stages up to stop passed. */
typedef struct { i64 tower, start, stop, room, after, taken; } Piece;

/* What is in memory in a state: values reached by the towers, gradients when the backward is here again;
   and the time that the rest of the step takes when nothing is run twice. */
typedef struct { i64 reached[MOST_TOWERS], values, gradients; double once; } State;

static i64 most_of(i64 a, i64 b) { return a > b ? a : b; }
static i64 slots_of(const Join *j, i64 bytes) { return (bytes + j->slot_bytes - 1) / j->slot_bytes; }

static int decode(const Join *j, i64 state, State *s) {
    int possible = 1;
    s->values = 0;
    s->gradients = j->base;
    s->once = j->head_s[j->slots];
    for (i64 t = 0; t < j->count; t++) {
        i64 at = state / j->stride[t] % (j->length[t] + 1), flagged = state >> t & 1;
        s->reached[t] = at;
        s->gradients += j->held[t * (j->longest + 1) + at];
        if (!flagged) s->values += j->value[t * (j->longest + 1) + at];
        for (i64 i = t * j->longest + at; i < t * j->longest + j->length[t]; i++)
            s->once += j->forward_s[i] + j->backward_s[i];
        if (flagged && s->reached[t] == 0) possible = 0;   /* nobody saves a stage that makes an input */
    }
    return possible;
}

static i64 relax_end(const Join *j, const State *s, i64 from, i64 to, double *best) {
    i64 taken = slots_of(j, s->values);
    for (i64 m = most_of(from, taken); m <= to; m++) best[m - from] = j->head_s[m - taken];
    return taken;
}

/* Lower best[m - from] for from <= m <= to free slots; where `piece` is asked for, write the one that did. */
static void relax(const Join *j, i64 state, const State *s, i64 from, i64 to, double *best, Piece *piece) {
    i64 wide = j->longest + 1, width = j->slots + 1;
    for (i64 t = 0; t < j->count; t++) {
        i64 start = s->reached[t], flagged = state >> t & 1, at = t * wide + start, time_at = t * j->longest + start;
        if (start == j->length[t]) continue;
        i64 own = flagged ? 0 : j->value[at], others = s->values - own, beside = s->gradients - j->held[at];
        i64 kept = slots_of(j, own), plain = state - (flagged << t);
        double before = best[0];

        /* Save stage `start`. */
        i64 extra = slots_of(j, j->saved[at]), after = plain + j->stride[t] + ((i64)1 << t);
        i64 need = most_of(slots_of(j, others + j->saving[at]), extra + slots_of(j, beside + j->backward[at]));
        double time_s = j->forward_s[time_at] + j->backward_s[time_at];
        const double *rest = j->cost + after * width;
        for (i64 m = most_of(from, kept + most_of(need, extra + j->least[after])); m <= to; m++) {
            double value = time_s + rest[m - kept - extra];
            best[m - from] = value < best[m - from] ? value : best[m - from];
        }
        if (piece && best[0] < before) *piece = (Piece){t, start, start, 0, after, kept + extra};

        /* Keep the value reached and pass stages start .. stop-1. */
        i64 rise = 0, gap = slots_of(j, beside), high = to;   /* above it nothing is gained, as in rotor.c */
        double passed = 0.0;
        for (i64 stop = start + 1; stop <= j->length[t]; stop++) {
            i64 stage = stop - 1, stage_at = t * wide + stage;
            passed += j->forward_s[t * j->longest + stage];
            while (high >= from && best[high - from] < (s->once + passed) * (1 - ROUNDING)) high--;
            if (high < from) break;
            rise = most_of(rise, j->transit[stage_at] + (stage > start ? j->value[stage_at] : 0));
            need = most_of(slots_of(j, others + rise), gap);
            after = plain + j->stride[t] * (stop - start);
            rest = j->cost + after * width;
            const double *row = j->piece_s + ((t * j->longest + start) * j->longest + stage) * width;
            before = best[0];
            for (i64 m = most_of(from, kept + most_of(need, j->least[after])); m <= high; m++) {
                double value = passed + row[m - kept - gap] + rest[m - kept];
                best[m - from] = value < best[m - from] ? value : best[m - from];
            }
            if (piece && best[0] < before) *piece = (Piece){t, start, stop, from - kept - gap, after, kept};
        }
    }
}

static int ends(const Join *j, const State *s) {
    for (i64 t = 0; t < j->count; t++)
        if (s->reached[t] < j->length[t]) return 0;
    return 1;
}

/* Fill the tables, from the states where every tower is done. O(states x slots x sum of lengths). */
void join_fill(const Join *j) {
    for (i64 state = j->states - 1; state >= 0; state--) {
        State s;
        double *best = j->cost + state * (j->slots + 1);
        i64 m = 0;
        j->least[state] = j->slots + 1;
        if (!decode(j, state, &s)) continue;
        for (i64 at = 0; at <= j->slots; at++) best[at] = HUGE_VAL;
        if (ends(j, &s)) relax_end(j, &s, 0, j->slots, best);
        else relax(j, state, &s, 0, j->slots, best, NULL);
        while (m <= j->slots && best[m] == HUGE_VAL) m++;
        j->least[state] = m;
    }
}

/* Write the stack of the fastest schedule in a number of slots, from its bottom, as rows (tower, start,
   stop, slots for reversing the piece), then those for the head alone. There is room for one row more than
   all towers have stages. Returns how many pieces there are, -1 if nothing fits. */
i64 join_pieces(const Join *j, i64 slots, i64 *rows) {
    i64 count = 0, state = 0;
    for (;;) {
        State s;
        double best = HUGE_VAL;
        decode(j, state, &s);
        if (ends(j, &s)) {
            rows[4 * count] = slots - relax_end(j, &s, slots, slots, &best);
            return best < HUGE_VAL ? count : -1;
        }
        Piece piece;
        relax(j, state, &s, slots, slots, &best, &piece);
        if (best == HUGE_VAL) return -1;
        i64 *row = rows + 4 * count++;
        row[0] = piece.tower, row[1] = piece.start, row[2] = piece.stop, row[3] = piece.room;
        state = piece.after;
        slots -= piece.taken;
    }
}
