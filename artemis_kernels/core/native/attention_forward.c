/* Attention forward: eight queries at a time meet the keys that they may see. A task is a head and
   some of its queries; p is rounded to bf16 where it is multiplied again. */

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include "attention_tiles.h"

const int artemis_has_attention = 1;

#define TASK 256 /* queries, where heads alone are too few tasks */

static void forward_rows(const Attention *a, int64_t b, int64_t h, int64_t first, int64_t last,
                         const NUMBER *keys, const NUMBER *values, float *s, NUMBER *p,
                         NUMBER *queries, uint16_t *y, Ahead *ahead) {
    int64_t pitch = up_to(a->keys, PANEL), E = a->v.size;
    int64_t of_value = up_to(a->keys, 2) * PANEL;
    for (int64_t top = first; top < last; top += TILE_ROWS) {
        const NUMBER *rows[TILE_ROWS];
        float inverse[TILE_ROWS];
        Eight e = eight_of(a, top, last);
        take_rows(&a->q, b, h, &e, queries, rows);
        multiply_rows(rows, keys, a->q.size * PANEL, e.keys, a->q.size, s, pitch, ahead);
        for (int i = 0; i < e.count; ++i) {
            float *row = s + i * pitch;
            int64_t n = weigh(a, b, h, top + i, e.keys, row, inverse + i);
            memset(row + n, 0, sizeof(float) * (size_t)(up_to(e.keys, PANEL) - n));
            to_numbers(row, up_to(e.keys, 2), p + i * pitch);
        }
        for (int i = 0; i < TILE_ROWS; ++i) rows[i] = p + (i < e.count ? i : e.count - 1) * pitch;
        for (int64_t c = 0; c < E; c += PANEL) {
            float out[TILE_ROWS * PANEL];
            multiply_rows(rows, values + c / PANEL * of_value, 0, PANEL, up_to(e.keys, 2), out,
                          PANEL, ahead);
            for (int i = 0; i < e.count; ++i) {
                float *line = out + i * PANEL;
                for (int64_t j = 0; j < PANEL; ++j) line[j] *= inverse[i];
                to_numbers(line, smaller(E - c, PANEL),
                           y + ((b * a->queries + top + i) * a->heads + h) * E + c);
            }
        }
    }
}

/* What a head reads and writes. */
static void fetched_for(const Attention *a, int64_t b, int64_t h, const uint16_t *y, Ahead *some) {
    int64_t T = a->queries, S = a->keys, g = h / (a->heads / a->groups);
    Heads to = in_rows(y, T, a->heads, a->v.size);
    some[0] = lines_of(&a->k, b, g, S), some[1] = lines_of(&a->v, b, g, S);
    some[2] = lines_of(&a->q, b, h, T), some[3] = lines_of(&to, b, h, T);
    in_turn(a, some, 4, a->q.size + a->v.size);
}

/* y [B, T, H, E] and kept, for q [B, H, T, D], k [B, G, S, D] and v [B, G, S, E]. */
void artemis_attention_forward(HEADS(q), HEADS(k), HEADS(v), uint16_t *y, float *kept, int64_t B,
                               int64_t H, int64_t G, int64_t T, int64_t S, int64_t D, int64_t E,
                               const uint8_t *mask, int64_t mask_batch, int64_t mask_query,
                               int causal, float scale, int threads) {
    const Attention a = {OF(q, D), OF(k, D), OF(v, E), {0}, T, S, H, G,
                         {S, mask, mask_batch, mask_query, causal}, scale, kept, B * H};
    int64_t parts = parts_of(2 * threads, B * H), most = parts_of(T, TASK);
    parts = smaller(parts, most > 0 ? most : 1);
    int64_t all = B * H * parts, each = up_to(parts_of(T, parts), TILE_ROWS);
    _Pragma("omp parallel num_threads(threads) if (B * H * T * S * (D + E) > 65536)")
    {
        NUMBER *keys = room(sizeof(NUMBER) * up_to(S, PANEL) * D);
        NUMBER *values = room(sizeof(NUMBER) * up_to(E, PANEL) * up_to(S, 2));
        float *s = room(sizeof(float) * TILE_ROWS * up_to(S, PANEL));
        NUMBER *p = room(sizeof(NUMBER) * TILE_ROWS * up_to(S, PANEL));
        NUMBER *queries = room(sizeof(NUMBER) * TILE_ROWS * D);
        _Pragma("omp for schedule(dynamic, claimed(all, threads))")
        for (int64_t task = 0; task < all; ++task) {
            int64_t b = task / parts / H, h = task / parts % H, first = task % parts * each;
            int64_t last = smaller(first + each, T);
            if (first >= last) continue;
            Ahead some[4] = {{.calls = 1}};
            int64_t next = (task + 1) / parts;
            if (next < B * H && next != task / parts) fetched_for(&a, next / H, next % H, y, some);
            pack_head(&a.k, b, h / (H / G), S, 1, keys);
            pack_head(&a.v, b, h / (H / G), S, 0, values);
            forward_rows(&a, b, h, first, last, keys, values, s, p, queries, y, some);
        }
        free(queries), free(p), free(s), free(values), free(keys);
    }
}

#else
const int artemis_has_attention = 0;
#endif
