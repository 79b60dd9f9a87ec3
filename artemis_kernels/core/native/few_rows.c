/* y = x Wᵀ for a few rows of bf16 x by a packed weight, which is read once and never copied.

   Numbers of int8, e4m3 and int4 fit bf16's eight bits exactly, so the processor's bf16 dot product
   multiplies them as they are; scales come after the fp32 sums. With x's sums over a group, int4's
   offset costs a multiplication a group, and its codes need no conversion: 0x4300 | c is 128 + c. */

#include "formats.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>

static inline __m512i bytes_as_ints(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}

static inline __m512bh paired(__m512 first, __m512 second) {
    return _mm512_cvtne2ps_pbh(second, first);
}

static inline __m512bh load_int8(const uint8_t *p) {
    __m512i first = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
    __m512i second = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 16)));
    return paired(_mm512_cvtepi32_ps(first), _mm512_cvtepi32_ps(second));
}

static inline __m512 e4m3(const uint8_t *p) { /* as from_e4m3, sixteen at a time */
    __m512i bits = bytes_as_ints(p);
    __m512i sign = _mm512_slli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x80)), 24);
    __m512i rest = _mm512_slli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7f)), 20);
    __m512 tiny = _mm512_castsi512_ps(_mm512_or_si512(sign, rest));
    return _mm512_mul_ps(tiny, _mm512_set1_ps(0x1p120f));
}

static inline __m512bh load_fp8(const uint8_t *p) { return paired(e4m3(p), e4m3(p + 16)); }

static inline __m512bh load_x(const uint16_t *p) { return (__m512bh)_mm512_loadu_si512(p); }

/* out[i][j] = Σ x[i, :]·w[j] for ROWS rows of x, zero-padded to `pitch`, by COLUMNS rows of w. */
#define DOT(NAME, LOAD, ROWS, COLUMNS)                                                            \
    static void NAME(const uint16_t *x, int64_t pitch, const uint8_t *const *w, int64_t k,        \
                     float out[8][4]) {                                                           \
        __m512 sums[ROWS][COLUMNS];                                                               \
        for (int i = 0; i < ROWS; ++i)                                                            \
            for (int j = 0; j < COLUMNS; ++j) sums[i][j] = _mm512_setzero_ps();                   \
        for (int64_t c = 0; c < k; c += 32) {                                                     \
            __m512bh values[COLUMNS];                                                             \
            uint8_t last[32] = {0};                                                               \
            for (int j = 0; j < COLUMNS; ++j) {                                                   \
                const uint8_t *from = w[j] + c;                                                   \
                if (k - c < 32) from = memcpy(last, from, (size_t)(k - c));                       \
                values[j] = LOAD(from);                                                           \
                __builtin_prefetch(w[j] + c + 1024);                                              \
            }                                                                                     \
            for (int i = 0; i < ROWS; ++i)                                                        \
                for (int j = 0; j < COLUMNS; ++j)                                                 \
                    sums[i][j] =                                                                  \
                        _mm512_dpbf16_ps(sums[i][j], load_x(x + i * pitch + c), values[j]);       \
        }                                                                                         \
        for (int i = 0; i < ROWS; ++i)                                                            \
            for (int j = 0; j < COLUMNS; ++j) out[i][j] = _mm512_reduce_add_ps(sums[i][j]);       \
    }

DOT(int8_1, load_int8, 1, 4)
DOT(int8_4, load_int8, 4, 4)
DOT(int8_8, load_int8, 8, 2)
DOT(fp8_1, load_fp8, 1, 4)
DOT(fp8_4, load_fp8, 4, 4)
DOT(fp8_8, load_fp8, 8, 2)

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

/* y[m, n] in fp32 for x [padded m, pitch], zeros beyond m and k. 1, 4 or a multiple of 8 padded
   rows; a group of int4 is a multiple of 64. x_sums [padded m, k / group], int4 only. */
void artemis_few_rows_bf16(const uint16_t *x, const float *x_sums, const void *data,
                           const void *scale, const void *offset, float *y, int64_t m,
                           int64_t pitch, int64_t k, int64_t n, int64_t group, int format,
                           int threads) {
    Packed w = {data, scale, offset, k, group, format};
    int rows = m == 1 ? 1 : m <= 4 ? 4 : 8, columns = rows == 8 ? 2 : 4;
#pragma omp parallel for num_threads(threads) schedule(static) if (n * k > 65536)
    for (int64_t first = 0; first < n; first += columns) {
        int64_t numbers[4];
        const uint8_t *lines[4];
        for (int j = 0; j < columns; ++j) {
            numbers[j] = first + j < n ? first + j : n - 1;
            lines[j] = w.data + numbers[j] * k;
        }
        for (int64_t top = 0; top < m; top += rows) {
            float out[8][4];
            const uint16_t *block = x + top * pitch;
            if (format == INT4)
                PICK(int4, block, pitch, x_sums + top * (k / group), &w, numbers, out);
            else if (format == FP8)
                PICK(fp8, block, pitch, lines, k, out);
            else
                PICK(int8, block, pitch, lines, k, out);
            for (int64_t i = top; i < m && i < top + rows; ++i)
                for (int j = 0; j < columns && first + j < n; ++j)
                    y[i * n + first + j] =
                        out[i - top][j] * (format == INT4 ? 1 : ((const float *)scale)[first + j]);
        }
    }
}

#else
/* Callers ask for it only where the processor has bf16 products; this compiler knows none. */
void artemis_few_rows_bf16(const uint16_t *x, const float *x_sums, const void *data,
                           const void *scale, const void *offset, float *y, int64_t m,
                           int64_t pitch, int64_t k, int64_t n, int64_t group, int format,
                           int threads) {
    Packed w = {data, scale, offset, k, group, format};
    (void)x_sums;
#pragma omp parallel for num_threads(threads) schedule(static) if (n * k > 65536)
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < m; ++i) y[i * n + j] = 0;
        for (int64_t from = 0; from < k; from += SLAB) {
            float values[SLAB];
            int64_t count = k - from < SLAB ? k - from : SLAB;
            decode(&w, j, from, count, values);
            for (int64_t i = 0; i < m; ++i)
                for (int64_t c = 0; c < count; ++c)
                    y[i * n + j] += from_bf16(x[i * pitch + from + c]) * values[c];
        }
    }
}
#endif
