/* Matrix products by panels: what those over an int8 and over a bf16 weight share.

   One copy of a weight serves both directions: stored [n, k] (forward), or [k, n] (dX). Either way
   a task owns some columns of y. It packs their numbers into panels and passes over all rows. Of
   long columns it does so by chunks, so that rows and panels stay in the caches.

   Meanwhile the numbers that are packed next are on their way from memory, a line at a time: a core
   that waits for them loses a quarter of its time at 128 rows. */

#include "panels.h"

#define LONGEST (4096 / (int64_t)sizeof(NUMBER)) /* chunk of a column */
#define FEW_ROWS 256

/* Takes a tile: its rows, of which `count` count, and columns from `first` on, that are `within`. */
typedef void Finish(const void *with, const int64_t *rows, int count, int64_t first,
                    const __mmask16 *within, const Tile *tile);

/* Looks at a part that was packed. */
typedef void Look(const void *with, Part part, const NUMBER *panels);

typedef struct {
    const NUMBER *x; /* [m, k] */
    int64_t m;
    Weight w;
    Finish *finish;
    Look *look; /* or NULL */
    const void *with;
    int64_t tasks, lines; /* that share out so many lines of columns */
    int64_t chunks, chunk; /* of a column, and numbers of one */
    int64_t claimed;       /* tasks, by all threads */
} Product;

static Product product_of(const NUMBER *x, int64_t m, Weight w, Finish *finish, Look *look,
                          const void *with, int threads) {
    int64_t lines = parts_of(w.n, OF_LINE);
    /* The more columns, the fewer times x is read; but what comes first, no one fetched ahead. */
    int64_t columns = m <= FEW_ROWS ? 64 : 128;
    int64_t tasks = parts_of(parts_of(w.n, columns), threads) * threads;
    int64_t chunks = parts_of(w.k, LONGEST);
    int64_t chunk = parts_of(parts_of(w.k, chunks), OF_LINE) * OF_LINE;
    return (Product){x, m, w, finish, look, with, smaller(tasks, lines), lines, chunks, chunk, 0};
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

/* The sums of a part, in `tiles`, and `next` on its way; the last chunk's go to `finish`. */
static void multiply_part(const Product *p, Part part, Part next, const NUMBER *panels,
                          Tile *tiles) {
    int64_t k = part.to - part.from, starts = part.from == 0, ends = part.to == p->w.k;
    int64_t columns = parts_of(part.last - part.first, PANEL);
    int64_t calls = parts_of(p->m, TILE_ROWS) * columns * parts_of(k, FETCHED);
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
            if (p->look) p->look(p->with, part, panels);
            multiply_part(p, part, part_of(p, ends ? after : task, ends ? 0 : c + 1), panels, tiles);
            if (ends) break;
        }
    }
    free(tiles);
    free(panels);
}
