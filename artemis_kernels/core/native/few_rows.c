/* y = x Wᵀ for a few rows of bf16 x by a packed weight, which is read once and never copied. */

#include "dots.h"

const int artemis_has_bf16_rows = HAS_BF16_ROWS; /* this pass, and that of frozen.c */

#if HAS_BF16_ROWS
/* y[m, n] in fp32; x and x_sums as in `Rows`. */
void artemis_few_rows_bf16(const uint16_t *x, const float *x_sums, const void *data,
                           const void *scale, const void *offset, float *y, int64_t m,
                           int64_t pitch, int64_t k, int64_t n, int64_t group, int format,
                           int threads) {
    Packed w = {data, scale, offset, k, group, format};
    Rows block = {x, pitch, x_sums, NULL};
    int rows = rows_at_once(m), columns = columns_at_once(rows);
#pragma omp parallel for num_threads(threads) schedule(static) if (n * k > 65536)
    for (int64_t first = 0; first < n; first += columns)
        for (int64_t top = 0; top < m; top += rows) {
            float out[8][4];
            dots(&block, top, rows, &w, first, n, out);
            for (int64_t i = top; i < m && i < top + rows; ++i)
                for (int j = 0; j < columns && first + j < n; ++j)
                    y[i * n + first + j] = out[i - top][j];
        }
}
#endif
