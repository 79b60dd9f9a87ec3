/* An int8 product with everything after it: int32 sums never leave the registers' tile.

       y[m, n] (+)= (row[m]·Σ_k q[m, k]·w[k, n] + Σ_p beside[m, p]·w[apart[p], n]
                     + peak[m]·line[m, n])·column[n] + bias[n] + alpha·Σ_r s[m, r]·g[n, r]

   One copy of a weight serves both directions: stored [n, k] (forward), or [k, n] (dX). Either way
   a task packs the columns it owns into panels of 32, four k side by side as the dot product
   instruction takes them, and then passes over all rows, eight at a time.

   The instruction multiplies unsigned by signed bytes: a panel holds w + 128, and 128·Σ_k q is
   taken off the sum. int32 wraps, so only the final sum must fit. */

#include <stdlib.h>

#include "vectors.h"

#define PANEL 32
#define TILE_ROWS 8
#define PACKED_BYTES (512 << 10) /* of a task's panels: half a second-level cache */
#define TASKS_PER_THREAD 2

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

const int artemis_has_int8_product = 1;

typedef struct {
    const int8_t *data; /* [n, k], or [k, n] */
    int64_t k, n;
    int by_output; /* whether it is [n, k] */
} Weight;

typedef struct {
    const float *row, *column, *bias; /* [m], [n] or NULL, [n] or NULL */
    const int64_t *apart;             /* [count], rows of w whose numbers of x are not in q */
    const float *beside;              /* [m, count], those numbers */
    int64_t count;
    const float *peak;  /* [m] or NULL: of each row a number that is not in q, */
    const int8_t *line; /* [m, n], and the row of w that it meets */
    int64_t n;
    const void *g; /* [n, rank], bf16 or fp32, of these strides */
    int64_t g_n, g_r, rank;
    int g_in_bf16;
    const float *s; /* [m, rank], times alpha */
    int accumulate;
} Epilogue;

/* panel[k / 4][32][4] = w + 128 of the columns from `first`; columns beyond n repeat the last. */
static void pack_by_output(const Weight *w, int64_t first, uint8_t *panel) {
    const __m512i offset = _mm512_set1_epi8((char)0x80);
    for (int half = 0; half < 2; ++half)
        for (int64_t c = 0; c < w->k; c += 64) {
            __m512i lines[16];
            int64_t left = w->k - c;
            __mmask64 within = left >= 64 ? ~0ull : (1ull << left) - 1;
            for (int j = 0; j < 16; ++j) {
                int64_t n = first + 16 * half + j;
                n = n < w->n ? n : w->n - 1;
                lines[j] = _mm512_xor_si512(
                    offset, _mm512_maskz_loadu_epi8(within, w->data + n * w->k + c));
            }
            transpose(lines);
            int64_t quads = left >= 64 ? 16 : left / 4;
            for (int j = 0; j < quads; ++j)
                _mm512_store_si512(panel + (c / 4 + j) * 4 * PANEL + 64 * half, lines[j]);
        }
}

static void pack_by_input(const Weight *w, int64_t first, uint8_t *panel) {
    const __m256i offset = _mm256_set1_epi8((char)0x80);
    int64_t left = w->n - first;
    __mmask32 within = left >= PANEL ? ~0u : (1u << left) - 1;
    for (int64_t c = 0; c < w->k; c += 4) {
        __m256i lines[4];
        for (int j = 0; j < 4; ++j)
            lines[j] = _mm256_xor_si256(
                offset, _mm256_maskz_loadu_epi8(within, w->data + (c + j) * w->n + first));
        __m256i low = _mm256_unpacklo_epi8(lines[0], lines[1]);
        __m256i high = _mm256_unpackhi_epi8(lines[0], lines[1]);
        __m256i low2 = _mm256_unpacklo_epi8(lines[2], lines[3]);
        __m256i high2 = _mm256_unpackhi_epi8(lines[2], lines[3]);
        __m256i a = _mm256_unpacklo_epi16(low, low2), b = _mm256_unpackhi_epi16(low, low2);
        __m256i d = _mm256_unpacklo_epi16(high, high2), e = _mm256_unpackhi_epi16(high, high2);
        __m256i *to = (__m256i *)(panel + c * PANEL);
        _mm256_store_si256(to, _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_store_si256(to + 1, _mm256_permute2x128_si256(d, e, 0x20));
        _mm256_store_si256(to + 2, _mm256_permute2x128_si256(a, b, 0x31));
        _mm256_store_si256(to + 3, _mm256_permute2x128_si256(d, e, 0x31));
    }
}

typedef struct { /* of TILE_ROWS rows by PANEL columns */
    __m512i sums[TILE_ROWS][2];
    __m512 values[TILE_ROWS][2];
} Tile;

#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

/* sums[i][j] = Σ_k rows[i][k]·(w + 128)[k, j] of one panel. Sums have names, and a function of their
   own, so that compilers keep all of them in registers. */
__attribute__((noinline)) static void multiply(const int8_t *const *rows, const uint8_t *panel,
                                               int64_t k, Tile *tile) {
#define START(i)                                                                                  \
    const int8_t *row##i = rows[i];                                                               \
    __m512i left##i = _mm512_setzero_si512(), right##i = _mm512_setzero_si512();
#define ADD(i)                                                                                    \
    memcpy(&quad, row##i + c, sizeof quad);                                                       \
    values = _mm512_set1_epi32(quad);                                                             \
    left##i = _mm512_dpbusd_epi32(left##i, left, values);                                         \
    right##i = _mm512_dpbusd_epi32(right##i, right, values);
#define STORE(i) tile->sums[i][0] = left##i, tile->sums[i][1] = right##i;
    EACH_ROW(START)
    for (int64_t c = 0; c < k; c += 4) {
        __m512i left = _mm512_load_si512(panel + c * PANEL), values;
        __m512i right = _mm512_load_si512(panel + c * PANEL + 64);
        int32_t quad;
        EACH_ROW(ADD)
    }
    EACH_ROW(STORE)
#undef START
#undef ADD
#undef STORE
}

static int32_t row_sum(const int8_t *q, int64_t k) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t c = 0; c < k; c += 64) {
        __mmask64 within = k - c >= 64 ? ~0ull : (1ull << (k - c)) - 1;
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(within, q + c));
    }
    return _mm512_reduce_add_epi32(sum);
}

/* A multiple of PANEL: as many as fit the cache, in a number of tasks that the threads share out. */
static int64_t columns_of_a_task(int64_t k, int64_t n, int threads) {
    int64_t all = (n + PANEL - 1) / PANEL, most = PACKED_BYTES / (PANEL * k);
    int64_t tasks = most > 1 ? (all + most - 1) / most : all;
    int64_t shared = (int64_t)threads * TASKS_PER_THREAD;
    tasks = (tasks + shared - 1) / shared * shared;
    return (all + tasks - 1) / tasks * PANEL;
}

/* lines[count + rank][32] = the rows apart of a panel, and its columns of gᵀ. */
static void gather(const uint8_t *panel, const Epilogue *with, int64_t first, int64_t n,
                   float *lines) {
    for (int64_t p = 0; p < with->count; ++p, lines += PANEL) {
        int64_t k = with->apart[p];
        const uint8_t *quads = panel + k / 4 * 4 * PANEL + k % 4;
        for (int j = 0; j < PANEL; ++j) lines[j] = (float)(quads[4 * j] - 128);
    }
    for (int64_t r = 0; r < with->rank; ++r, lines += PANEL)
        for (int64_t j = 0; j < PANEL; ++j) {
            int64_t at = (first + j < n ? first + j : n - 1) * with->g_n + r * with->g_r;
            lines[j] = with->g_in_bf16 ? from_bf16(((const uint16_t *)with->g)[at])
                                       : ((const float *)with->g)[at];
        }
}

/* values[i][h] += of[rows[i], :]·lines for of [m, size]. */
static inline void add_outer(const float *of, int64_t size, const int64_t *rows,
                             const float *lines, int h, Tile *tile) {
    for (int64_t r = 0; r < size; ++r) {
        __m512 line = _mm512_loadu_ps(lines + r * PANEL + 16 * h);
        for (int i = 0; i < TILE_ROWS; ++i)
            tile->values[i][h] = _mm512_fmadd_ps(_mm512_set1_ps(of[rows[i] * size + r]), line,
                                                 tile->values[i][h]);
    }
}

/* What follows the sums, for columns `first` on, of which `within` exist. */
static inline void finish(const Epilogue *with, const int64_t *rows, const int32_t *shifts,
                          const float *lines, int64_t first, const __mmask16 *within, Tile *tile) {
    for (int h = 0; h < 2; ++h) {
        int64_t from = first + 16 * h;
        __m512 column = _mm512_set1_ps(1), bias = _mm512_setzero_ps();
        if (with->column) column = _mm512_maskz_loadu_ps(within[h], with->column + from);
        if (with->bias) bias = _mm512_maskz_loadu_ps(within[h], with->bias + from);
        for (int i = 0; i < TILE_ROWS; ++i) {
            __m512i sum = _mm512_sub_epi32(tile->sums[i][h], _mm512_set1_epi32(shifts[i]));
            __m512 row = _mm512_set1_ps(with->row[rows[i]]);
            __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), row);
            if (with->peak) {
                const int8_t *line = with->line + rows[i] * with->n + from;
                __m512 met = _mm512_cvtepi32_ps(
                    _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(within[h], line)));
                value = _mm512_fmadd_ps(_mm512_set1_ps(with->peak[rows[i]]), met, value);
            }
            tile->values[i][h] = value;
        }
        add_outer(with->beside, with->count, rows, lines, h, tile);
        for (int i = 0; i < TILE_ROWS; ++i) {
            __m512 value = tile->values[i][h];
            if (with->column) value = _mm512_mul_ps(value, column);
            tile->values[i][h] = with->bias ? _mm512_add_ps(value, bias) : value;
        }
        add_outer(with->s, with->rank, rows, lines + with->count * PANEL, h, tile);
    }
}

#define PRODUCT(PASS, TYPE, LOAD, LOAD_16, STORE_16)                                              \
    /* Columns first to last of y, by way of panels[last − first, k] and lines. */                \
    static void PASS##_columns(const int8_t *q, const int32_t *sums, const Weight *w,             \
                               const Epilogue *with, int64_t m, int64_t first, int64_t last,      \
                               uint8_t *panels, float *lines, TYPE *y) {                          \
        for (int64_t c = first; c < last; c += PANEL) {                                           \
            uint8_t *panel = panels + (c - first) * w->k;                                         \
            (w->by_output ? pack_by_output : pack_by_input)(w, c, panel);                         \
            gather(panel, with, c, w->n, lines + (c - first) * (with->count + with->rank));       \
        }                                                                                         \
        for (int64_t top = 0; top < m; top += TILE_ROWS) {                                        \
            const int8_t *rows_of_q[TILE_ROWS];                                                   \
            int64_t rows[TILE_ROWS];                                                              \
            int32_t shifts[TILE_ROWS];                                                            \
            for (int64_t i = 0; i < TILE_ROWS; ++i) { /* beyond the last row, that one again */   \
                rows[i] = top + i < m ? top + i : m - 1;                                          \
                rows_of_q[i] = q + rows[i] * w->k;                                                \
                shifts[i] = (int32_t)(128u * (uint32_t)sums[rows[i]]); /* wraps, as sums do */    \
            }                                                                                     \
            for (int64_t c = first; c < last; c += PANEL) {                                       \
                Tile tile;                                                                        \
                uint32_t columns = last - c < PANEL ? (1u << (last - c)) - 1 : ~0u;               \
                __mmask16 within[2] = {(__mmask16)columns, (__mmask16)(columns >> 16)};           \
                multiply(rows_of_q, panels + (c - first) * w->k, w->k, &tile);                    \
                finish(with, rows, shifts, lines + (c - first) * (with->count + with->rank), c,   \
                       within, &tile);                                                            \
                for (int i = 0; i < TILE_ROWS && top + i < m; ++i)                                \
                    for (int h = 0; h < 2; ++h) {                                                 \
                        TYPE *to = y + rows[i] * w->n + c + 16 * h;                               \
                        __m512 value = tile.values[i][h];                                         \
                        if (with->accumulate)                                                     \
                            value = _mm512_add_ps(LOAD_16(within[h], to), value);                 \
                        STORE_16(to, within[h], value);                                           \
                    }                                                                             \
            }                                                                                     \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    void PASS(const int8_t *q, const int8_t *data, const float *row, const float *column,         \
              const float *bias, const int64_t *apart, const float *beside, int64_t count,        \
              const float *peak, const int8_t *line,                                              \
              const TYPE *s, int64_t s_pitch, const void *g, int64_t g_n, int64_t g_r,            \
              int g_in_bf16, int64_t rank, float alpha, TYPE *y, int64_t m, int64_t k, int64_t n, \
              int by_output, int accumulate, int threads) {                                       \
        Weight w = {data, k, n, by_output};                                                       \
        float *scaled = malloc(sizeof(float) * (size_t)(m * rank + 1));                           \
        Epilogue with = {row, column, bias, apart, beside, count, peak, line, n,                  \
                         g, g_n, g_r, rank, g_in_bf16, scaled, accumulate};                       \
        int64_t each = columns_of_a_task(k, n, threads);                                          \
        int32_t *sums = malloc(sizeof(int32_t) * (size_t)m);                                      \
        _Pragma("omp parallel num_threads(threads) if (m * k * n > 65536)")                       \
        {                                                                                         \
            uint8_t *panels = aligned_alloc(64, (size_t)(each * k + 63) / 64 * 64);               \
            float *lines = malloc(sizeof(float) * (size_t)(each * (count + rank) + 1));           \
            _Pragma("omp for schedule(static)")                                                   \
            for (int64_t i = 0; i < m; ++i) {                                                     \
                sums[i] = row_sum(q + i * k, k);                                                  \
                for (int64_t r = 0; r < rank; ++r)                                                \
                    scaled[i * rank + r] = alpha * LOAD(s[i * s_pitch + r]);                      \
            }                                                                                     \
            _Pragma("omp for schedule(dynamic)")                                                  \
            for (int64_t first = 0; first < n; first += each)                                     \
                PASS##_columns(q, sums, &w, &with, m, first,                                      \
                               first + each < n ? first + each : n, panels, lines, y);            \
            free(lines);                                                                          \
            free(panels);                                                                         \
        }                                                                                         \
        free(sums);                                                                               \
        free(scaled);                                                                             \
    }

PRODUCT(artemis_int8_product_f32, float, same, load_f32, store_f32)
PRODUCT(artemis_int8_product_bf16, uint16_t, from_bf16, load_bf16, store_bf16)

#else
const int artemis_has_int8_product = 0;
#endif
