/* Attention backward: a task is the heads that share keys, since dK and dV are sums over them, 64
   queries at a time, with the ds of two queries side by side as the dot product instruction takes
   them. p and ds are rounded to bf16 where they are multiplied again. */

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include "attention_tiles.h"

#define BLOCK 64 /* queries whose p and ds are held at a time */

static float inner_of(const float *x, const float *y, int64_t count) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 16)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(x + j), _mm512_loadu_ps(y + j), sum);
    return _mm512_reduce_add_ps(sum);
}

/* Of rows that are columns of pairs; a function of its own, as `multiply` is. */
__attribute__((noinline)) static void multiply_pairs(const NUMBER *const *rows, int64_t step,
                                                     const NUMBER *panel, int64_t k, int adds,
                                                     Tile *tile, Ahead *ahead) {
    multiply_apart(rows, step, panel, k, adds, tile, ahead);
}

/* tiles[size / 8][columns / 32] (+)= pairsᵀ·panels, pairs[count / 2, size, 2]. */
static void add_transposed(const NUMBER *pairs, int64_t size, const NUMBER *panels,
                           int64_t columns, int64_t pitch, int64_t count, int adds, Tile *tiles,
                           Ahead *ahead) {
    for (int64_t top = 0; top < size; top += TILE_ROWS) {
        const NUMBER *rows[TILE_ROWS];
        for (int i = 0; i < TILE_ROWS; ++i) rows[i] = pairs + 2 * smaller(top + i, size - 1);
        for (int64_t c = 0; c < columns; c += PANEL)
            multiply_pairs(rows, 2 * size, panels + c * BLOCK, count, adds,
                           tiles + top / TILE_ROWS * pitch + c / PANEL, ahead);
    }
}

/* What a thread works in. */
typedef struct {
    NUMBER *keys, *values, *by_keys;  /* panels: k and v by output, k by input */
    NUMBER *queries, *dys;            /* of a block, two rows side by side */
    NUMBER *p, *ds;                   /* of a block, in panels by input */
    NUMBER *rows, *ds_rows;           /* of eight queries */
    float *s, *dp;                    /* likewise */
    Tile *dk, *dv;                    /* sums, transposed */
} Scratch;

/* Two rows of 32 columns side by side, for every panel of columns. */
static void pair_up(const float *one, const float *other, int64_t columns, NUMBER *panels) {
    for (int64_t c = 0; c < columns; c += PANEL, panels += PANEL * BLOCK) {
        __m512i left = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(one + c + 16),
                                                    _mm512_loadu_ps(one + c));
        __m512i right = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(other + c + 16),
                                                     _mm512_loadu_ps(other + c));
        interleave(left, right, panels);
    }
}

/* pairs[count / 2, size, 2] of rows `first` on; zeros after the last of an odd number. */
static void pair_rows(const Heads *x, int64_t b, int64_t h, int64_t first, int64_t count,
                      NUMBER *pairs) {
    for (int64_t i = 0; i < count; i += 2) {
        const NUMBER *one = row_of(x, b, h, first + i), *other = one + x->row;
        int alone = i + 1 == count;
        for (int64_t j = 0; j < x->size; ++j, pairs += 2)
            pairs[0] = one[j], pairs[1] = alone ? 0 : other[j];
    }
}

/* p and ds of eight queries, from `place` of their block on; dQ. */
static void backward_rows(const Attention *a, int64_t b, int64_t h, const Eight *e, int64_t place,
                          int64_t columns, const Scratch *w, uint16_t *dq, Ahead *ahead) {
    int64_t pitch = up_to(a->keys, PANEL), D = a->q.size, wide = up_to(columns, PANEL);
    const NUMBER *rows[TILE_ROWS];
    take_rows(&a->q, b, h, e, w->rows, rows);
    multiply_rows(rows, w->keys, D * PANEL, e->keys, D, w->s, pitch, ahead);
    take_rows(&a->dy, b, h, e, w->rows, rows);
    multiply_rows(rows, w->values, a->v.size * PANEL, e->keys, a->v.size, w->dp, pitch, ahead);
    for (int i = 0; i < TILE_ROWS; ++i) {
        float *p = w->s + i * pitch, *ds = w->dp + i * pitch;
        int64_t n = 0;
        if (i < e->count) {
            const float *kept =
                kept_of(a->kept, b * a->heads + h, e->top + i, a->queries, a->heads_in_all);
            float shift = kept[0] + kept[1], scale = a->scale;
            n = looked_at(a, b, e->top + i, e->keys, p);
            for (int64_t j = 0; j < 16; ++j) /* what is not seen may not be finite */
                ds[n - 16 + j] = p[n - 16 + j] == -INFINITY ? 0 : ds[n - 16 + j];
            _Pragma("omp simd")
            for (int64_t j = 0; j < n; ++j) p[j] = decay_f(p[j] - shift);
            float along = inner_of(p, ds, n);
            _Pragma("omp simd")
            for (int64_t j = 0; j < n; ++j) ds[j] = p[j] * (ds[j] - along) * scale;
        }
        memset(p + n, 0, sizeof(float) * (size_t)(wide - n));
        memset(ds + n, 0, sizeof(float) * (size_t)(wide - n));
        to_numbers(ds, up_to(e->keys, 2), w->ds_rows + i * pitch);
        rows[i] = w->ds_rows + i * pitch;
    }
    for (int i = 0; i < TILE_ROWS; i += 2) {
        pair_up(w->s + i * pitch, w->s + (i + 1) * pitch, wide, w->p + (place + i) * PANEL);
        pair_up(w->dp + i * pitch, w->dp + (i + 1) * pitch, wide, w->ds + (place + i) * PANEL);
    }
    for (int64_t c = 0; c < D; c += PANEL) {
        float out[TILE_ROWS * PANEL];
        multiply_rows(rows, w->by_keys + c * up_to(a->keys, 2), 0, PANEL, up_to(e->keys, 2), out,
                      PANEL, ahead);
        for (int i = 0; i < e->count; ++i)
            to_numbers(out + i * PANEL, smaller(D - c, PANEL),
                       dq + ((b * a->queries + e->top + i) * a->heads + h) * D + c);
    }
}

/* lines[j] = 16 sums of column first + j, from row d on, of the transposed [size, S]. */
static void sums_of(const Tile *tiles, int64_t size, int64_t panels, int64_t d, int64_t first,
                    __m512i *lines) {
    for (int i = 0; i < 16; ++i) {
        const Tile *tile = tiles + smaller(d + i, size - 1) / TILE_ROWS * panels + first / PANEL;
        lines[i] = _mm512_castps_si512(tile->sums[i % TILE_ROWS][first / 16 % 2]);
    }
    transpose(lines);
}

/* to[S, pitch] = the transposed sums [size, S], rounded, 32 at a time: whole lines of the cache,
   as rows far apart fall into few of its sets. */
static void store_transposed(const Tile *tiles, int64_t size, int64_t S, uint16_t *to,
                             int64_t pitch) {
    int64_t panels = parts_of(S, PANEL);
    for (int64_t first = 0; first < S; first += 16)
        for (int64_t d = 0; d < size; d += 32) {
            __m512i low[16], high[16];
            sums_of(tiles, size, panels, d, first, low);
            sums_of(tiles, size, panels, d + 16, first, high);
            for (int64_t j = 0; j < smaller(S - first, 16); ++j) {
                uint16_t *line = to + (first + j) * pitch + d;
                store_bf16(line, first_of(size - d), _mm512_castsi512_ps(low[j]));
                store_bf16(line + 16, first_of(size - d - 16), _mm512_castsi512_ps(high[j]));
            }
        }
}

typedef struct {
    uint16_t *dq, *dk, *dv;
} Gradients;

static void backward_group(const Attention *a, int64_t b, int64_t g, const Scratch *w,
                           const Gradients *to, Ahead *ahead) {
    int64_t S = a->keys, D = a->q.size, E = a->v.size, share = a->heads / a->groups;
    int64_t panels = parts_of(S, PANEL), adds = 0;
    pack_head(&a->k, b, g, S, 1, w->keys);
    pack_head(&a->k, b, g, S, 0, w->by_keys);
    pack_head(&a->v, b, g, S, 1, w->values);
    for (int64_t h = g * share; h < (g + 1) * share; ++h)
        /* The last block first: it sees all keys, and what it leaves is added to. */
        for (int64_t block = parts_of(a->queries, BLOCK) - 1; block >= 0; --block, adds = 1) {
            int64_t first = block * BLOCK, last = smaller(first + BLOCK, a->queries);
            int64_t count = up_to(last - first, 2), rows = last - first;
            int64_t columns = a->sight.causal ? smaller(last, S) : S;
            for (int64_t top = first; top < last; top += TILE_ROWS) {
                Eight e = eight_of(a, top, last);
                backward_rows(a, b, h, &e, top - first, columns, w, to->dq, ahead);
            }
            pair_rows(&a->q, b, h, first, rows, w->queries);
            pair_rows(&a->dy, b, h, first, rows, w->dys);
            add_transposed(w->queries, D, w->ds, columns, panels, count, (int)adds, w->dk, ahead);
            add_transposed(w->dys, E, w->p, columns, panels, count, (int)adds, w->dv, ahead);
        }
    store_transposed(w->dk, D, S, to->dk + (b * S * a->groups + g) * D, a->groups * D);
    store_transposed(w->dv, E, S, to->dv + (b * S * a->groups + g) * E, a->groups * E);
}

/* Heads as wide as `share` of them, which lie side by side; else the first of them stands for all. */
static Heads side_by_side(Heads x, int64_t share) {
    if (x.head == x.size) x.head *= share, x.size *= share;
    return x;
}

/* What a group reads and writes. */
static void fetched_for(const Attention *a, int64_t b, int64_t g, const Gradients *to,
                        Ahead *some) {
    int64_t T = a->queries, S = a->keys, G = a->groups, share = a->heads / G;
    const Heads all[] = {
        a->k, a->v, in_rows(to->dk, S, G, a->k.size), in_rows(to->dv, S, G, a->v.size),
        side_by_side(a->q, share), side_by_side(a->dy, share),
        side_by_side(in_rows(to->dq, T, a->heads, a->q.size), share),
    };
    for (int i = 0; i < 7; ++i) some[i] = lines_of(all + i, b, g, i < 4 ? S : T);
    in_turn(a, some, 7, (3 * a->q.size + 2 * a->v.size) * share);
}

/* dq [B, T, H, D], dk [B, S, G, D] and dv [B, S, G, E], for dy [B, H, T, E] and what forward kept.
   T is not 0. */
void artemis_attention_backward(HEADS(dy), HEADS(q), HEADS(k), HEADS(v), float *kept, uint16_t *dq,
                                uint16_t *dk, uint16_t *dv, int64_t B, int64_t H, int64_t G,
                                int64_t T, int64_t S, int64_t D, int64_t E, const uint8_t *mask,
                                int64_t mask_batch, int64_t mask_query, int causal, float scale,
                                int threads) {
    const Attention a = {OF(q, D), OF(k, D), OF(v, E), OF(dy, E), T, S, H, G,
                         {S, mask, mask_batch, mask_query, causal}, scale, kept, B * H};
    const Gradients to = {dq, dk, dv};
    int64_t wide = up_to(S, PANEL), tiles = wide / PANEL, all = B * G;
    _Pragma("omp parallel num_threads(threads) if (B * H * T * S * (D + E) > 65536)")
    {
        Scratch w = {
            room(sizeof(NUMBER) * wide * D), room(sizeof(NUMBER) * wide * E),
            room(sizeof(NUMBER) * up_to(D, PANEL) * up_to(S, 2)),
            room(sizeof(NUMBER) * BLOCK * D), room(sizeof(NUMBER) * BLOCK * E),
            room(sizeof(NUMBER) * BLOCK * wide), room(sizeof(NUMBER) * BLOCK * wide),
            room(sizeof(NUMBER) * TILE_ROWS * (D > E ? D : E)),
            room(sizeof(NUMBER) * TILE_ROWS * wide),
            room(sizeof(float) * TILE_ROWS * wide), room(sizeof(float) * TILE_ROWS * wide),
            room((int64_t)sizeof(Tile) * parts_of(D, TILE_ROWS) * tiles),
            room((int64_t)sizeof(Tile) * parts_of(E, TILE_ROWS) * tiles),
        };
        _Pragma("omp for schedule(dynamic, claimed(all, threads))")
        for (int64_t task = 0; task < all; ++task) {
            Ahead some[7] = {{.calls = 1}};
            if (task + 1 < all) fetched_for(&a, (task + 1) / G, (task + 1) % G, &to, some);
            backward_group(&a, task / G, task % G, &w, &to, some);
        }
        free(w.keys), free(w.values), free(w.by_keys), free(w.queries), free(w.dys);
        free(w.p), free(w.ds), free(w.rows), free(w.ds_rows), free(w.s), free(w.dp);
        free(w.dk), free(w.dv);
    }
}

#endif
