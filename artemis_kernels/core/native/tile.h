/* A tile of a product, of rows by a panel of columns, and low-rank terms that are added to its sums
   while these are in registers. */

#ifndef ARTEMIS_TILE_H
#define ARTEMIS_TILE_H

#include "vectors.h"

#define PANEL 32
#define TILE_ROWS 8

static inline int64_t parts_of(int64_t whole, int64_t most) { return (whole + most - 1) / most; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* left·right, of `size` products each. */
typedef struct {
    const float *left;  /* [m, size] */
    const float *right; /* [panels, size, PANEL] */
    int64_t size;
} Term;

/* values[i] += row rows[i] of the term, at half h of the panel of columns `first` on. */
static inline void add_term(const Term *term, const int64_t *rows, int64_t first, int h,
                            __m512 values[TILE_ROWS]) {
    const float *lines = term->right + first * term->size + 16 * h;
    for (int64_t r = 0; r < term->size; ++r) {
        __m512 line = _mm512_loadu_ps(lines + r * PANEL);
        for (int i = 0; i < TILE_ROWS; ++i)
            values[i] = _mm512_fmadd_ps(_mm512_set1_ps(term->left[rows[i] * term->size + r]), line,
                                        values[i]);
    }
}

/* What a low-rank term has on the right, as it is handed over: gᵀ for g [n, rank], bf16 or fp32. */
typedef struct {
    const void *g;
    int64_t g_n, g_r; /* strides */
    int g_in_bf16;
    int64_t rank;
} Expand;

/* right[rank, PANEL] = gᵀ of columns `first` on; those beyond n repeat the last. */
static inline void line_up(const Expand *e, int64_t first, int64_t n, float *right) {
    for (int64_t r = 0; r < e->rank; ++r)
        for (int64_t j = 0; j < PANEL; ++j) {
            int64_t at = smaller(first + j, n - 1) * e->g_n + r * e->g_r;
            right[r * PANEL + j] = e->g_in_bf16 ? from_bf16(((const uint16_t *)e->g)[at])
                                                : ((const float *)e->g)[at];
        }
}

#endif
