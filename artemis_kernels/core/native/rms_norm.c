/* Root mean square normalization of rows x [m, n], a pass each way.

   forward    r = 1/√(Σ x²/n + eps)    y = x·r·w
   backward   dx = r·g − x·r³·Σ g·x / n,  g = dy·w;  dw of ROWS rows at a time: Σ dy·x·r

   A row is summed in blocks of float, and these in double. */

#include "numbers.h"

#define COLUMNS 1024 /* of a block */
#define ROWS 64      /* rows of one partial sum of dw: its order depends on nothing else */

#define RMS_NORM(SUFFIX, TYPE, LOAD, STORE)                                                       \
    static float inverse_##SUFFIX(const TYPE *x, int64_t n, float eps) {                          \
        double total = 0;                                                                         \
        for (int64_t from = 0; from < n; from += COLUMNS) {                                       \
            int64_t to = from + COLUMNS < n ? from + COLUMNS : n;                                 \
            float sum = 0;                                                                        \
            _Pragma("omp simd reduction(+ : sum)")                                                \
            for (int64_t j = from; j < to; ++j) sum += LOAD(x[j]) * LOAD(x[j]);                   \
            total += sum;                                                                         \
        }                                                                                         \
        return (float)(1 / sqrt(total / (double)n + eps));                                        \
    }                                                                                             \
                                                                                                  \
    void artemis_rms_norm_forward_##SUFFIX(const TYPE *x, const float *w, TYPE *y, int64_t m,     \
                                           int64_t n, float eps, int threads) {                   \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * n > 16384)")      \
        for (int64_t i = 0; i < m; ++i) {                                                         \
            const TYPE *row = x + i * n;                                                          \
            TYPE *to = y + i * n;                                                                 \
            float r = inverse_##SUFFIX(row, n, eps);                                              \
            _Pragma("omp simd")                                                                   \
            for (int64_t j = 0; j < n; ++j) to[j] = STORE(LOAD(row[j]) * r * w[j]);               \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    static double along_##SUFFIX(const TYPE *dy, const TYPE *x, const float *w, int64_t n) {      \
        double total = 0;                                                                         \
        for (int64_t from = 0; from < n; from += COLUMNS) {                                       \
            int64_t to = from + COLUMNS < n ? from + COLUMNS : n;                                 \
            float sum = 0;                                                                        \
            _Pragma("omp simd reduction(+ : sum)")                                                \
            for (int64_t j = from; j < to; ++j) sum += LOAD(dy[j]) * w[j] * LOAD(x[j]);           \
            total += sum;                                                                         \
        }                                                                                         \
        return total;                                                                             \
    }                                                                                             \
                                                                                                  \
    /* sums [⌈m / ROWS⌉, n] of dw, or NULL. */                                                    \
    void artemis_rms_norm_backward_##SUFFIX(const TYPE *dy, const TYPE *x, const float *w,        \
                                            TYPE *dx, float *sums, int64_t m, int64_t n,          \
                                            float eps, int threads) {                             \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * n > 16384)")      \
        for (int64_t p = 0; p < (m + ROWS - 1) / ROWS; ++p) {                                     \
            int64_t last = (p + 1) * ROWS < m ? (p + 1) * ROWS : m;                               \
            float *sum = sums ? sums + p * n : NULL;                                              \
            if (sum) memset(sum, 0, sizeof(float) * (size_t)n);                                   \
            for (int64_t i = p * ROWS; i < last; ++i) {                                           \
                const TYPE *row = x + i * n, *d = dy + i * n;                                     \
                TYPE *to = dx + i * n;                                                            \
                float r = inverse_##SUFFIX(row, n, eps);                                          \
                double cube = (double)r * r * r;                                                  \
                float s = (float)(cube * along_##SUFFIX(d, row, w, n) / (double)n);               \
                _Pragma("omp simd")                                                               \
                for (int64_t j = 0; j < n; ++j)                                                   \
                    to[j] = STORE(LOAD(d[j]) * w[j] * r - LOAD(row[j]) * s);                      \
                if (sum)                                                                          \
                    for (int64_t j = 0; j < n; ++j) sum[j] += LOAD(d[j]) * LOAD(row[j]) * r;      \
            }                                                                                     \
        }                                                                                         \
    }

RMS_NORM(f32, float, same, same)
RMS_NORM(bf16, uint16_t, from_bf16, to_bf16)
