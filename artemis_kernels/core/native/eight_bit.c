/* Around an int8 product: rows rounded to 8 bits before it, its int32 sums made numbers after it.

   quantize   v = x·column;  scale[m] = max|v[m]| / 127;  q = round(v / scale[m])
   restore    y = acc·row[m]·column[n] + bias[n]
   add        y = y + acc·row[m] */

#include "numbers.h"

#define ROWS 64 /* rows of one partial maximum */

static inline int32_t magnitude(float value) { /* the bits of |value|: ordered as it is, nan last */
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffff;
}

static inline float from_bits(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* parts[p, k] = max |x| over the p-th ROWS rows, as the bits of a float. */
#define COLUMN_MAX(PASS, TYPE, LOAD)                                                              \
    void PASS(const TYPE *x, int32_t *parts, int64_t m, int64_t k, int threads) {                 \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * k > 65536)")      \
        for (int64_t p = 0; p < (m + ROWS - 1) / ROWS; ++p) {                                     \
            int64_t last = (p + 1) * ROWS < m ? (p + 1) * ROWS : m;                               \
            int32_t *most = parts + p * k;                                                        \
            memset(most, 0, sizeof(int32_t) * (size_t)k);                                         \
            for (int64_t i = p * ROWS; i < last; ++i)                                             \
                for (int64_t c = 0; c < k; ++c) {                                                 \
                    int32_t bits = magnitude(LOAD(x[i * k + c]));                                 \
                    most[c] = bits > most[c] ? bits : most[c];                                    \
                }                                                                                 \
        }                                                                                         \
    }

COLUMN_MAX(artemis_column_max_f32, float, same)
COLUMN_MAX(artemis_column_max_bf16, uint16_t, from_bf16)

/* A row with an inf or a nan gets the scale nan, one below 1e-36 all zeros. `column` may be null. */
#define QUANTIZE(PASS, TYPE, LOAD)                                                                \
    void PASS(const TYPE *x, const float *column, int8_t *q, float *scale, int64_t m, int64_t k,  \
              int threads) {                                                                      \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * k > 16384)")      \
        for (int64_t i = 0; i < m; ++i) {                                                         \
            const TYPE *row = x + i * k;                                                          \
            int32_t most = 0;                                                                     \
            if (column)                                                                           \
                for (int64_t c = 0; c < k; ++c) {                                                 \
                    int32_t bits = magnitude(LOAD(row[c]) * column[c]);                           \
                    most = bits > most ? bits : most;                                             \
                }                                                                                 \
            else                                                                                  \
                for (int64_t c = 0; c < k; ++c) {                                                 \
                    int32_t bits = magnitude(LOAD(row[c]));                                       \
                    most = bits > most ? bits : most;                                             \
                }                                                                                 \
            float largest = from_bits(most);                                                      \
            int usable = largest > 1e-36f && most < 0x7f800000;                                   \
            float inverse = usable ? 127.0f / largest : 0.0f;                                     \
            scale[i] = usable ? largest / 127.0f : most < 0x7f800000 ? 0.0f : NAN;                \
            if (!usable)                                                                          \
                memset(q + i * k, 0, (size_t)k);                                                  \
            else if (column)                                                                      \
                for (int64_t c = 0; c < k; ++c)                                                   \
                    q[i * k + c] = (int8_t)rintf(LOAD(row[c]) * column[c] * inverse);             \
            else                                                                                  \
                for (int64_t c = 0; c < k; ++c)                                                   \
                    q[i * k + c] = (int8_t)rintf(LOAD(row[c]) * inverse);                         \
        }                                                                                         \
    }

QUANTIZE(artemis_quantize_f32, float, same)
QUANTIZE(artemis_quantize_bf16, uint16_t, from_bf16)

#define RESTORE(PASS, TYPE, STORE)                                                                \
    void PASS(const int32_t *acc, const float *row, const float *column, const float *bias,       \
              TYPE *y, int64_t m, int64_t n, int threads) {                                       \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * n > 16384)")      \
        for (int64_t i = 0; i < m; ++i) {                                                         \
            const int32_t *sums = acc + i * n;                                                    \
            TYPE *to = y + i * n;                                                                 \
            float factor = row[i];                                                                \
            if (column && bias)                                                                   \
                for (int64_t c = 0; c < n; ++c)                                                   \
                    to[c] = STORE((float)sums[c] * factor * column[c] + bias[c]);                 \
            else if (column)                                                                      \
                for (int64_t c = 0; c < n; ++c)                                                   \
                    to[c] = STORE((float)sums[c] * factor * column[c]);                           \
            else                                                                                  \
                for (int64_t c = 0; c < n; ++c) to[c] = STORE((float)sums[c] * factor);           \
        }                                                                                         \
    }

RESTORE(artemis_restore_f32, float, same)
RESTORE(artemis_restore_bf16, uint16_t, to_bf16)

#define ADD_RESTORED(PASS, TYPE, LOAD, STORE)                                                     \
    void PASS(const int32_t *acc, const float *row, TYPE *y, int64_t m, int64_t n, int threads) { \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * n > 16384)")      \
        for (int64_t i = 0; i < m; ++i) {                                                         \
            const int32_t *sums = acc + i * n;                                                    \
            TYPE *to = y + i * n;                                                                 \
            float factor = row[i];                                                                \
            for (int64_t c = 0; c < n; ++c)                                                       \
                to[c] = STORE(LOAD(to[c]) + (float)sums[c] * factor);                             \
        }                                                                                         \
    }

ADD_RESTORED(artemis_add_restored_f32, float, same, same)
ADD_RESTORED(artemis_add_restored_bf16, uint16_t, from_bf16, to_bf16)
