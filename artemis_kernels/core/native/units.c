/* The units of a bottleneck in one pass each way, where products of others stand round them. */

#include "unit_rows.h"

#define UNITS {w, scale, kind, seed, threshold, keep_scale}

/* h[m, of stride `pitch`] is written; where the pitch exceeds w, its column w becomes 1: a unit that
   is always on, through which a bias rides in the products with h. */
#define FORWARD(PASS, SUFFIX, TYPE, STORE)                                                        \
    void PASS(const TYPE *z, int64_t z_row, TYPE *h, int64_t m, int64_t w, int64_t pitch,         \
              float scale, int kind, uint64_t seed, uint32_t threshold, float keep_scale,         \
              int threads) {                                                                      \
        const Units units = UNITS;                                                                \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * w > 16384)")      \
        for (int64_t i = 0; i < m; ++i) {                                                         \
            forward_row_##SUFFIX(&units, i * w, z + i * z_row, h + i * pitch);                    \
            if (pitch > w) h[i * pitch + w] = STORE(1.0f);                                        \
        }                                                                                         \
    }

FORWARD(artemis_units_forward_f32, d, float, same)
FORWARD(artemis_units_forward_bf16, f, uint16_t, to_bf16)

/* dz of dh [m, w], and h as in forward, or null. sums[p, w + 1]: what the p-th ROWS rows add. */
#define BACKWARD(PASS, REAL, SUFFIX, TYPE, STORE)                                                 \
    void PASS(const TYPE *z, int64_t z_row, const TYPE *dh, TYPE *dz, int64_t dz_row, TYPE *h,    \
              REAL *sums, int64_t m, int64_t w, int64_t pitch, float factor, float scale,         \
              int kind, uint64_t seed, uint32_t threshold, float keep_scale, int threads) {       \
        const Units units = UNITS;                                                                \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * w > 16384)")      \
        for (int64_t p = 0; p < (m + ROWS - 1) / ROWS; ++p) {                                     \
            int64_t last = (p + 1) * ROWS < m ? (p + 1) * ROWS : m;                               \
            REAL *sum = sums + p * (w + 1);                                                       \
            for (int64_t c = 0; c <= w; ++c) sum[c] = 0;                                          \
            for (int64_t i = p * ROWS; i < last; ++i) {                                           \
                TYPE *line = h ? h + i * pitch : NULL;                                            \
                backward_row_##SUFFIX(&units, factor, i * w, z + i * z_row, dh + i * w,           \
                                      dz + i * dz_row, line, sum);                                \
                if (h && pitch > w) line[w] = STORE(1.0f);                                        \
            }                                                                                     \
        }                                                                                         \
    }

BACKWARD(artemis_units_backward_f32, double, d, float, same)
BACKWARD(artemis_units_backward_bf16, float, f, uint16_t, to_bf16)
