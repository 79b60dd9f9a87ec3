/* An int8 product with everything after it: int32 sums never leave the registers' tile.

       y[m, n] (+)= (row[m]·Σ_k q[m, k]·w[k, n] + Σ_p beside[m, p]·w[apart[p], n]
                     + peak[m]·line[m, n])·column[n] + bias[n] + alpha·Σ_r s[m, r]·g[n, r]

   The instruction multiplies unsigned by signed bytes: a panel holds w + 128, and 128·Σ_k q is
   taken off the sum. int32 wraps, so only the final sum must fit. */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <immintrin.h>
#include <stdint.h>

#define NUMBER int8_t
#define SUMS __m512i
#define ZERO _mm512_setzero_si512()
#define DOT(sums, packed, x) _mm512_dpbusd_epi32(sums, packed, x)
#define FLIPPED 0x80

#include "panel_product.h"

const int artemis_has_int8_product = 1;

static void pack_by_input(const Weight *w, Part part, __mmask64 within, NUMBER *panels) {
    const __m512i offset = _mm512_set1_epi8((char)FLIPPED);
    int64_t k = part.to - part.from;
    for (int64_t c = 0; c < k; c += 4) {
        __m512i lines[4];
        for (int j = 0; j < 4; ++j) {
            const NUMBER *from = w->data + (part.from + c + j) * w->pitch + part.first;
            __builtin_prefetch(from + ROWS_AHEAD * w->pitch, 0, 3);
            lines[j] = _mm512_xor_si512(offset, _mm512_maskz_loadu_epi8(within, from));
        }
        __m512i low = _mm512_unpacklo_epi8(lines[0], lines[1]);
        __m512i high = _mm512_unpackhi_epi8(lines[0], lines[1]);
        __m512i low2 = _mm512_unpacklo_epi8(lines[2], lines[3]);
        __m512i high2 = _mm512_unpackhi_epi8(lines[2], lines[3]);
        /* Of each sixteen columns the first four, the next, ... */
        __m512i a = _mm512_unpacklo_epi16(low, low2), b = _mm512_unpackhi_epi16(low, low2);
        __m512i d = _mm512_unpacklo_epi16(high, high2), e = _mm512_unpackhi_epi16(high, high2);
        for (int p = 0; p < 2; ++p) { /* a panel takes two of the four sixteens */
            __m512i ab = p ? _mm512_shuffle_i32x4(a, b, 0xee) : _mm512_shuffle_i32x4(a, b, 0x44);
            __m512i de = p ? _mm512_shuffle_i32x4(d, e, 0xee) : _mm512_shuffle_i32x4(d, e, 0x44);
            NUMBER *to = panels + (p * k + c) * PANEL;
            _mm512_store_si512(to, _mm512_shuffle_i32x4(ab, de, 0x88));
            _mm512_store_si512(to + LINE, _mm512_shuffle_i32x4(ab, de, 0xdd));
        }
    }
}

typedef struct {
    const float *row, *column, *bias; /* [m], [n] or NULL, [n] or NULL */
    const int32_t *shifts;            /* [m], 128·Σ_k q */
    Term beside; /* numbers of x that are not in q, by the rows of w that they meet: */
    const int64_t *apart; /* their places, */
    float *lines;         /* and where they are written as the weight is packed */
    const float *peak;  /* [m] or NULL: of each row a number that is not in q, */
    const int8_t *line; /* [m, n], and the row of w that it meets */
    Term expand;
    void *y;
    int64_t n;
    int accumulate;
} Epilogue;

static int32_t row_sum(const int8_t *q, int64_t k) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t c = 0; c < k; c += 64) {
        __mmask64 within = k - c >= 64 ? ~0ull : (1ull << (k - c)) - 1;
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(within, q + c));
    }
    return _mm512_reduce_add_epi32(sum);
}

/* The rows of w that are apart, of a part's columns: a panel has a quad of each column in a line. */
static void line_up_apart(const void *epilogue, Part part, const NUMBER *panels) {
    const Epilogue *with = epilogue;
    int64_t count = with->beside.size, k = part.to - part.from;
    for (int64_t p = 0; p < count; ++p) {
        int64_t at = with->apart[p] - part.from;
        if (at < 0 || at >= k) continue;
        __m128i bits = _mm_cvtsi64_si128(8 * (at % QUAD));
        const NUMBER *quads = panels + at / QUAD * QUAD * PANEL;
        for (int64_t c = part.first; c < part.last; c += PANEL, quads += k * PANEL)
            for (int h = 0; h < 2; ++h) {
                __m512i line = _mm512_srl_epi32(_mm512_load_si512(quads + h * LINE), bits);
                line = _mm512_xor_si512(line, _mm512_set1_epi32(FLIPPED));
                line = _mm512_cvtepi8_epi32(_mm512_cvtepi32_epi8(line));
                _mm512_storeu_ps(with->lines + c * count + p * PANEL + 16 * h,
                                 _mm512_cvtepi32_ps(line));
            }
    }
}

/* What follows the sums of a half of a panel, but for the accumulation. */
static inline void finished(const Epilogue *with, const int64_t *rows, int64_t first, int h,
                            __mmask16 within, const Tile *tile, __m512 values[TILE_ROWS]) {
    int64_t from = first + 16 * h;
    __m512 column = _mm512_set1_ps(1), bias = _mm512_setzero_ps();
    if (with->column) column = _mm512_maskz_loadu_ps(within, with->column + from);
    if (with->bias) bias = _mm512_maskz_loadu_ps(within, with->bias + from);
    for (int i = 0; i < TILE_ROWS; ++i) {
        __m512i shift = _mm512_set1_epi32(with->shifts[rows[i]]);
        __m512i sum = _mm512_sub_epi32(tile->sums[i][h], shift);
        values[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(with->row[rows[i]]));
        if (!with->peak) continue;
        const int8_t *line = with->line + rows[i] * with->n + from;
        __m512i met = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(within, line));
        values[i] = _mm512_fmadd_ps(_mm512_set1_ps(with->peak[rows[i]]), _mm512_cvtepi32_ps(met),
                                    values[i]);
    }
    add_term(&with->beside, rows, first, h, values);
    for (int i = 0; i < TILE_ROWS; ++i) {
        if (with->column) values[i] = _mm512_mul_ps(values[i], column);
        if (with->bias) values[i] = _mm512_add_ps(values[i], bias);
    }
    add_term(&with->expand, rows, first, h, values);
}

#define PRODUCT(PASS, TYPE, LOAD, LOAD_16, STORE_16)                                              \
    static void PASS##_finish(const void *epilogue, const int64_t *rows, int count,               \
                              int64_t first, const __mmask16 *within, const Tile *tile) {         \
        const Epilogue *with = epilogue;                                                          \
        for (int h = 0; h < 2; ++h) {                                                             \
            __m512 values[TILE_ROWS];                                                             \
            finished(with, rows, first, h, within[h], tile, values);                              \
            for (int i = 0; i < count; ++i) {                                                     \
                TYPE *to = (TYPE *)with->y + rows[i] * with->n + first + 16 * h;                  \
                __m512 value = values[i];                                                         \
                if (with->accumulate) value = _mm512_add_ps(LOAD_16(within[h], to), value);       \
                STORE_16(to, within[h], value);                                                   \
            }                                                                                     \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    void PASS(const int8_t *q, const int8_t *data, const float *row, const float *column,         \
              const float *bias, const int64_t *apart, const float *beside, int64_t count,        \
              const float *peak, const int8_t *line, const TYPE *s, int64_t s_m, const void *g,   \
              int64_t g_n, int64_t g_r, int g_in_bf16, int64_t rank, float alpha, TYPE *y,        \
              int64_t m, int64_t k, int64_t n, int by_output, int accumulate, int threads) {      \
        Weight w = {data, by_output ? k : n, k, n, by_output};                                    \
        Expand expand = {g, g_n, g_r, g_in_bf16, rank};                                           \
        int64_t panels = parts_of(n, PANEL);                                                      \
        int32_t *shifts = malloc(sizeof(int32_t) * (size_t)m);                                    \
        float *left = malloc(sizeof(float) * (size_t)(m * rank + 1));                             \
        float *lines = malloc(sizeof(float) * (size_t)(panels * PANEL * (count + rank) + 1));     \
        float *right = lines + panels * PANEL * count;                                            \
        Epilogue with = {row, column, bias, shifts, {beside, lines, count}, apart, lines, peak,   \
                         line, {left, right, rank}, y, n, accumulate};                            \
        Look *look = count ? line_up_apart : NULL;                                                \
        Product product = product_of(q, m, w, PASS##_finish, look, &with, threads);               \
        _Pragma("omp parallel num_threads(threads) if (m * k * n > 65536)")                       \
        {                                                                                         \
            _Pragma("omp for schedule(static) nowait")                                            \
            for (int64_t i = 0; i < m; ++i) {                                                     \
                shifts[i] = (int32_t)(128u * (uint32_t)row_sum(q + i * k, k)); /* may wrap */     \
                for (int64_t r = 0; r < rank; ++r)                                                \
                    left[i * rank + r] = alpha * LOAD(s[i * s_m + r]);                            \
            }                                                                                     \
            _Pragma("omp for schedule(static)")                                                   \
            for (int64_t p = 0; p < panels; ++p)                                                  \
                line_up(&expand, p * PANEL, n, right + p * PANEL * rank);                         \
            multiply_by_panels(&product);                                                         \
        }                                                                                         \
        free(lines);                                                                              \
        free(left);                                                                               \
        free(shifts);                                                                             \
    }

PRODUCT(artemis_int8_product_f32, float, same, load_f32, store_f32)
PRODUCT(artemis_int8_product_bf16, uint16_t, from_bf16, load_bf16, store_bf16)

#else
const int artemis_has_int8_product = 0;
#endif
