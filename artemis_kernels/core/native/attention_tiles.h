/* Queries by eights: a tile of rows meets the keys, or the values, in panels. */

#ifndef ARTEMIS_ATTENTION_TILES_H
#define ARTEMIS_ATTENTION_TILES_H

#include "attention_rows.h"
#include "bf16_panels.h"

#define TOGETHER 4      /* heads that a thread claims at a time: it knows which comes next, */
#define MOST_AHEAD 4096 /* and fetches what that one touches, up to so many lines of memory */

/* All of a head's rows in panels: each of them a column, or one after the other. */
static void pack_head(const Heads *x, int64_t b, int64_t h, int64_t rows, int by_output,
                      NUMBER *panels) {
    Weight w = {row_of(x, b, h, 0), x->row, by_output ? x->size : rows,
                by_output ? rows : x->size, by_output};
    pack(&w, (Part){0, w.n, 0, w.k}, panels);
}

/* out[8, pitch] = rows·panels, of so many columns, k products each. */
static void multiply_rows(const NUMBER *const *rows, const NUMBER *panels, int64_t panel_size,
                          int64_t columns, int64_t k, float *out, int64_t pitch, Ahead *ahead) {
    for (int64_t c = 0; c < columns; c += PANEL) {
        Tile tile;
        multiply(rows, panels + c / PANEL * panel_size, k, 0, &tile, ahead);
        for (int i = 0; i < TILE_ROWS; ++i) {
            _mm512_storeu_ps(out + i * pitch + c, tile.sums[i][0]);
            _mm512_storeu_ps(out + i * pitch + c + 16, tile.sums[i][1]);
        }
    }
}

static void to_numbers(const float *from, int64_t count, NUMBER *to) {
    for (int64_t j = 0; j < count; j += 16)
        store_bf16(to + j, first_of(count - j), _mm512_loadu_ps(from + j));
}

/* A tile's queries, from `top` on, and the keys that the last of them may see. */
typedef struct {
    int64_t top, count, keys;
    int64_t number[TILE_ROWS]; /* of each; beyond the last, that one again */
} Eight;

static Eight eight_of(const Attention *a, int64_t top, int64_t last) {
    Eight e = {top, smaller(last - top, TILE_ROWS), a->keys, {0}};
    if (a->sight.causal) e.keys = smaller(top + e.count, a->keys);
    for (int i = 0; i < TILE_ROWS; ++i) e.number[i] = top + (i < e.count ? i : e.count - 1);
    return e;
}

static int64_t claimed(int64_t tasks, int threads) { /* few are shared out one by one */
    return tasks < 4 * TOGETHER * threads ? 1 : TOGETHER;
}

/* A head's rows as lines to be fetched. They lie too far apart for a processor to foresee them, and
   waiting for them takes a third of a head's time. */
static Ahead lines_of(const Heads *x, int64_t b, int64_t h, int64_t rows) {
    int64_t of_row = parts_of(x->size, OF_LINE);
    return (Ahead){.row = (const char *)row_of(x, b, h, 0),
                   .pitch = x->row * (int64_t)sizeof(NUMBER), .of_row = of_row,
                   .left = rows * of_row, .calls = 1};
}

/* Some lines after the others, spread over a head's products: of each query and key `sizes`. */
static void in_turn(const Attention *a, Ahead *some, int count, int64_t sizes) {
    int64_t products = a->queries * a->keys * sizes;
    for (int i = 0; i < count && some->each + some[i].left <= MOST_AHEAD; ++i) {
        some->each += some[i].left;
        if (i) some[i - 1].then = some + i;
    }
    if (a->sight.causal) products /= 2;
    some->calls = products / (TILE_ROWS * PANEL * FETCHED) + 1;
}

/* A head's rows of eight queries, copied to `to` [8, size]: as models lay them out, they may all
   fall into a few sets of the first-level cache. */
static void take_rows(const Heads *x, int64_t b, int64_t h, const Eight *e, NUMBER *to,
                      const NUMBER **rows) {
    for (int i = 0; i < TILE_ROWS; ++i, to += x->size)
        rows[i] = memcpy(to, row_of(x, b, h, e->number[i]), sizeof(NUMBER) * (size_t)x->size);
}

#endif
