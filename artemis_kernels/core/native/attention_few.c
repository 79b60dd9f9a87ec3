/* Attention of few queries, as in decoding: keys and values are read as they lie, once for up to
   four queries of the heads that share them. A task is such heads; p stays in fp32. */

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include "attention_rows.h"

#define ROWS 4     /* at most, which meet a key together */
#define COLUMNS 64 /* of values, whose sums are held in registers */
#define INLINED static inline __attribute__((always_inline))

typedef struct { /* of heads that share keys; beyond the last, that one again */
    const uint16_t *q[ROWS];
    int64_t head[ROWS], query[ROWS];
} Few;

static Few few_of(const Attention *a, int64_t b, int64_t g, int64_t first, int64_t last) {
    Few few;
    for (int i = 0; i < ROWS; ++i) {
        int64_t row = smaller(first + i, last - 1);
        few.head[i] = g * (a->heads / a->groups) + row / a->queries;
        few.query[i] = row % a->queries;
        few.q[i] = row_of(&a->q, b, few.head[i], few.query[i]);
    }
    return few;
}

/* How many keys there are up to the last that any of the queries sees. */
static int64_t reach_of(const Attention *a, int64_t b, const Few *few, int rows) {
    int64_t most = 0;
    for (int i = 0; i < rows; ++i) {
        const uint8_t *mask;
        int64_t n = seen_by(&a->sight, b, few->query[i], &mask);
        if (mask)
            while (n > most && !mask[n - 1]) --n;
        most = n > most ? n : most;
    }
    return most;
}

/* s[rows, pitch] = Q Kᵀ of so many keys. */
INLINED void score(const Attention *a, int64_t b, int64_t g, const Few *few, int64_t keys, float *s,
                   int64_t pitch, const int rows) {
    const uint16_t *key = row_of(&a->k, b, g, 0);
    int64_t D = a->q.size;
    for (int64_t j = 0; j < keys; ++j, key += a->k.row) {
        __m512 sums[ROWS];
        for (int i = 0; i < rows; ++i) sums[i] = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += 32) {
            __mmask32 within = D - d >= 32 ? 0xffffffff : ((__mmask32)1 << (D - d)) - 1;
            __m512bh part = (__m512bh)_mm512_maskz_loadu_epi16(within, key + d);
            for (int i = 0; i < rows; ++i)
                sums[i] = _mm512_dpbf16_ps(
                    sums[i], part, (__m512bh)_mm512_maskz_loadu_epi16(within, few->q[i] + d));
        }
        for (int i = 0; i < rows; ++i) s[i * pitch + j] = _mm512_reduce_add_ps(sums[i]);
    }
}

/* y = inverse·p V, of so many keys. */
INLINED void mix(const Attention *a, int64_t b, int64_t g, const Few *few, int64_t keys,
                 const float *p, int64_t pitch, const float *inverse, uint16_t *y, const int rows) {
    int64_t E = a->v.size;
    for (int64_t first = 0; first < E; first += COLUMNS) {
        const uint16_t *value = row_of(&a->v, b, g, 0) + first;
        __mmask16 within[4];
        __m512 sums[ROWS][4];
        for (int c = 0; c < 4; ++c) {
            int64_t left = E - first - 16 * c;
            within[c] = (__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
            for (int i = 0; i < rows; ++i) sums[i][c] = _mm512_setzero_ps();
        }
        for (int64_t j = 0; j < keys; ++j, value += a->v.row) {
            __m512 weights[ROWS], parts[4];
            for (int i = 0; i < rows; ++i) weights[i] = _mm512_set1_ps(p[i * pitch + j]);
            for (int c = 0; c < 4; ++c) parts[c] = load_bf16(within[c], value + 16 * c);
            for (int i = 0; i < rows; ++i)
                for (int c = 0; c < 4; ++c)
                    sums[i][c] = _mm512_fmadd_ps(weights[i], parts[c], sums[i][c]);
        }
        for (int i = 0; i < rows; ++i) {
            uint16_t *line = y + ((b * a->queries + few->query[i]) * a->heads + few->head[i]) * E;
            for (int c = 0; c < 4; ++c)
                store_bf16(line + first + 16 * c, within[c],
                           _mm512_mul_ps(sums[i][c], _mm512_set1_ps(inverse[i])));
        }
    }
}

INLINED void attend(const Attention *a, int64_t b, int64_t g, const Few *few, float *s,
                    int64_t pitch, uint16_t *y, const int rows) {
    float inverse[ROWS];
    int64_t keys = reach_of(a, b, few, rows);
    score(a, b, g, few, keys, s, pitch, rows);
    for (int i = 0; i < rows; ++i) {
        int64_t n = weigh(a, b, few->head[i], few->query[i], keys, s + i * pitch, inverse + i);
        for (int64_t j = n; j < keys; ++j) s[i * pitch + j] = 0;
    }
    mix(a, b, g, few, keys, s, pitch, inverse, y, rows);
}

/* As artemis_attention_forward. */
void artemis_attention_few(HEADS(q), HEADS(k), HEADS(v), uint16_t *y, float *kept, int64_t B,
                           int64_t H, int64_t G, int64_t T, int64_t S, int64_t D, int64_t E,
                           const uint8_t *mask, int64_t mask_batch, int64_t mask_query, int causal,
                           float scale, int threads) {
    const Attention a = {OF(q, D), OF(k, D), OF(v, E), {0}, T, S, H, G,
                         {S, mask, mask_batch, mask_query, causal}, scale, kept, B * H};
    int64_t rows = H / G * T, pitch = up_to(S, 16);
    _Pragma("omp parallel num_threads(threads) if (B * H * T * S * (D + E) > 65536)")
    {
        float *s = room((int64_t)sizeof(float) * ROWS * pitch);
        _Pragma("omp for schedule(static)")
        for (int64_t task = 0; task < B * G; ++task)
            for (int64_t first = 0; first < rows; first += ROWS) {
                int64_t b = task / G, g = task % G;
                Few few = few_of(&a, b, g, first, rows);
                switch (smaller(rows - first, ROWS)) {
                    case 1: attend(&a, b, g, &few, s, pitch, y, 1); break;
                    case 2: attend(&a, b, g, &few, s, pitch, y, 2); break;
                    default: attend(&a, b, g, &few, s, pitch, y, ROWS);
                }
            }
        free(s);
    }
}

#endif
