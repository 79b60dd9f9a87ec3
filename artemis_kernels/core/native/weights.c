/* A packed weight as the right factor of a product: unpacked whole, or in passing for few rows. */

#include "formats.h"

#define UNPACK(PASS, TYPE, STORE)                                                                 \
    void PASS(const void *data, const void *scale, const void *offset, TYPE *out, int64_t n,      \
              int64_t k, int64_t group, int format, int threads) {                                \
        Packed w = {data, scale, offset, k, group, format};                                       \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (n * k > 65536)")      \
        for (int64_t i = 0; i < n; ++i)                                                           \
            for (int64_t from = 0; from < k; from += SLAB) {                                      \
                float values[SLAB];                                                               \
                int64_t count = k - from < SLAB ? k - from : SLAB;                                \
                decode(&w, i, from, count, values);                                               \
                TYPE *to = out + i * k + from;                                                    \
                for (int64_t c = 0; c < count; ++c) to[c] = STORE(values[c]);                     \
            }                                                                                     \
    }

UNPACK(artemis_unpack_f32, float, same)
UNPACK(artemis_unpack_bf16, uint16_t, to_bf16)

#define TOGETHER 4 /* weight rows at a time: independent chains hide the latency of the additions */

/* sums[0..4) += row · slab[0..4]. */
static inline void dot4(const float *row, float slab[TOGETHER][SLAB], int64_t count, float *sums) {
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t c = 0; c < count; ++c) {
        s0 = FMA(row[c], slab[0][c], s0);
        s1 = FMA(row[c], slab[1][c], s1);
        s2 = FMA(row[c], slab[2][c], s2);
        s3 = FMA(row[c], slab[3][c], s3);
    }
    sums[0] += s0;
    sums[1] += s1;
    sums[2] += s2;
    sums[3] += s3;
}

/* y[m, n] = Σ_k x[m, k] · w[n, k] in fp32, for m <= FEW_ROWS: the weight is read once. */
#define FEW_ROWS 8
void artemis_few_rows(const float *x, const void *data, const void *scale, const void *offset,
                      float *y, int64_t m, int64_t k, int64_t n, int64_t group, int format,
                      int threads) {
    Packed w = {data, scale, offset, k, group, format};
#pragma omp parallel for num_threads(threads) schedule(static) if (n * k > 65536)
    for (int64_t first = 0; first < n; first += TOGETHER) {
        int64_t rows = n - first < TOGETHER ? n - first : TOGETHER;
        float slab[TOGETHER][SLAB], sums[FEW_ROWS][TOGETHER] = {{0}};
        if (rows < TOGETHER) memset(slab, 0, sizeof slab);
        for (int64_t from = 0; from < k; from += SLAB) {
            int64_t count = k - from < SLAB ? k - from : SLAB;
            for (int64_t j = 0; j < rows; ++j) decode(&w, first + j, from, count, slab[j]);
            for (int64_t i = 0; i < m; ++i) dot4(x + i * k + from, slab, count, sums[i]);
        }
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < rows; ++j) y[i * n + first + j] = sums[i][j];
    }
}
