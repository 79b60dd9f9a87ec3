/* Around an int8 product: rows rounded to 8 bits before it, its int32 sums made numbers after it.

   round      v = x·column;  scale[m] = max|v[m]| / 127;  q = round(v / scale[m])
   restore    y = acc·row[m]·column[n] + bias[n]
   add        y = y + acc·row[m] */

#include "numbers.h"

static inline float one(const float *column, int64_t c) { return column ? column[c] : 1.0f; }

/* Whether a column may exceed four medians: surely none does where a quarter of the largest is no
   more than the median. */
static int may_stand_out(const int32_t *largest, int64_t k) {
    float most = 0;
    int64_t many = 0;
    for (int64_t c = 0; c < k; ++c) {
        float value = from_bits(largest[c]);
        most = value > most ? value : most;
    }
    for (int64_t c = 0; c < k; ++c) many += from_bits(largest[c]) >= most * 0.25f;
    return many < k - (k - 1) / 2;
}

/* The median of those that are not nan, the lower one of two; nan where there are none. */
static float median(const int32_t *largest, int64_t k) {
    int64_t valid = 0;
    for (int64_t c = 0; c < k; ++c) valid += largest[c] <= 0x7f800000;
    if (!valid) return NAN;
    int32_t low = 0, high = 0x7f800000; /* bits are ordered as the numbers are */
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        int64_t below = 0;
        for (int64_t c = 0; c < k; ++c) below += largest[c] <= middle;
        if (below > (valid - 1) / 2)
            high = middle;
        else
            low = middle + 1;
    }
    return from_bits(low);
}

/* apart[0..n) = the columns above `factor` medians; returns n, or −1 where they are more than `most`. */
static int64_t stand_out(const int32_t *largest, int64_t k, float factor, int64_t *apart,
                         int64_t most) {
    if (k < 2 || !may_stand_out(largest, k)) return 0;
    float limit = factor * median(largest, k);
    int64_t found = 0;
    for (int64_t c = 0; c < k; ++c)
        if (from_bits(largest[c]) > limit) {
            if (found == most) return -1;
            apart[found++] = c;
        }
    return found;
}

/* Rows of TOGETHER at a time: `largest` is read and written once for them. */
#define TOGETHER 4

/* largest [k], as bits, of each column of |v|, by way of parts [count, k]: largest is the first.
   A row with an inf or a nan gets the scale nan, one below 1e-36 all zeros. `column` may be NULL. */
#define ROUND_ROWS(PASS, TYPE, LOAD)                                                              \
    static inline void PASS##_row(const TYPE *row, const float *column, int32_t most, int8_t *q,  \
                                  float *scale, int64_t k) {                                      \
        float peak = from_bits(most);                                                             \
        int usable = peak > 1e-36f && most < 0x7f800000;                                          \
        float inverse = usable ? 127.0f / peak : 0.0f;                                            \
        *scale = usable ? peak / 127.0f : most < 0x7f800000 ? 0.0f : NAN;                         \
        if (!usable)                                                                              \
            memset(q, 0, (size_t)k);                                                              \
        else                                                                                      \
            for (int64_t c = 0; c < k; ++c)                                                       \
                q[c] = (int8_t)rintf(LOAD(row[c]) * one(column, c) * inverse);                    \
    }                                                                                             \
                                                                                                  \
    static inline void PASS##_some(const TYPE *x, const float *column, int32_t *largest,          \
                                   int8_t *q, float *scale, int64_t k, const int count) {         \
        int32_t most[TOGETHER] = {0};                                                             \
        for (int64_t c = 0; c < k; ++c) {                                                         \
            int32_t over = largest[c];                                                            \
            float factor = one(column, c);                                                        \
            for (int i = 0; i < count; ++i) {                                                     \
                int32_t bits = magnitude(LOAD(x[i * k + c]) * factor);                            \
                most[i] = bits > most[i] ? bits : most[i];                                        \
                over = bits > over ? bits : over;                                                 \
            }                                                                                     \
            largest[c] = over;                                                                    \
        }                                                                                         \
        for (int i = 0; i < count; ++i)                                                           \
            PASS##_row(x + i * k, column, most[i], q + i * k, scale + i, k);                      \
    }                                                                                             \
                                                                                                  \
    static void PASS##_rows(const TYPE *x, const float *column, int32_t *parts, int64_t count,    \
                            int8_t *q, float *scale, int64_t m, int64_t k, int threads) {         \
        int64_t each = (m + count - 1) / count;                                                   \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * k > 16384)")      \
        for (int64_t p = 0; p < count; ++p) {                                                     \
            int32_t *most = parts + p * k;                                                        \
            memset(most, 0, sizeof(int32_t) * (size_t)k);                                         \
            int64_t i = p * each, last = (p + 1) * each < m ? (p + 1) * each : m;                 \
            for (; i + TOGETHER <= last; i += TOGETHER)                                           \
                if (column)                                                                       \
                    PASS##_some(x + i * k, column, most, q + i * k, scale + i, k, TOGETHER);      \
                else                                                                              \
                    PASS##_some(x + i * k, NULL, most, q + i * k, scale + i, k, TOGETHER);        \
            for (; i < last; ++i)                                                                 \
                PASS##_some(x + i * k, column, most, q + i * k, scale + i, k, 1);                 \
        }                                                                                         \
        for (int64_t p = 1; p < count; ++p)                                                       \
            for (int64_t c = 0; c < k; ++c)                                                       \
                parts[c] = parts[p * k + c] > parts[c] ? parts[p * k + c] : parts[c];             \
    }

/* Rounded again without the columns that stand out by `factor` medians, *found of them in apart, if
   they are any but no more than `most`; a `most` of 0 does not look. kept [k] is scratch. */
#define ROUND(PASS, TYPE)                                                                         \
    void PASS(const TYPE *x, const float *column, int32_t *parts, int64_t count, float factor,    \
              int64_t *apart, int64_t most, int64_t *found, float *kept, int8_t *q, float *scale, \
              int64_t m, int64_t k, int threads) {                                                \
        PASS##_rows(x, column, parts, count, q, scale, m, k, threads);                            \
        *found = most ? stand_out(parts, k, factor, apart, most) : 0;                             \
        if (*found <= 0) return;                                                                  \
        for (int64_t c = 0; c < k; ++c) kept[c] = one(column, c);                                 \
        for (int64_t p = 0; p < *found; ++p) kept[apart[p]] = 0;                                  \
        PASS##_rows(x, kept, parts, count, q, scale, m, k, threads);                              \
    }

ROUND_ROWS(artemis_round_f32, float, same)
ROUND_ROWS(artemis_round_bf16, uint16_t, from_bf16)
ROUND(artemis_round_f32, float)
ROUND(artemis_round_bf16, uint16_t)

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
