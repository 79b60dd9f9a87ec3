/* A weight in panels of 32 columns, and tiles of eight rows multiplied by one of them.

   A panel holds as many numbers of a column side by side as the dot product instruction takes, a
   quad. The weight lies stored [n, k] (by output), or [k, n] (by input).

   To be included after a definition of

       NUMBER                  what rows and weight hold
       SUMS, ZERO              sixteen sums, and what they start from
       DOT(sums, packed, x)    the sums with the products of a quad of x and sixteen packed quads
       FLIPPED                 bits of each byte of the weight that are flipped where it is packed */

#ifndef ARTEMIS_PANELS_H
#define ARTEMIS_PANELS_H

#include <stdlib.h>

#include "tile.h"

#define LINE 64 /* bytes of memory that come together */
#define OF_LINE (LINE / (int64_t)sizeof(NUMBER))
#define QUAD (4 / (int64_t)sizeof(NUMBER))
#define ROWS_AHEAD 16 /* that are asked for once more before they are packed, from a farther cache */
#define FETCHED (2 * OF_LINE) /* numbers that are multiplied between two fetches */

typedef struct {
    const NUMBER *data; /* [n, k], or [k, n], */
    int64_t pitch;      /* its rows so far apart */
    int64_t k, n;
    int by_output; /* whether it is [n, k] */
} Weight;

typedef struct { /* of TILE_ROWS rows by PANEL columns */
    SUMS sums[TILE_ROWS][2];
} Tile;

/* Numbers `from` to `to` of columns `first` to `last`: what is packed, and multiplied, at a time. */
typedef struct {
    int64_t first, last, from, to;
} Part;

/* Lines of memory that are still to be fetched, `each` in `calls` calls; and others after them. */
typedef struct Ahead {
    const char *row;
    int64_t pitch, of_row, at; /* bytes to the next row, its lines, the next of them */
    int64_t left, each, calls, credit;
    const struct Ahead *then; /* or NULL */
} Ahead;

static Ahead ahead_of(const Weight *w, Part part, int64_t calls) {
    int64_t columns = part.last - part.first, numbers = part.to - part.from;
    int64_t rows = w->by_output ? columns : numbers, wide = w->by_output ? numbers : columns;
    int64_t pitch = w->pitch, of_row = parts_of(wide, OF_LINE);
    const NUMBER *row =
        w->data + (w->by_output ? part.first * pitch + part.from : part.from * pitch + part.first);
    int64_t lines = rows * of_row;
    return (Ahead){(const char *)row, pitch * (int64_t)sizeof(NUMBER), of_row, 0, lines, lines,
                   calls, 0, NULL};
}

static void go_on(Ahead *a, const Ahead *then) {
    a->row = then->row, a->pitch = then->pitch, a->of_row = then->of_row;
    a->left = then->left, a->then = then->then;
}

static inline void fetch(Ahead *a) {
    for (a->credit += a->each; a->credit >= a->calls && a->left; a->credit -= a->calls) {
        __builtin_prefetch(a->row + a->at * LINE, 0, 2);
        if (++a->at == a->of_row) a->at = 0, a->row += a->pitch;
        if (!--a->left && a->then) go_on(a, a->then);
    }
}

/* panel[quads][32][QUAD] of the columns from part.first; columns beyond n repeat the last. */
static void pack_by_output(const Weight *w, Part part, NUMBER *panel) {
    const __m512i flipped = _mm512_set1_epi8((char)FLIPPED);
    for (int half = 0; half < 2; ++half)
        for (int64_t c = part.from; c < part.to; c += OF_LINE) {
            __m512i lines[16];
            int64_t quads = smaller(part.to - c, OF_LINE) / QUAD;
            for (int j = 0; j < 16; ++j) {
                int64_t n = smaller(part.first + 16 * half + j, w->n - 1);
                __mmask16 within = (__mmask16)((1u << quads) - 1);
                lines[j] = _mm512_maskz_loadu_epi32(within, w->data + n * w->pitch + c);
                lines[j] = _mm512_xor_si512(flipped, lines[j]);
            }
            transpose(lines);
            NUMBER *to = panel + (c - part.from) * PANEL + half * OF_LINE;
            for (int j = 0; j < quads; ++j) _mm512_store_si512(to + j * QUAD * PANEL, lines[j]);
        }
}

/* The same of a line of columns, of which `within` bytes exist: into one panel or two. */
static void pack_by_input(const Weight *w, Part part, __mmask64 within, NUMBER *panels);

static void pack(const Weight *w, Part part, NUMBER *panels) {
    int64_t step = w->by_output ? PANEL : OF_LINE, last = part.last;
    int64_t numbers = parts_of(part.to - part.from, QUAD) * QUAD;
    for (; part.first < last; part.first += step, panels += step * numbers) {
        int64_t bytes = (last - part.first) * (int64_t)sizeof(NUMBER);
        if (w->by_output) pack_by_output(w, part, panels);
        else pack_by_input(w, part, bytes >= LINE ? ~0ull : (1ull << bytes) - 1, panels);
    }
}

#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

/* tile (+)= rows·panel over k numbers; a row's quads are `step` numbers apart. Sums have names, so
   that compilers keep all of them in registers. */
static inline __attribute__((always_inline)) void multiply_apart(
    const NUMBER *const *rows, int64_t step, const NUMBER *panel, int64_t k, int adds, Tile *tile,
    Ahead *ahead) {
#define START(i)                                                                                  \
    const NUMBER *row##i = rows[i];                                                               \
    SUMS left##i = adds ? tile->sums[i][0] : ZERO, right##i = adds ? tile->sums[i][1] : ZERO;
#define ADD(i)                                                                                    \
    memcpy(&quad, row##i + at, sizeof quad);                                                       \
    x = _mm512_set1_epi32(quad);                                                                  \
    left##i = DOT(left##i, left, x);                                                              \
    right##i = DOT(right##i, right, x);
#define STORE(i) tile->sums[i][0] = left##i, tile->sums[i][1] = right##i;
    EACH_ROW(START)
    int64_t at = 0;
    for (int64_t line = 0; line < k; line += FETCHED) {
        for (int64_t c = line, end = smaller(line + FETCHED, k); c < end; c += QUAD, at += step) {
            __m512i left = _mm512_load_si512(panel + c * PANEL), x;
            __m512i right = _mm512_load_si512(panel + c * PANEL + OF_LINE);
            int32_t quad;
            EACH_ROW(ADD)
        }
        fetch(ahead);
    }
    EACH_ROW(STORE)
#undef START
#undef ADD
#undef STORE
}

/* A function of its own: inlined into another, the loop loses its registers. */
__attribute__((noinline)) static void multiply(const NUMBER *const *rows, const NUMBER *panel,
                                               int64_t k, int adds, Tile *tile, Ahead *ahead) {
    multiply_apart(rows, QUAD, panel, k, adds, tile, ahead);
}

#endif
