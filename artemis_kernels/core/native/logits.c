/* The gradient of logits rounded to 8 bits: x [m, k] is p − 1 at a row's target and p elsewhere.

       v = x·column     peak[m] = v[m, at[m]], the largest of a row; from here on v is 0 there
       scale[m] = max|v[m]| / 126     q = round(v / scale[m] + what rounding left LANES before)

   Thousands of small numbers, each nearly rounded away, keep their sum in this way. */

#include "numbers.h"

#define LANES 64

static inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
static inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

/* A row with an inf or a nan gets the scale nan, one whose rest is below 1e-36 zeros. */
#define ROUND_LOGITS(PASS, TYPE, LOAD)                                                            \
    static inline void PASS##_block(const TYPE *row, const float *column, int64_t count,          \
                                    float *v) { /* zeros beyond count */                          \
        for (int64_t j = 0; j < count; ++j) v[j] = LOAD(row[j]) * column[j];                      \
        for (int64_t j = count; j < LANES; ++j) v[j] = 0;                                         \
    }                                                                                             \
                                                                                                  \
    static void PASS##_row(const TYPE *row, const float *column, int64_t k, int8_t *q,            \
                           float *scale, float *peak, int64_t *at) {                              \
        int32_t first[LANES] = {0}, second[LANES] = {0}; /* of each lane, as bits */              \
        float v[LANES], left[LANES] = {0};                                                        \
        for (int64_t c = 0; c < k; c += LANES) {                                                  \
            PASS##_block(row + c, column + c, k - c < LANES ? k - c : LANES, v);                  \
            for (int j = 0; j < LANES; ++j) {                                                     \
                int32_t bits = magnitude(v[j]);                                                   \
                second[j] = larger(second[j], smaller(first[j], bits));                           \
                first[j] = larger(first[j], bits);                                                \
            }                                                                                     \
        }                                                                                         \
        int32_t most = 0, next = 0;                                                               \
        for (int j = 0; j < LANES; ++j) {                                                         \
            next = larger(next, larger(second[j], smaller(most, first[j])));                      \
            most = larger(most, first[j]);                                                        \
        }                                                                                         \
        int64_t top = 0;                                                                          \
        while (top < k - 1 && magnitude(LOAD(row[top]) * column[top]) != most) ++top;             \
        int finite = most < 0x7f800000;                                                           \
        float rest = from_bits(next), inverse = finite && rest > 1e-36f ? 126.0f / rest : 0.0f;   \
        *scale = inverse > 0 ? rest / 126.0f : finite ? 0.0f : NAN;                               \
        *peak = finite ? LOAD(row[top]) * column[top] : 0.0f, *at = top;                          \
        for (int64_t c = 0; c < k; c += LANES) {                                                  \
            int64_t count = k - c < LANES ? k - c : LANES;                                        \
            int8_t rounded[LANES];                                                                \
            PASS##_block(row + c, column + c, inverse > 0 ? count : 0, v);                        \
            if (top >= c && top < c + LANES) v[top - c] = 0;                                      \
            for (int j = 0; j < LANES; ++j) {                                                     \
                float wanted = v[j] * inverse + left[j], got = rintf(wanted);                     \
                left[j] = wanted - got;                                                           \
                rounded[j] = (int8_t)got;                                                         \
            }                                                                                     \
            memcpy(q + c, rounded, (size_t)count);                                                \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    void PASS(const TYPE *x, const float *column, int8_t *q, float *scale, float *peak,           \
              int64_t *at, int64_t m, int64_t k, int threads) {                                   \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * k > 16384)")      \
        for (int64_t i = 0; i < m; ++i)                                                           \
            PASS##_row(x + i * k, column, k, q + i * k, scale + i, peak + i, at + i);             \
    }

ROUND_LOGITS(artemis_round_logits_f32, float, same)
ROUND_LOGITS(artemis_round_logits_bf16, uint16_t, from_bf16)
