/* Matrix products by panels: what those over an int8 and over a bf16 weight share.

   One copy of a weight serves both directions: stored [n, k] (forward), or [k, n] (dX). Either way
   a task owns some columns of y. It packs their numbers into panels of 32 columns, as many of a
   column side by side as the dot product instruction takes, and passes over all rows, eight at a
   time. Of long columns it does so by chunks, so that rows and panels stay in the caches.

   Meanwhile the numbers that are packed next are on their way from memory, a line at a time: a core
   that waits for them loses a quarter of its time at 128 rows.

   To be included after a definition of

       NUMBER                  what x and the weight hold
       SUMS, ZERO              sixteen sums, and what they start from
       DOT(sums, packed, x)    the sums with the products of a quad of x and sixteen packed quads
       FLIPPED                 bits of each byte of the weight that are flipped where it is packed */

#include <stdlib.h>

#include "tile.h"

#define LINE 64                                 /* bytes of memory that come together */
#define OF_LINE (LINE / (int64_t)sizeof(NUMBER))
#define QUAD (4 / (int64_t)sizeof(NUMBER))      /* numbers of a column side by side */
#define LONGEST (4096 / (int64_t)sizeof(NUMBER)) /* chunk of a column */
#define FEW_ROWS 256

typedef struct {
    const NUMBER *data; /* [n, k], or [k, n] */
    int64_t k, n;
    int by_output; /* whether it is [n, k] */
} Weight;

typedef struct { /* of TILE_ROWS rows by PANEL columns */
    SUMS sums[TILE_ROWS][2];
} Tile;

/* Takes a tile: its rows, of which `count` count, and columns from `first` on, that are `within`. */
typedef void Finish(const void *with, const int64_t *rows, int count, int64_t first,
                    const __mmask16 *within, const Tile *tile);

typedef struct {
    const NUMBER *x; /* [m, k] */
    int64_t m;
    Weight w;
    Finish *finish;
    const void *with;
    int64_t tasks, lines; /* that share out so many lines of columns */
    int64_t chunks, chunk; /* of a column, and numbers of one */
    int64_t claimed;       /* tasks, by all threads */
} Product;

/* Numbers `from` to `to` of columns `first` to `last`: what is packed, and multiplied, at a time. */
typedef struct {
    int64_t first, last, from, to;
} Part;

/* The lines of a part that are still to be fetched: `each` in `calls` calls. */
typedef struct {
    const char *row;
    int64_t pitch, of_row, at; /* bytes to the next row, its lines, the next of them */
    int64_t left, each, calls, credit;
} Ahead;

static Product product_of(const NUMBER *x, int64_t m, Weight w, Finish *finish, const void *with,
                          int threads) {
    int64_t lines = parts_of(w.n, OF_LINE);
    /* The more columns, the fewer times x is read; but what comes first, no one fetched ahead. */
    int64_t columns = m <= FEW_ROWS ? 64 : 128;
    int64_t tasks = parts_of(parts_of(w.n, columns), threads) * threads;
    int64_t chunks = parts_of(w.k, LONGEST);
    int64_t chunk = parts_of(parts_of(w.k, chunks), OF_LINE) * OF_LINE;
    return (Product){x, m, w, finish, with, smaller(tasks, lines), lines, chunks, chunk, 0};
}

static Part part_of(const Product *p, int64_t task, int64_t chunk) {
    if (task >= p->tasks) return (Part){0, 0, 0, 0};
    return (Part){
        p->lines * task / p->tasks * OF_LINE,
        smaller(p->lines * (task + 1) / p->tasks * OF_LINE, p->w.n),
        smaller(chunk * p->chunk, p->w.k),
        smaller((chunk + 1) * p->chunk, p->w.k),
    };
}

static Ahead ahead_of(const Weight *w, Part part, int64_t calls) {
    int64_t columns = part.last - part.first, numbers = part.to - part.from;
    int64_t rows = w->by_output ? columns : numbers, wide = w->by_output ? numbers : columns;
    int64_t pitch = w->by_output ? w->k : w->n, of_row = parts_of(wide, OF_LINE);
    const NUMBER *row =
        w->data + (w->by_output ? part.first * pitch + part.from : part.from * pitch + part.first);
    int64_t lines = rows * of_row;
    return (Ahead){(const char *)row, pitch * (int64_t)sizeof(NUMBER), of_row, 0, lines, lines,
                   calls, 0};
}

static inline void fetch(Ahead *a) {
    for (a->credit += a->each; a->credit >= a->calls && a->left; a->credit -= a->calls, --a->left) {
        __builtin_prefetch(a->row + a->at * LINE, 0, 2);
        if (++a->at == a->of_row) a->at = 0, a->row += a->pitch;
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
                lines[j] = _mm512_maskz_loadu_epi32(within, w->data + n * w->k + c);
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
    for (; part.first < last; part.first += step, panels += step * (part.to - part.from)) {
        int64_t bytes = (last - part.first) * (int64_t)sizeof(NUMBER);
        if (w->by_output) pack_by_output(w, part, panels);
        else pack_by_input(w, part, bytes >= LINE ? ~0ull : (1ull << bytes) - 1, panels);
    }
}

#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

/* tile (+)= rows·panel over k numbers. Sums have names, and a function of their own, so that
   compilers keep all of them in registers. */
__attribute__((noinline)) static void multiply(const NUMBER *const *rows, const NUMBER *panel,
                                               int64_t k, int adds, Tile *tile, Ahead *ahead) {
#define START(i)                                                                                  \
    const NUMBER *row##i = rows[i];                                                               \
    SUMS left##i = adds ? tile->sums[i][0] : ZERO, right##i = adds ? tile->sums[i][1] : ZERO;
#define ADD(i)                                                                                    \
    memcpy(&quad, row##i + c, sizeof quad);                                                       \
    x = _mm512_set1_epi32(quad);                                                                  \
    left##i = DOT(left##i, left, x);                                                              \
    right##i = DOT(right##i, right, x);
#define STORE(i) tile->sums[i][0] = left##i, tile->sums[i][1] = right##i;
    EACH_ROW(START)
    for (int64_t line = 0; line < k; line += OF_LINE) {
        for (int64_t c = line, end = smaller(line + OF_LINE, k); c < end; c += QUAD) {
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

/* The sums of a part, in `tiles`, and `next` on its way; the last chunk's go to `finish`. */
static void multiply_part(const Product *p, Part part, Part next, const NUMBER *panels,
                          Tile *tiles) {
    int64_t k = part.to - part.from, starts = part.from == 0, ends = part.to == p->w.k;
    int64_t columns = parts_of(part.last - part.first, PANEL);
    int64_t calls = parts_of(p->m, TILE_ROWS) * columns * parts_of(k, OF_LINE);
    Ahead ahead = ahead_of(&p->w, next, calls);
    for (int64_t top = 0; top < p->m; top += TILE_ROWS) {
        int count = (int)smaller(p->m - top, TILE_ROWS);
        int64_t rows[TILE_ROWS]; /* beyond the last, that one again */
        const NUMBER *of_x[TILE_ROWS];
        for (int i = 0; i < TILE_ROWS; ++i) {
            rows[i] = top + (i < count ? i : count - 1);
            of_x[i] = p->x + rows[i] * p->w.k + part.from;
        }
        for (int64_t c = 0; c < columns; ++c) {
            Tile *tile = starts && ends ? tiles : tiles + top / TILE_ROWS * columns + c;
            int64_t first = part.first + c * PANEL, left = part.last - first;
            uint32_t exist = left < PANEL ? (1u << left) - 1 : ~0u;
            multiply(of_x, panels + c * PANEL * k, k, !starts, tile, &ahead);
            if (!ends) continue;
            __mmask16 within[2] = {(__mmask16)exist, (__mmask16)(exist >> 16)};
            p->finish(p->with, rows, count, first, within, tile);
        }
    }
}

static int64_t claim(Product *p) {
    int64_t mine;
    _Pragma("omp atomic capture") mine = p->claimed++;
    return mine;
}

/* A thread's share of the product: every thread of a parallel region calls it. */
static void multiply_by_panels(Product *p) {
    int64_t columns = parts_of(p->lines, p->tasks) * OF_LINE;
    int64_t held = p->chunks == 1 ? 1 : parts_of(p->m, TILE_ROWS) * parts_of(columns, PANEL);
    NUMBER *panels = aligned_alloc(LINE, LINE * (size_t)(p->chunk * columns / OF_LINE));
    Tile *tiles = aligned_alloc(LINE, sizeof(Tile) * (size_t)held);
    for (int64_t task = claim(p), after; task < p->tasks; task = after) {
        after = claim(p);
        for (int64_t c = 0; c < p->chunks; ++c) {
            Part part = part_of(p, task, c);
            int ends = part.to == p->w.k;
            pack(&p->w, part, panels);
            multiply_part(p, part, part_of(p, ends ? after : task, ends ? 0 : c + 1), panels, tiles);
            if (ends) break;
        }
    }
    free(tiles);
    free(panels);
}
