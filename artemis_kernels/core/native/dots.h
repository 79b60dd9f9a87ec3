/* Products of a few rows of bf16 x with rows of a weight in any format, sums in fp32.

   Numbers of int8, e4m3 and int4 fit bf16's eight bits exactly, so the processor's bf16 dot product
   multiplies them as they are; scales come after the fp32 sums. With x's sums over a group, int4's
   offset costs a multiplication a group, and its codes need no conversion: 0x4300 | c is 128 + c. */

#ifndef ARTEMIS_DOTS_H
#define ARTEMIS_DOTS_H

#include "fixed_point.h"

/* x [padded m, pitch], zeros beyond m and k: 1, 4 or a multiple of 8 rows, pitch a multiple of 32.
   sums [padded m, k / group]: of x over groups, int4 only (a group is a multiple of 64 there). */
typedef struct {
    const uint16_t *data;
    int64_t pitch;
    const float *sums;
    const Fixed *fixed; /* of a single row, or NULL */
} Rows;

/* Rows of x, and of the weight, that `dots` takes at once, for m rows in all. */
static inline int rows_at_once(int64_t m) { return m == 1 ? 1 : m <= 4 ? 4 : 8; }
static inline int columns_at_once(int rows) { return rows == 8 ? 2 : 4; }

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_BF16_ROWS 1

static inline __m512bh paired(__m512 first, __m512 second) {
    return _mm512_cvtne2ps_pbh(second, first);
}

static inline __m512bh load_int8(const uint8_t *p) {
    __m512i first = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
    __m512i second = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 16)));
    return paired(_mm512_cvtepi32_ps(first), _mm512_cvtepi32_ps(second));
}

/* As from_e4m3. A pair of codes becomes bf16 120 exponents too low, which products in fp32, of the
   low and the high halves, set right: bf16's own would take subnormals for zero. */
static inline __m512bh load_fp8(const uint8_t *p) {
    const __m512i largest = _mm512_set1_epi16(0x7f0), halves = _mm512_set1_epi32(0xffff0000);
    const __m512 factor = _mm512_set1_ps(0x1p120f);
    __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
    __m512i bits = _mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 4);
    bits = _mm512_and_si512(bits, _mm512_set1_epi16((short)0x87f0));
    __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    __m512 high = _mm512_castsi512_ps(_mm512_and_si512(bits, halves));
    low = _mm512_mul_ps(low, factor), high = _mm512_mul_ps(high, factor);
    __mmask32 number = _mm512_cmpneq_epi16_mask(_mm512_and_si512(bits, largest), largest);
    /* One of the halves is zero: their sum is both, and is not taken where the code is nan. */
    return (__m512bh)_mm512_mask_add_epi16(
        _mm512_set1_epi16(0x7fc0), number, _mm512_castps_si512(high),
        _mm512_srli_epi32(_mm512_castps_si512(low), 16));
}

static inline __m512bh load_bf16(const uint8_t *p) { return (__m512bh)_mm512_loadu_si512(p); }

static inline __m512bh load_x(const uint16_t *p) { return (__m512bh)_mm512_loadu_si512(p); }

/* out[j] = Σ sums[j]: four at once take a third of the instructions of four reductions. */
static inline void reduce4(const __m512 *sums, float *out) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]),
                              _mm512_unpackhi_ps(sums[0], sums[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]),
                              _mm512_unpackhi_ps(sums[2], sums[3]));
    __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* out[i][j] = Σ x[i, :]·w[j] for ROWS rows of x, zero-padded to `pitch`, by COLUMNS rows of w, of
   which TOGETHER at a time: with more, what LOAD needs would not fit the registers. */
#define DOT(NAME, LOAD, SIZE, ROWS, COLUMNS, TOGETHER)                                            \
    static void NAME(const uint16_t *x, int64_t pitch, const uint8_t *const *w, int64_t k,        \
                     float out[8][4]) {                                                           \
        for (int first = 0; first < COLUMNS; first += TOGETHER, w += TOGETHER) {                  \
            __m512 sums[ROWS][TOGETHER];                                                          \
            for (int i = 0; i < ROWS; ++i)                                                        \
                for (int j = 0; j < TOGETHER; ++j) sums[i][j] = _mm512_setzero_ps();              \
            for (int64_t c = 0; c < k; c += 32) {                                                 \
                __m512bh values[TOGETHER];                                                        \
                uint8_t last[32 * SIZE] = {0};                                                    \
                for (int j = 0; j < TOGETHER; ++j) {                                              \
                    const uint8_t *from = w[j] + c * SIZE;                                        \
                    if (k - c < 32) from = memcpy(last, from, (size_t)(k - c) * SIZE);            \
                    values[j] = LOAD(from);                                                       \
                    __builtin_prefetch(w[j] + c * SIZE + 1024);                                   \
                }                                                                                 \
                for (int i = 0; i < ROWS; ++i)                                                    \
                    for (int j = 0; j < TOGETHER; ++j)                                            \
                        sums[i][j] =                                                              \
                            _mm512_dpbf16_ps(sums[i][j], load_x(x + i * pitch + c), values[j]);   \
            }                                                                                     \
            for (int i = 0; i < ROWS; ++i)                                                        \
                for (int j = 0; j < TOGETHER; ++j)                                                \
                    out[i][first + j] = _mm512_reduce_add_ps(sums[i][j]);                         \
        }                                                                                         \
    }

DOT(int8_4, load_int8, 1, 4, 4, 4)
DOT(int8_8, load_int8, 1, 8, 2, 2)
DOT(fp8_4, load_fp8, 1, 4, 4, 2)
DOT(fp8_8, load_fp8, 1, 8, 2, 2)
DOT(bf16_4, load_bf16, 2, 4, 4, 4)
DOT(bf16_8, load_bf16, 2, 8, 2, 2)

/* A single row of x: rows of w one after the other, from end to end, for which memory gives a core
   half as much again as for four in turns. Two sums, since one would wait for itself. */
#define DOT1(NAME, LOAD, SIZE)                                                                    \
    static void NAME(const uint16_t *x, int64_t pitch, const uint8_t *const *w, int64_t k,        \
                     float out[8][4]) {                                                           \
        __m512 sums[4];                                                                           \
        (void)pitch;                                                                              \
        for (int j = 0; j < 4; ++j) {                                                             \
            __m512 even = _mm512_setzero_ps(), odd = even;                                        \
            int64_t c = 0;                                                                        \
            for (; c + 64 <= k; c += 64) {                                                        \
                const uint8_t *from = w[j] + c * SIZE;                                            \
                even = _mm512_dpbf16_ps(even, load_x(x + c), LOAD(from));                         \
                odd = _mm512_dpbf16_ps(odd, load_x(x + c + 32), LOAD(from + 32 * SIZE));          \
            }                                                                                     \
            for (; c < k; c += 32) {                                                              \
                const uint8_t *from = w[j] + c * SIZE;                                            \
                uint8_t last[32 * SIZE] = {0};                                                    \
                if (k - c < 32) from = memcpy(last, from, (size_t)(k - c) * SIZE);                \
                even = _mm512_dpbf16_ps(even, load_x(x + c), LOAD(from));                         \
            }                                                                                     \
            sums[j] = _mm512_add_ps(even, odd);                                                   \
        }                                                                                         \
        reduce4(sums, out[0]);                                                                    \
    }

DOT1(int8_1, load_int8, 1)
DOT1(fp8_1, load_fp8, 1)
DOT1(bf16_1, load_bf16, 2)

static inline __m512bh codes(__m512i words) {
    return (__m512bh)_mm512_or_si512(words, _mm512_set1_epi16(0x4300));
}

/* The same for int4, whose rows of w are numbered; x_sums[i, q] are x's sums over groups. */
#define DOT4(NAME, ROWS, COLUMNS)                                                                 \
    static void NAME(const uint16_t *x, int64_t pitch, const float *x_sums, const Packed *w,      \
                     const int64_t *numbers, float out[8][4]) {                                   \
        int64_t groups = w->k / w->group, half = w->group / 2;                                    \
        __m512 sums[ROWS][COLUMNS];                                                               \
        float through[ROWS][COLUMNS] = {{0}};                                                     \
        for (int i = 0; i < ROWS; ++i)                                                            \
            for (int j = 0; j < COLUMNS; ++j) sums[i][j] = _mm512_setzero_ps();                   \
        for (int64_t q = 0; q < groups; ++q) {                                                    \
            for (int j = 0; j < COLUMNS; ++j) {                                                   \
                const uint8_t *pairs = w->data + (numbers[j] * w->k + q * w->group) / 2;          \
                int64_t index = numbers[j] * groups + q;                                          \
                float scale = from_bf16(((const uint16_t *)w->scale)[index]);                     \
                float offset = from_bf16(w->offset[index]) - 128 * scale;                         \
                __m512 of_group[ROWS];                                                            \
                for (int i = 0; i < ROWS; ++i) of_group[i] = _mm512_setzero_ps();                 \
                __builtin_prefetch(pairs + 1024);                                                 \
                for (int64_t c = 0; c < half; c += 32) {                                          \
                    __m512i both =                                                                \
                        _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(pairs + c)));   \
                    __m512bh low = codes(_mm512_and_si512(both, _mm512_set1_epi16(15)));          \
                    __m512bh high = codes(_mm512_srli_epi16(both, 4));                            \
                    for (int i = 0; i < ROWS; ++i) {                                              \
                        const uint16_t *row = x + i * pitch + q * w->group + c;                   \
                        of_group[i] = _mm512_dpbf16_ps(of_group[i], load_x(row), low);            \
                        of_group[i] = _mm512_dpbf16_ps(of_group[i], load_x(row + half), high);    \
                    }                                                                             \
                }                                                                                 \
                for (int i = 0; i < ROWS; ++i) {                                                  \
                    sums[i][j] = _mm512_fmadd_ps(of_group[i], _mm512_set1_ps(scale), sums[i][j]); \
                    through[i][j] += offset * x_sums[i * groups + q];                             \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        for (int i = 0; i < ROWS; ++i)                                                            \
            for (int j = 0; j < COLUMNS; ++j)                                                     \
                out[i][j] = _mm512_reduce_add_ps(sums[i][j]) + through[i][j];                     \
    }

DOT4(int4_1, 1, 4)
DOT4(int4_4, 4, 4)
DOT4(int4_8, 8, 2)

#define PICK(FORMAT, ...)                                                                         \
    (rows == 1 ? FORMAT##_1(__VA_ARGS__) : rows == 4 ? FORMAT##_4(__VA_ARGS__)                    \
                                                     : FORMAT##_8(__VA_ARGS__))

/* out[i][j] = x[top + i]·w[first + j] for `rows` rows of x; rows of w beyond n are not read. */
static inline void dots(const Rows *x, int64_t top, int rows, const Packed *w, int64_t first,
                        int64_t n, float out[8][4]) {
    const uint16_t *block = x->data + top * x->pitch;
    int columns = columns_at_once(rows);
    int64_t numbers[4], bytes = w->format == BF16 ? 2 * w->k : w->k;
    const uint8_t *lines[4];
    for (int j = 0; j < columns; ++j) {
        numbers[j] = first + j < n ? first + j : n - 1;
        lines[j] = w->data + numbers[j] * bytes;
    }
#if HAS_FIXED_POINT
    if (x->fixed && w->format == INT4) {
        for (int j = 0; j < columns; ++j) out[0][j] = int4_fixed(x->fixed, x->sums, w, numbers[j]);
        return;
    }
#endif
    if (w->format == INT4) {
        PICK(int4, block, x->pitch, x->sums + top * (w->k / w->group), w, numbers, out);
        return;
    }
    if (w->format == BF16) {
        PICK(bf16, block, x->pitch, lines, w->k, out);
        return;
    }
    if (w->format == FP8)
        PICK(fp8, block, x->pitch, lines, w->k, out);
#if HAS_FIXED_POINT
    else if (x->fixed) {
        __m512 sums[4];
        for (int j = 0; j < 4; ++j) sums[j] = int8_fixed(x->fixed, lines[j], w->k);
        reduce4(sums, out[0]);
        for (int j = 0; j < 4; ++j) out[0][j] -= 128 * x->fixed->sum;
    }
#endif
    else
        PICK(int8, block, x->pitch, lines, w->k, out);
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) out[i][j] *= ((const float *)w->scale)[numbers[j]];
}

/* h·g for h [r], zero-padded to a multiple of 32, and g [r]. */
static inline float thin_dot(const uint16_t *h, const uint16_t *g, int64_t r) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < r; c += 32) {
        __mmask32 within = r - c >= 32 ? ~0u : (1u << (r - c)) - 1;
        sum = _mm512_dpbf16_ps(sum, load_x(h + c), (__m512bh)_mm512_maskz_loadu_epi16(within, g + c));
    }
    return _mm512_reduce_add_ps(sum);
}

#else
#define HAS_BF16_ROWS 0
#endif

#endif
