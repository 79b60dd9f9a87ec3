/* The units of a bottleneck, everything between its two products, a row at a time:

       h = dropout(act(z))·σ
       dz = dh·factor·σ·mask·act'(z), and the sums behind db_d and dσ

   In both arithmetics: _f of bf16 tensors, _d of fp32 ones. */

#ifndef ARTEMIS_UNIT_ROWS_H
#define ARTEMIS_UNIT_ROWS_H

#include "mask.h"
#include "units.h"

#define COLUMNS 512 /* units of a row taken at a time; even */
#define ROWS 64     /* rows of one partial sum: its order depends on nothing else */

typedef struct {
    int64_t w;   /* units of a row */
    float scale; /* σ */
    int kind;
    uint64_t seed;
    uint32_t threshold;
    float keep_scale;
} Units;

/* value[0..n) and slope[0..n) of z[0..n), which are units `first` on of the mask. */
#define EVALUATE(REAL, SUFFIX, TYPE)                                                              \
    static void evaluate_##SUFFIX(const Units *units, int64_t first, const TYPE *z, int64_t n,    \
                                  REAL *value, REAL *slope) {                                     \
        activate_##SUFFIX(units->kind, z, n, value, slope);                                       \
        if (!units->threshold) return;                                                            \
        float buffer[COLUMNS + 2];                                                                \
        const float *factor =                                                                     \
            factors(buffer, first, n, units->seed, units->threshold, units->keep_scale);          \
        for (int64_t c = 0; c < n; ++c) {                                                         \
            value[c] = factor[c] > 0 ? value[c] * factor[c] : 0;                                  \
            slope[c] = factor[c] > 0 ? slope[c] * factor[c] : 0;                                  \
        }                                                                                         \
    }

EVALUATE(float, f, uint16_t)
EVALUATE(double, d, float)

/* h[w] of the row whose first unit is `first`. */
#define FORWARD_ROW(REAL, SUFFIX, TYPE, STORE)                                                    \
    static void forward_row_##SUFFIX(const Units *units, int64_t first, const TYPE *z, TYPE *h) { \
        for (int64_t from = 0; from < units->w; from += COLUMNS) {                                \
            REAL value[COLUMNS], slope[COLUMNS];                                                  \
            int64_t n = units->w - from < COLUMNS ? units->w - from : COLUMNS;                    \
            evaluate_##SUFFIX(units, first + from, z + from, n, value, slope);                    \
            for (int64_t c = 0; c < n; ++c) h[from + c] = STORE((float)(value[c] * units->scale));\
        }                                                                                         \
    }

FORWARD_ROW(float, f, uint16_t, to_bf16)
FORWARD_ROW(double, d, float, same)

/* dz[w] of dh[w], h[w] unless it is NULL, and what is added to the sums of its rows: sums[0..w) of
   dz, sums[w] of dh·mask·act(z). */
#define BACKWARD_ROW(REAL, SUFFIX, TYPE, LOAD, STORE)                                             \
    static void backward_row_##SUFFIX(const Units *units, float factor, int64_t first,            \
                                      const TYPE *restrict z, const TYPE *restrict dh,            \
                                      TYPE *restrict dz, TYPE *restrict h, REAL *restrict sums) { \
        for (int64_t from = 0; from < units->w; from += COLUMNS) {                                \
            REAL value[COLUMNS], slope[COLUMNS], d[COLUMNS], of_row = 0;                          \
            int64_t n = units->w - from < COLUMNS ? units->w - from : COLUMNS;                    \
            evaluate_##SUFFIX(units, first + from, z + from, n, value, slope);                    \
            for (int64_t c = 0; c < n; ++c) d[c] = LOAD(dh[from + c]);                            \
            _Pragma("omp simd reduction(+ : of_row)")                                             \
            for (int64_t c = 0; c < n; ++c) of_row += d[c] * value[c];                            \
            sums[units->w] += of_row;                                                             \
            for (int64_t c = 0; c < n; ++c)                                                       \
                d[c] = slope[c] == 0 ? 0 : d[c] * factor * units->scale * slope[c];               \
            for (int64_t c = 0; c < n; ++c) sums[from + c] += d[c];                               \
            for (int64_t c = 0; c < n; ++c) dz[from + c] = STORE((float)d[c]);                    \
            if (h)                                                                                \
                for (int64_t c = 0; c < n; ++c)                                                   \
                    h[from + c] = STORE((float)(value[c] * units->scale));                        \
        }                                                                                         \
    }

BACKWARD_ROW(float, f, uint16_t, from_bf16, to_bf16)
BACKWARD_ROW(double, d, float, same, same)

#endif
