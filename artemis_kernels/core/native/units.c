/* The units of a bottleneck, everything between its two products in one pass each way.

   forward    h = dropout(act(z))·σ
   backward   dz = (dY U)·σ·mask·act'(z), h again, and the sums behind db_d and dσ */

#include "mask.h"
#include "units.h"

#define COLUMNS 512 /* units of a row taken at a time; even */
#define ROWS 64     /* rows of one partial sum: its order depends on nothing else */

/* value[0..n) and slope[0..n) of z[0..n). */
#define EVALUATE(REAL, SUFFIX, TYPE, LOAD)                                                        \
    static void evaluate_##SUFFIX(int kind, const TYPE *z, int64_t n, REAL *value, REAL *slope) { \
        switch (kind) {                                                                           \
            case IDENTITY: EACH(identity, SUFFIX, LOAD) break;                                    \
            case RELU: EACH(relu, SUFFIX, LOAD) break;                                            \
            case SILU: EACH(silu, SUFFIX, LOAD) break;                                            \
            case GELU: EACH(gelu, SUFFIX, LOAD) break;                                            \
            default: EACH(gelu_tanh, SUFFIX, LOAD) break;                                         \
        }                                                                                         \
    }
#define EACH(FUNCTION, SUFFIX, LOAD)                                                              \
    for (int64_t i = 0; i < n; ++i) FUNCTION##_##SUFFIX(LOAD(z[i]), value + i, slope + i);

EVALUATE(float, f, uint16_t, from_bf16)
EVALUATE(double, d, float, same)

/* h[m, of stride `pitch`] is written; where the pitch exceeds w, its column w becomes 1: a unit that
   is always on, through which a bias rides in the products with h. */
#define FORWARD(PASS, REAL, SUFFIX, TYPE, LOAD, STORE)                                            \
    void PASS(const TYPE *z, TYPE *h, int64_t m, int64_t w, int64_t pitch, float scale, int kind, \
              uint64_t seed, uint32_t threshold, float keep_scale, int threads) {                 \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * w > 16384)")      \
        for (int64_t i = 0; i < m; ++i) {                                                         \
            for (int64_t from = 0; from < w; from += COLUMNS) {                                   \
                REAL value[COLUMNS], slope[COLUMNS];                                              \
                float buffer[COLUMNS + 2];                                                        \
                int64_t n = w - from < COLUMNS ? w - from : COLUMNS;                              \
                TYPE *to = h + i * pitch + from;                                                  \
                evaluate_##SUFFIX(kind, z + i * w + from, n, value, slope);                       \
                if (threshold) {                                                                  \
                    const float *factor =                                                         \
                        factors(buffer, i * w + from, n, seed, threshold, keep_scale);            \
                    for (int64_t c = 0; c < n; ++c)                                               \
                        value[c] = factor[c] > 0 ? value[c] * factor[c] : 0;                      \
                }                                                                                 \
                for (int64_t c = 0; c < n; ++c) to[c] = STORE((float)(value[c] * scale));         \
            }                                                                                     \
            if (pitch > w) h[i * pitch + w] = STORE(1.0f);                                        \
        }                                                                                         \
    }

FORWARD(artemis_units_forward_f32, double, d, float, same, same)
FORWARD(artemis_units_forward_bf16, float, f, uint16_t, from_bf16, to_bf16)

/* d[m, w] = dY U on entry, dz on exit: d·factor_of_d·σ·mask·act'(z). h as in forward, or null.
   sums[p, w + 1] = Σ over the p-th ROWS rows of dz, and in column w of (dY U)·mask·act(z). */
#define BACKWARD(PASS, REAL, SUFFIX, TYPE, LOAD, STORE)                                           \
    void PASS(const TYPE *z, TYPE *d, TYPE *h, REAL *sums, int64_t m, int64_t w, int64_t pitch,  \
              float scale, float factor_of_d, int kind, uint64_t seed, uint32_t threshold,        \
              float keep_scale, int threads) {                                                    \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * w > 16384)")      \
        for (int64_t p = 0; p < (m + ROWS - 1) / ROWS; ++p) {                                     \
            int64_t last = (p + 1) * ROWS < m ? (p + 1) * ROWS : m;                               \
            REAL *sum = sums + p * (w + 1);                                                       \
            REAL inner = 0;                                                                       \
            for (int64_t c = 0; c < w; ++c) sum[c] = 0;                                           \
            for (int64_t i = p * ROWS; i < last; ++i) {                                           \
                for (int64_t from = 0; from < w; from += COLUMNS) {                               \
                    REAL value[COLUMNS], slope[COLUMNS];                                          \
                    float buffer[COLUMNS + 2];                                                    \
                    int64_t n = w - from < COLUMNS ? w - from : COLUMNS;                          \
                    TYPE *dline = d + i * w + from;                                               \
                    evaluate_##SUFFIX(kind, z + i * w + from, n, value, slope);                   \
                    if (threshold) {                                                              \
                        const float *factor =                                                     \
                            factors(buffer, i * w + from, n, seed, threshold, keep_scale);        \
                        for (int64_t c = 0; c < n; ++c) {                                         \
                            value[c] = factor[c] > 0 ? value[c] * factor[c] : 0;                  \
                            slope[c] = factor[c] > 0 ? slope[c] * factor[c] : 0;                  \
                        }                                                                         \
                    }                                                                             \
                    REAL of_row = 0;                                                              \
                    _Pragma("omp simd reduction(+ : of_row)")                                     \
                    for (int64_t c = 0; c < n; ++c) of_row += LOAD(dline[c]) * value[c];          \
                    inner += of_row;                                                              \
                    for (int64_t c = 0; c < n; ++c) {                                             \
                        REAL dh = (REAL)LOAD(dline[c]) * factor_of_d * scale;                     \
                        REAL dz = slope[c] == 0 ? 0 : dh * slope[c];                              \
                        sum[from + c] += dz;                                                      \
                        dline[c] = STORE((float)dz);                                              \
                    }                                                                             \
                    if (h)                                                                        \
                        for (int64_t c = 0; c < n; ++c)                                           \
                            h[i * pitch + from + c] = STORE((float)(value[c] * scale));           \
                }                                                                                 \
                if (h && pitch > w) h[i * pitch + w] = STORE(1.0f);                               \
            }                                                                                     \
            sum[w] = inner;                                                                       \
        }                                                                                         \
    }

BACKWARD(artemis_units_backward_f32, double, d, float, same, same)
BACKWARD(artemis_units_backward_bf16, float, f, uint16_t, from_bf16, to_bf16)
