/* A frozen adapted layer over a few rows of bf16, all of it in one pass:

       y1 = x Wᵀ + bias     z = from Fᵀ + c     y = y1 + σ·act(z) Gᵀ

   where `from` is x, or y1 rounded to bf16. Sums and y1 are fp32, h = act(z) is bf16; W of any
   format is read once. */

#include <stdlib.h>

#include "dots.h"
#include "units.h"

#if HAS_BF16_ROWS
typedef struct {
    const uint16_t *down, *up, *bias, *bias_down; /* F [r, k or n], G [n, r], [n], [r] or NULL */
    int64_t r;
    float scale;
    int activation;
} Adapter;

static float activated(float z, int activation) {
    float value, slope;
    switch (activation) {
    case RELU: relu_f(z, &value, &slope); break;
    case SILU: silu_f(z, &value, &slope); break;
    case GELU: gelu_f(z, &value, &slope); break;
    case GELU_TANH: gelu_tanh_f(z, &value, &slope); break;
    default: value = z;
    }
    return value;
}

static inline int64_t padded(int64_t size) { return (size + 31) / 32 * 32; }

/* h[m, padded r] = act(from Fᵀ + c), from [padded m, columns of F]; by all threads of a region. */
static void hidden(const Rows *from, int64_t m, int64_t columns, const Adapter *a, uint16_t *h) {
    Packed f = {(const uint8_t *)a->down, NULL, NULL, columns, 0, BF16};
    int rows = rows_at_once(m), step = columns_at_once(rows);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < a->r; first += step)
        for (int64_t top = 0; top < m; top += rows) {
            float out[8][4];
            dots(from, top, rows, &f, first, a->r, out);
            for (int64_t i = top; i < m && i < top + rows; ++i)
                for (int64_t u = first; u < a->r && u < first + step; ++u) {
                    float shift = a->bias_down ? from_bf16(a->bias_down[u]) : 0;
                    float z = out[i - top][u - first] + shift;
                    h[i * padded(a->r) + u] = to_bf16(activated(z, a->activation));
                }
        }
}

static inline float added(const Adapter *a, const uint16_t *h, int64_t i, int64_t n) {
    return a->scale * thin_dot(h + i * padded(a->r), a->up + n * a->r, a->r);
}

/* Copy x [m, k] into padded rows, and its sums over groups behind them. */
static void pad(const uint16_t *x, int64_t m, int64_t k, int64_t group, uint16_t *to, float *sums) {
    for (int64_t i = 0; i < m; ++i) {
        memcpy(to + i * padded(k), x + i * k, (size_t)k * 2);
        for (int64_t q = 0; group && q < k / group; ++q) {
            float sum = 0;
            for (int64_t c = q * group; c < (q + 1) * group; ++c) sum += from_bf16(x[i * k + c]);
            sums[i * (k / group) + q] = sum;
        }
    }
}

/* y [m, n] for x [m, k]. */
void artemis_frozen_bf16(const uint16_t *x, const void *data, const void *scale,
                         const void *offset, const uint16_t *down, const uint16_t *up,
                         const uint16_t *bias, const uint16_t *bias_down, uint16_t *y, int64_t m,
                         int64_t k, int64_t n, int64_t group, int64_t r, float factor, int format,
                         int activation, int reads_output, int threads) {
    Packed w = {data, scale, offset, k, group, format};
    Adapter a = {down, up, bias, bias_down, r, factor, activation};
    int rows = rows_at_once(m), columns = columns_at_once(rows);
    int64_t all = (m + rows - 1) / rows * rows, groups = group ? k / group : 0;
    int64_t blocks = group ? groups : (k + 255) / 256;
    int64_t half = m == 1 ? blocks * (group ? group : 256) + 64 : 0, steps = m == 1 ? blocks : 0;
    int64_t of_y1 = reads_output ? m * n : 0, of_rounded = reads_output ? all * padded(n) : 0;
    int64_t wide = steps + all * groups + of_y1;
    int64_t narrow = all * padded(k) + m * padded(r) + of_rounded;
    size_t bytes = (size_t)(2 * half + 4 * wide + 2 * narrow + 63) / 64 * 64;
    int8_t *scratch = memset(aligned_alloc(64, bytes), 0, bytes);
    Fixed fixed = {scratch, scratch + half, (float *)(scratch + 2 * half), 0};
    float *sums = fixed.steps + steps, *y1 = sums + all * groups;
    uint16_t *held = (uint16_t *)(y1 + of_y1);
    uint16_t *h = held + all * padded(k), *rounded = h + m * padded(r);
    pad(x, m, k, group, held, sums);
    Rows input = {held, padded(k), sums, NULL}, output = {rounded, padded(n), NULL, NULL};
#if HAS_FIXED_POINT
    if (m == 1 && (format == INT8 || format == INT4))
        input.fixed = fix(x, k, group ? group : BLOCK, &fixed) ? &fixed : NULL;
#endif
#pragma omp parallel num_threads(threads) if (n * k > 65536)
    {
        if (!reads_output) hidden(&input, m, k, &a, h);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < n; first += columns)
            for (int64_t top = 0; top < m; top += rows) {
                float out[8][4];
                dots(&input, top, rows, &w, first, n, out);
                for (int64_t i = top; i < m && i < top + rows; ++i)
                    for (int64_t j = first; j < n && j < first + columns; ++j) {
                        float base = out[i - top][j - first] + (bias ? from_bf16(bias[j]) : 0);
                        if (reads_output) {
                            y1[i * n + j] = base;
                            rounded[i * padded(n) + j] = to_bf16(base);
                        } else
                            y[i * n + j] = to_bf16(base + added(&a, h, i, j));
                    }
            }
        if (reads_output) {
            hidden(&output, m, n, &a, h);
#pragma omp for schedule(static)
            for (int64_t j = 0; j < n; ++j)
                for (int64_t i = 0; i < m; ++i)
                    y[i * n + j] = to_bf16(y1[i * n + j] + added(&a, h, i, j));
        }
    }
    free(scratch);
}
#endif
