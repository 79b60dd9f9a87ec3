/* A dropped x on the CPU: alone, or inside a thin product that never stores it.

   The element-wise passes compute each value as the plain-torch path does, bit for bit; the thin
   products, which draw the mask of x as they read it, sum in fp32. */

#include "mask.h"
#include "numbers.h"

#define CHUNK 8192 /* elements a thread takes at a time; even, so that no pair is split */

/* out = dropped(x), or out += dropped(x). A dropped value is 0 even where x is inf or nan. */
#define DROPOUT(NAME, TYPE, LOAD, STORE)                                                          \
    void NAME(const TYPE *x, TYPE *out, int64_t n, uint64_t seed, uint32_t threshold,             \
              float keep_scale, int accumulate, int threads) {                                    \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (n > 65536)")          \
        for (int64_t first = 0; first < n; first += CHUNK) {                                      \
            float buffer[CHUNK + 2];                                                              \
            int64_t count = n - first < CHUNK ? n - first : CHUNK;                                \
            const float *factor = factors(buffer, first, count, seed, threshold, keep_scale);     \
            const TYPE *from = x + first;                                                         \
            TYPE *to = out + first;                                                               \
            if (accumulate)                                                                       \
                for (int64_t i = 0; i < count; ++i) {                                             \
                    float term = factor[i] > 0.0f ? LOAD(from[i]) * factor[i] : 0.0f;             \
                    to[i] = STORE(LOAD(to[i]) + LOAD(STORE(term)));                               \
                }                                                                                 \
            else                                                                                  \
                for (int64_t i = 0; i < count; ++i)                                               \
                    to[i] = STORE(factor[i] > 0.0f ? LOAD(from[i]) * factor[i] : 0.0f);           \
        }                                                                                         \
    }

DROPOUT(artemis_dropout_f32, float, same, same)
DROPOUT(artemis_dropout_bf16, uint16_t, from_bf16, to_bf16)

/* ---- thin products: x [m, k] and a few rows of A [r, k], all contiguous ---- */

#define COLUMNS 1024 /* columns of a row taken at a time; even */
#define ROWS 64      /* rows of one partial sum of a gradient: its order depends on nothing else */

/* sums[0..3] += row · a[0..3]: four independent chains hide the latency of the additions. */
static inline void dot4(const float *row, const float *a, int64_t stride, int64_t n, float *sums) {
    const float *a1 = a + stride, *a2 = a1 + stride, *a3 = a2 + stride;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < n; ++i) {
        float value = row[i];
        s0 = FMA(value, a[i], s0);
        s1 = FMA(value, a1[i], s1);
        s2 = FMA(value, a2[i], s2);
        s3 = FMA(value, a3[i], s3);
    }
    sums[0] += s0;
    sums[1] += s1;
    sums[2] += s2;
    sums[3] += s3;
}

static inline void dot1(const float *row, const float *a, int64_t n, float *sum) {
    float s0 = 0;
#pragma omp simd reduction(+ : s0)
    for (int64_t i = 0; i < n; ++i) s0 = FMA(row[i], a[i], s0);
    *sum += s0;
}

/* s[m, r] = Σ_k dropped(x)[m, k] · a[r, k], for r <= 64. */
#define SHRINK(NAME, TYPE, LOAD, STORE)                                                           \
    void NAME(const TYPE *x, const float *a, TYPE *s, int64_t m, int64_t k, int64_t r,            \
              uint64_t seed, uint32_t threshold, float keep_scale, int threads) {                 \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * k * r > 65536)")  \
        for (int64_t i = 0; i < m; ++i) {                                                         \
            float buffer[COLUMNS + 2], row[COLUMNS], sums[64] = {0};                              \
            for (int64_t from = 0; from < k; from += COLUMNS) {                                   \
                int64_t n = k - from < COLUMNS ? k - from : COLUMNS, j = 0;                       \
                const float *factor =                                                             \
                    factors(buffer, i * k + from, n, seed, threshold, keep_scale);                \
                for (int64_t c = 0; c < n; ++c)                                                   \
                    row[c] = factor[c] > 0.0f ? LOAD(x[i * k + from + c]) * factor[c] : 0.0f;     \
                for (; j + 4 <= r; j += 4) dot4(row, a + j * k + from, k, n, sums + j);           \
                for (; j < r; ++j) dot1(row, a + j * k + from, n, sums + j);                      \
            }                                                                                     \
            for (int64_t j = 0; j < r; ++j) s[i * r + j] = STORE(sums[j]);                        \
        }                                                                                         \
    }

SHRINK(artemis_shrink_f32, float, same, same)
SHRINK(artemis_shrink_bf16, uint16_t, from_bf16, to_bf16)

/* Only fp32: in bf16, BLAS on a stored dropped x is faster for the two products below. */

/* parts[p, r, k] = Σ over the p-th ROWS rows of ds[m, r] · dropped(x)[m, k]; parts zeroed. */
void artemis_outer_f32(const float *ds, const float *x, float *parts, int64_t m, int64_t k,
                       int64_t r, uint64_t seed, uint32_t threshold, float keep_scale,
                       int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (m * k * r > 65536)
    for (int64_t p = 0; p < (m + ROWS - 1) / ROWS; ++p) {
        int64_t last = (p + 1) * ROWS < m ? (p + 1) * ROWS : m;
        for (int64_t i = p * ROWS; i < last; ++i)
            for (int64_t from = 0; from < k; from += COLUMNS) {
                float buffer[COLUMNS + 2], row[COLUMNS];
                int64_t n = k - from < COLUMNS ? k - from : COLUMNS;
                const float *factor =
                    factors(buffer, i * k + from, n, seed, threshold, keep_scale);
                for (int64_t c = 0; c < n; ++c)
                    row[c] = factor[c] > 0.0f ? x[i * k + from + c] * factor[c] : 0.0f;
                for (int64_t j = 0; j < r; ++j) {
                    float weight = ds[i * r + j];
                    float *to = parts + (p * r + j) * k + from;
                    for (int64_t c = 0; c < n; ++c) to[c] = FMA(weight, row[c], to[c]);
                }
            }
    }
}

/* dx[m, k] += mask · keep_scale · Σ_r ds[m, r] · a[r, k]. */
void artemis_expand_f32(const float *ds, const float *a, float *dx, int64_t m, int64_t k,
                        int64_t r, uint64_t seed, uint32_t threshold, float keep_scale,
                        int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (m * k * r > 65536)
    for (int64_t i = 0; i < m; ++i)
        for (int64_t from = 0; from < k; from += COLUMNS) {
            float buffer[COLUMNS + 2], row[COLUMNS];
            int64_t n = k - from < COLUMNS ? k - from : COLUMNS;
            const float *factor = factors(buffer, i * k + from, n, seed, threshold, keep_scale);
            memset(row, 0, sizeof(float) * (size_t)n);
            for (int64_t j = 0; j < r; ++j) {
                float weight = ds[i * r + j];
                const float *line = a + j * k + from;
                for (int64_t c = 0; c < n; ++c) row[c] = FMA(weight, line[c], row[c]);
            }
            float *to = dx + i * k + from;
            for (int64_t c = 0; c < n; ++c)
                to[c] = to[c] + (factor[c] > 0.0f ? row[c] * factor[c] : 0.0f);
        }
}
