/* Queries by eights: a tile of rows meets the keys, or the values, in panels. */

#ifndef ARTEMIS_ATTENTION_TILES_H
#define ARTEMIS_ATTENTION_TILES_H

#include "attention_rows.h"
#include "bf16_panels.h"

/* All of a head's rows in panels: each of them a column, or one after the other. */
static void pack_head(const Heads *x, int64_t b, int64_t h, int64_t rows, int by_output,
                      NUMBER *panels) {
    Weight w = {row_of(x, b, h, 0), x->row, by_output ? x->size : rows,
                by_output ? rows : x->size, by_output};
    pack(&w, (Part){0, w.n, 0, w.k}, panels);
}

/* out[8, pitch] = rows·panels, of so many columns, k products each. */
static void multiply_rows(const NUMBER *const *rows, const NUMBER *panels, int64_t panel_size,
                          int64_t columns, int64_t k, float *out, int64_t pitch) {
    Ahead nothing = {0};
    nothing.calls = 1;
    for (int64_t c = 0; c < columns; c += PANEL) {
        Tile tile;
        multiply(rows, panels + c / PANEL * panel_size, k, 0, &tile, &nothing);
        for (int i = 0; i < TILE_ROWS; ++i) {
            _mm512_storeu_ps(out + i * pitch + c, tile.sums[i][0]);
            _mm512_storeu_ps(out + i * pitch + c + 16, tile.sums[i][1]);
        }
    }
}

static void to_numbers(const float *from, int64_t count, NUMBER *to) {
    for (int64_t j = 0; j < count; j += 16)
        store_bf16(to + j, (__mmask16)(count - j >= 16 ? 0xffff : (1 << (count - j)) - 1),
                   _mm512_loadu_ps(from + j));
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

static void point_at(const Heads *x, int64_t b, int64_t h, const Eight *e, const NUMBER **rows) {
    for (int i = 0; i < TILE_ROWS; ++i) rows[i] = row_of(x, b, h, e->number[i]);
}

#endif
