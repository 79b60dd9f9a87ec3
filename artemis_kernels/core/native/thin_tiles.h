/* Tiles of products of bf16 matrices, sums in fp32: what the passes over thin products share.

       y[m, n] = start[m, n] + bias[n] + alpha·Σ_k a[m, k]·b[k, n]

   Numbers of b are packed into panels of 32 columns, two k side by side as the dot product
   instruction takes them; those of a are broadcast in pairs. What is held in fp32 (parameters) or
   int8 (a base) becomes bf16 on the way. */

#ifndef ARTEMIS_THIN_TILES_H
#define ARTEMIS_THIN_TILES_H

#include <stdlib.h>

#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)
#define HAS_THIN_TILES 1

#define PANEL 32
#define TILE_ROWS 8
#define SUBNORMAL 0x20 /* a class of fp32 numbers, to the processor */
#define AHEAD 16       /* rows of b that are asked for before they are packed */

enum { BF16, F32, INT8 }; /* as numbered in core/thin_products.py */

typedef struct {
    const void *data;
    int64_t row, column; /* strides, in numbers */
    int held;
} Matrix;

typedef struct { /* pairs of k of each row: a matrix [m, k] as the tiles read it */
    const uint8_t *data;
    int64_t row, pair; /* strides, in bytes */
    int64_t pairs;
    int odd; /* whether half a pair follows, whose other half is not ours to read */
} Rows;

enum { ADDED, ROUNDED, WIDE, TRANSPOSED }; /* likewise */

typedef struct {
    int kind;
    const uint16_t *start; /* [m, n], bf16; only ADDED */
    int64_t start_row;
    const float *bias; /* [n] or NULL */
    float alpha;
    void *y; /* [m, n] in bf16, or in fp32 where WIDE or TRANSPOSED ([n, m]) */
    int64_t y_row;
    float *last; /* [n] or NULL: where row m goes, one more than y has; only TRANSPOSED */
    int64_t m;
} Output;

static inline uint16_t number(const Matrix *of, int64_t row, int64_t column) {
    int64_t at = row * of->row + column * of->column;
    if (of->held == F32) return to_bf16(((const float *)of->data)[at]);
    if (of->held == INT8) return to_bf16(((const int8_t *)of->data)[at]);
    return ((const uint16_t *)of->data)[at];
}

/* Sixteen numbers of a row in the low halves; their columns lie side by side. */
static inline __m512i numbers_of(const Matrix *of, __mmask16 within, int64_t row, int64_t column) {
    int64_t at = row * of->row + column;
    if (of->held == F32) return bf16_bits(load_f32(within, (const float *)of->data + at));
    if (of->held == INT8) { /* eight bits fit bf16's eight */
        __m128i bytes = _mm_maskz_loadu_epi8(within, (const int8_t *)of->data + at);
        __m512 exact = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
        return _mm512_srli_epi32(_mm512_castps_si512(exact), 16);
    }
    return _mm512_cvtepu16_epi32(
        _mm256_maskz_loadu_epi16(within, (const uint16_t *)of->data + at));
}

static inline void prefetch(const Matrix *of, int64_t row, int64_t column) {
    static const int64_t sizes[] = {2, 4, 1};
    __builtin_prefetch((const char *)of->data + (row * of->row + column) * sizes[of->held],
                       0, 2); /* into the second level: rows 4 KiB apart share a set of the first */
}

static inline __m512i paired(__m512i first, __m512i second) {
    return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

/* Up to sixteen pairs of k of a column whose numbers lie side by side; zeros beyond k. */
static inline __m512i pairs_of(const Matrix *b, int64_t k, int64_t from, int64_t column) {
    Matrix across = {b->data, b->column, b->row, b->held};
    __m256i halves[2];
    for (int i = 0; i < 2; ++i) {
        int64_t at = from + 16 * i;
        halves[i] = _mm512_cvtepi32_epi16(numbers_of(&across, first_of(k - at), column, at));
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
}

/* pairs[32] of two whole lines. Unpacking pairs the numbers of each quarter of a register: its low
   half from the first sixteen columns, its high half from the others. */
static inline void pack_lines(const uint16_t *even, const uint16_t *odd, uint32_t *pairs) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    __m512i first = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(even));
    __m512i second = odd ? _mm512_permutexvar_epi64(order, _mm512_loadu_si512(odd))
                         : _mm512_setzero_si512();
    _mm512_store_si512(pairs, _mm512_unpacklo_epi16(first, second));
    _mm512_store_si512(pairs + 16, _mm512_unpackhi_epi16(first, second));
}

/* pairs[32] of rows 2·p and 2·p + 1, whose numbers lie side by side; of `left` columns. */
static inline void pack_rows(const Matrix *b, int64_t k, int64_t p, int64_t first, int64_t left,
                             uint32_t *pairs) {
    int whole = 2 * p + 1 < k;
    if (b->held == BF16 && left >= PANEL) {
        const uint16_t *even = (const uint16_t *)b->data + 2 * p * b->row + first;
        pack_lines(even, whole ? even + b->row : NULL, pairs);
        return;
    }
    uint32_t columns = left < PANEL ? (1u << left) - 1 : ~0u;
    for (int h = 0; h < 2; ++h) {
        __mmask16 within = (__mmask16)(columns >> 16 * h);
        __m512i even = numbers_of(b, within, 2 * p, first + 16 * h), odd = {0};
        if (whole) odd = numbers_of(b, within, 2 * p + 1, first + 16 * h);
        _mm512_store_si512(pairs + 16 * h, paired(even, odd));
    }
}

/* packed[panel][`until` − `from`][32][2] of panels `panel` to `last`: pairs `from` to `until` of k,
   zeros beyond n and k. Rows are read in one piece across all panels. */
static void pack(const Matrix *b, int64_t k, int64_t n, int64_t panel, int64_t last, int64_t from,
                 int64_t until, uint32_t *packed) {
    int64_t step = (until - from) * PANEL;
    if (b->column == 1) {
        for (int64_t p = from; p < until; ++p)
            for (int64_t i = panel; i < last; ++i) {
                if (2 * p + 1 + AHEAD < k) {
                    prefetch(b, 2 * p + AHEAD, i * PANEL);
                    prefetch(b, 2 * p + 1 + AHEAD, i * PANEL);
                }
                pack_rows(b, k, p, i * PANEL, n - i * PANEL,
                          packed + (i - panel) * step + (p - from) * PANEL);
            }
        return;
    }
    for (int64_t i = panel; i < last; ++i, packed += step) {
        int64_t first = i * PANEL, left = n - first < PANEL ? n - first : PANEL;
        if (b->row == 1) {
            for (int h = 0; h < 2; ++h)
                for (int64_t p = from; p < until; p += 16) {
                    __m512i lines[16];
                    for (int64_t j = 0; j < 16; ++j)
                        lines[j] = 16 * h + j < left ? pairs_of(b, k, 2 * p, first + 16 * h + j)
                                                     : _mm512_setzero_si512();
                    transpose(lines);
                    for (int64_t q = 0; q < 16 && p + q < until; ++q)
                        _mm512_store_si512(packed + (p - from + q) * PANEL + 16 * h, lines[q]);
                }
            continue;
        }
        for (int64_t j = 0; j < PANEL; ++j)
            for (int64_t p = from; p < until; ++p) {
                uint32_t even = j < left ? number(b, 2 * p, first + j) : 0;
                uint32_t odd = j < left && 2 * p + 1 < k ? number(b, 2 * p + 1, first + j) : 0;
                packed[(p - from) * PANEL + j] = even | odd << 16;
            }
    }
}

typedef struct {
    __m512 sums[TILE_ROWS][2];
} Tile;

#define FOUR_ROWS(DO) DO(0) DO(1) DO(2) DO(3)
#define EACH_ROW(DO) FOUR_ROWS(DO) DO(4) DO(5) DO(6) DO(7)

#define START(i)                                                                                  \
    const uint8_t *row##i = rows[i];                                                              \
    __m512 left##i = goes_on ? tile->sums[i][0] : _mm512_setzero_ps();                            \
    __m512 right##i = goes_on ? tile->sums[i][1] : _mm512_setzero_ps();
#define ADD_LEFT(i)                                                                               \
    memcpy(&pair, row##i + p * a->pair, size);                                                    \
    values = (__m512bh)_mm512_set1_epi32((int)pair);                                              \
    left##i = _mm512_dpbf16_ps(left##i, values, left);
#define ADD_BOTH(i) ADD_LEFT(i) right##i = _mm512_dpbf16_ps(right##i, values, right);
#define STORE(i) tile->sums[i][0] = left##i, tile->sums[i][1] = right##i;

/* Sums of some rows by one panel, added to the tile's where they go on. They have names, and a
   function of their own, so that compilers keep all of them in registers. */
#define MULTIPLY(NAME, ROWS, ADD)                                                                 \
    __attribute__((noinline)) static void NAME(const Rows *a, const uint8_t *const *rows,         \
                                               const uint32_t *panel, Tile *tile, int goes_on) {  \
        ROWS(START)                                                                               \
        __m512bh values, left, right;                                                             \
        uint32_t pair = 0;                                                                        \
        int64_t p = 0;                                                                            \
        for (; p < a->pairs; ++p) {                                                               \
            enum { size = 4 };                                                                    \
            left = (__m512bh)_mm512_load_si512(panel + p * PANEL);                                \
            right = (__m512bh)_mm512_load_si512(panel + p * PANEL + 16);                          \
            ROWS(ADD)                                                                             \
        }                                                                                         \
        if (a->odd) {                                                                             \
            enum { size = 2 };                                                                    \
            pair = 0;                                                                             \
            left = (__m512bh)_mm512_load_si512(panel + p * PANEL);                                \
            right = (__m512bh)_mm512_load_si512(panel + p * PANEL + 16);                          \
            ROWS(ADD)                                                                             \
        }                                                                                         \
        (void)right;                                                                              \
        ROWS(STORE)                                                                               \
    }

MULTIPLY(multiply_whole, EACH_ROW, ADD_BOTH)
MULTIPLY(multiply_left, EACH_ROW, ADD_LEFT) /* at most 16 columns */
MULTIPLY(multiply_four, FOUR_ROWS, ADD_BOTH)
MULTIPLY(multiply_four_left, FOUR_ROWS, ADD_LEFT)

/* Rows `top` to `top` + `count` by a panel of `width` columns; pairs from `from` on. */
static inline void multiply(const Rows *a, int64_t top, int64_t count, int64_t from, int64_t width,
                            const uint32_t *panel, Tile *tile, int goes_on) {
    const uint8_t *rows[TILE_ROWS];
    for (int64_t i = 0; i < TILE_ROWS; ++i) /* beyond the last row, that one again */
        rows[i] = a->data + (top + (i < count ? i : count - 1)) * a->row + from * a->pair;
    if (count > 4)
        (width > 16 ? multiply_whole : multiply_left)(a, rows, panel, tile, goes_on);
    else
        (width > 16 ? multiply_four : multiply_four_left)(a, rows, panel, tile, goes_on);
}

/* What follows the sums of `count` rows from `top` on and `width` columns from `first` on; `kind` and
   `whole` (all PANEL columns) are constants, for which the compiler makes a loop of its own. */
static inline __attribute__((always_inline)) void write_tile(const Output *to, const Tile *tile,
                                                             int64_t top, int64_t count,
                                                             int64_t first, int64_t width,
                                                             const int kind, const int whole) {
    float values[TILE_ROWS][PANEL];
    __m512 alpha = _mm512_set1_ps(to->alpha);
    for (int h = 0; h < 2 && 16 * h < width; ++h) {
        int64_t from = first + 16 * h, left = width - 16 * h;
        __mmask16 within = whole ? 0xffff : first_of(left);
        __m512 bias = _mm512_setzero_ps();
        if (to->bias) bias = load_f32(within, to->bias + from);
        for (int64_t i = 0; i < count; ++i) {
            __m512 value = _mm512_fmadd_ps(tile->sums[i][h], alpha, bias);
            int64_t at = (top + i) * to->y_row + from;
            if (kind == ADDED) {
                const uint16_t *start = to->start + (top + i) * to->start_row + from;
                value = _mm512_add_ps(load_bf16(within, start), value);
            }
            if (kind == TRANSPOSED)
                _mm512_storeu_ps(values[i] + 16 * h, value);
            else if (kind == WIDE)
                store_f32((float *)to->y + at, within, value);
            else if (_mm512_fpclass_ps_mask(value, SUBNORMAL)) /* which the next would take for 0 */
                store_bf16((uint16_t *)to->y + at, within, value);
            else
                _mm256_mask_storeu_epi16((uint16_t *)to->y + at, within,
                                         (__m256i)_mm512_cvtneps_pbh(value));
        }
    }
    if (kind != TRANSPOSED) return;
    int64_t inside = top + count > to->m ? to->m - top : count;
    for (int64_t j = 0; j < width; ++j) {
        float *line = (float *)to->y + (first + j) * to->y_row + top;
        for (int64_t i = 0; i < inside; ++i) line[i] = values[i][j];
        if (inside < count) to->last[first + j] = values[inside][j];
    }
}

static void finish(const Output *to, const Tile *tile, int64_t top, int64_t count, int64_t first,
                   int64_t width) {
    if (to->kind == ADDED && width == PANEL && count == TILE_ROWS)
        write_tile(to, tile, top, TILE_ROWS, first, PANEL, ADDED, 1);
    else if (to->kind == ADDED)
        write_tile(to, tile, top, count, first, width, ADDED, 0);
    else if (to->kind == ROUNDED)
        write_tile(to, tile, top, count, first, width, ROUNDED, 0);
    else if (to->kind == WIDE)
        write_tile(to, tile, top, count, first, width, WIDE, 0);
    else
        write_tile(to, tile, top, count, first, width, TRANSPOSED, 0);
}

/* Rows `from` to `until` by all n columns, whose panels are packed. */
static void block(const Rows *a, const uint32_t *panels, int64_t k, int64_t from, int64_t until,
                  int64_t n, const Output *to) {
    for (int64_t top = from; top < until; top += TILE_ROWS) {
        int64_t count = until - top < TILE_ROWS ? until - top : TILE_ROWS;
        const uint32_t *panel = panels;
        for (int64_t c = 0; c < n; c += PANEL, panel += (k + 1) / 2 * PANEL) {
            Tile tile;
            int64_t width = n - c < PANEL ? n - c : PANEL;
            multiply(a, top, count, 0, width, panel, &tile, 0);
            finish(to, &tile, top, count, c, width);
        }
    }
}

static void *room_for(int64_t bytes) { return aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64); }

/* All panels of b, shared out among the threads of a team, which waits for all of them. */
static void pack_all(const Matrix *b, int64_t k, int64_t n, int threads, uint32_t *packed) {
    int64_t pairs = (k + 1) / 2, panels = (n + PANEL - 1) / PANEL;
    int64_t parts = panels < threads ? threads : 1; /* of a panel */
    _Pragma("omp for schedule(static)")
    for (int64_t p = 0; p < panels * parts; ++p) {
        int64_t panel = p / parts, part = p % parts, from = part * pairs / parts;
        pack(b, k, n, panel, panel + 1, from, (part + 1) * pairs / parts,
             packed + (panel * pairs + from) * PANEL);
    }
}

static uint32_t *room_for_panels(int64_t k, int64_t n) {
    return room_for((k + 1) / 2 * ((n + PANEL - 1) / PANEL) * PANEL * (int64_t)sizeof(uint32_t));
}

#else
#define HAS_THIN_TILES 0
#endif

#endif
