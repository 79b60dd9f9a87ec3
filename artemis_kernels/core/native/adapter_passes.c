/* What an adapter adds to a product of bf16, and its gradients: one call each.

       bottleneck   y = start + bias + factor·h Uᵀ,  h = dropout(act(z))·σ
       backward     dz = dh·factor·σ·mask·act'(z),  dh = dY U    dU = factor·dYᵀ h
       LoRA's       dS = factor·σ·dY B              dB = factor·σ·dYᵀ s

   and the gradients of σ and of biases on the way. A tile of rows at a time goes through a thin
   product and the units beside it, whose h or dh stays in the first-level cache. */

#include "thin_product.h"
#include "thin_tiles.h"
#include "unit_rows.h"

#if HAS_THIN_TILES

static int64_t even(int64_t count) { return (count + 1) / 2 * 2; }

static double dot(const float *a, const float *b, int64_t count) {
    double sum = 0;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t i = 0; i < count; ++i) sum += (double)a[i] * b[i];
    return sum;
}

/* Σ a ⊙ b for a [n, r], its rows one after the other. */
static double inner(const float *a, const Matrix *b, int64_t n, int64_t r) {
    if (b->held == F32 && b->column == 1 && b->row == r) return dot(a, b->data, n * r);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < r; ++j) {
            int64_t at = i * b->row + j * b->column;
            sum += (double)a[i * r + j] * (b->held == F32 ? ((const float *)b->data)[at]
                                                          : from_bf16(((uint16_t *)b->data)[at]));
        }
    return sum;
}

/* z [m, w]; U [n, w], fp32 or bf16; start and y [m, n]. */
void artemis_bottleneck_forward(const uint16_t *z, int64_t z_row, const void *u, int64_t u_row,
                                int64_t u_column, int u_held, const float *bias,
                                const uint16_t *start, int64_t start_row, uint16_t *y,
                                int64_t y_row, int64_t m, int64_t w, int64_t n, float factor,
                                float scale, int kind, uint64_t seed, uint32_t threshold,
                                float keep_scale, int threads) {
    const Units units = {w, scale, kind, seed, threshold, keep_scale};
    const Matrix b = {u, u_column, u_row, u_held};
    uint32_t *panels = room_for_panels(w, n);
    float *scaled = NULL;
    if (bias) {
        scaled = room_for(n * (int64_t)sizeof *scaled);
        for (int64_t c = 0; c < n; ++c) scaled[c] = bias[c] * (factor * scale);
    }
    _Pragma("omp parallel num_threads(threads) if (m * w * n > 65536)")
    {
        uint16_t *h = room_for(TILE_ROWS * even(w) * (int64_t)sizeof *h);
        pack_all(&b, w, n, threads, panels);
        _Pragma("omp for schedule(static)")
        for (int64_t tile = 0; tile < (m + TILE_ROWS - 1) / TILE_ROWS; ++tile) {
            int64_t top = tile * TILE_ROWS, count = m - top < TILE_ROWS ? m - top : TILE_ROWS;
            for (int64_t i = 0; i < count; ++i) {
                forward_row_f(&units, (top + i) * w, z + (top + i) * z_row, h + i * even(w));
                if (w % 2) h[i * even(w) + w] = 0;
            }
            Rows rows = {(const uint8_t *)h, 2 * even(w), 4, even(w) / 2, 0};
            Output to = {ADDED, start + top * start_row, start_row, scaled, factor,
                         y + top * y_row, y_row, NULL, count};
            block(&rows, panels, w, 0, count, n, &to);
        }
        free(h);
    }
    free(scaled);
    free(panels);
}

/* dz [m, w] and its sum over rows [w]; h [m, w + 1], which ends in ones, unless it is NULL. Returns
   Σ dh·mask·act(z). */
static float through_units(const Matrix *dy, const Matrix *u, const Units *units, float factor,
                           const uint16_t *z, int64_t z_row, uint16_t *dz, int64_t dz_row,
                           float *dz_sum, uint16_t *h, int64_t m, int64_t n, int threads) {
    int64_t w = units->w, parts = (m + ROWS - 1) / ROWS;
    uint32_t *panels = room_for_panels(n, w);
    float *sums = calloc((size_t)(parts * (w + 1)), sizeof *sums);
    _Pragma("omp parallel num_threads(threads) if (m * w * n > 65536)")
    {
        uint16_t *dh = room_for(TILE_ROWS * w * (int64_t)sizeof *dh);
        pack_all(u, n, w, threads, panels);
        _Pragma("omp for schedule(static)")
        for (int64_t p = 0; p < parts; ++p) {
            int64_t last = (p + 1) * ROWS < m ? (p + 1) * ROWS : m;
            for (int64_t top = p * ROWS; top < last; top += TILE_ROWS) {
                int64_t count = last - top < TILE_ROWS ? last - top : TILE_ROWS;
                const uint16_t *from = (const uint16_t *)dy->data + top * dy->row;
                Rows rows = {(const uint8_t *)from, 2 * dy->row, 4, n / 2, n % 2};
                Output to = {ROUNDED, NULL, 0, NULL, 1, dh, w, NULL, count};
                block(&rows, panels, n, 0, count, w, &to);
                for (int64_t i = 0; i < count; ++i) {
                    int64_t row = top + i;
                    uint16_t *line = h ? h + row * (w + 1) : NULL;
                    backward_row_f(units, factor, row * w, z + row * z_row, dh + i * w,
                                   dz + row * dz_row, line, sums + p * (w + 1));
                    if (h) line[w] = to_bf16(1.0f);
                }
            }
        }
        free(dh);
    }
    for (int64_t p = 1; p < parts; ++p)
        for (int64_t c = 0; c <= w; ++c) sums[c] += sums[p * (w + 1) + c];
    memcpy(dz_sum, sums, (size_t)w * sizeof *sums);
    float inner = sums[w];
    free(sums);
    free(panels);
    return inner;
}

/* dY [m, n], U [n, w], z [m, w], b_u [n] or NULL.
   dz [m, w] and its sum [w]; dσ; dU [n, w] and db_u [n], both or neither. */
void artemis_bottleneck_backward(const uint16_t *dy, int64_t dy_row, const void *u, int64_t u_row,
                                 int64_t u_column, int u_held, const float *bias,
                                 const uint16_t *z, int64_t z_row, uint16_t *dz, int64_t dz_row,
                                 float *dz_sum, float *dscale, float *du, float *dbias, int64_t m,
                                 int64_t w, int64_t n, float factor, float scale, int kind, uint64_t seed,
                                 uint32_t threshold, float keep_scale, int threads) {
    const Units units = {w, scale, kind, seed, threshold, keep_scale};
    const Matrix of_dy = {dy, dy_row, 1, BF16}, of_u = {u, u_row, u_column, u_held};
    uint16_t *h = du ? room_for(m * (w + 1) * (int64_t)sizeof *h) : NULL;
    *dscale = factor * through_units(&of_dy, &of_u, &units, factor, z, z_row, dz, dz_row, dz_sum, h,
                                     m, n, threads);
    if (!du) return;
    artemis_thin_product(h, 1, w + 1, BF16, dy, dy_row, 1, BF16, NULL, 0, NULL, factor, du, w,
                         dbias, TRANSPOSED, w + 1, m, n, threads);
    if (bias) *dscale += (float)dot(dbias, bias, n);
    for (int64_t c = 0; c < n; ++c) dbias[c] *= scale;
    free(h);
}

/* dY [m, n], B [n, r], s [m, r]. dS [m, r] unless NULL; dB [n, r], and dσ, unless NULL. */
void artemis_low_rank_backward(const uint16_t *dy, int64_t dy_row, const void *b, int64_t b_row,
                               int64_t b_column, int b_held, const uint16_t *s, int64_t s_row,
                               uint16_t *ds, int64_t ds_row, float *db, float *dscale, int64_t m,
                               int64_t r, int64_t n, float factor, float scale, int threads) {
    if (ds)
        artemis_thin_product(dy, dy_row, 1, BF16, b, b_row, b_column, b_held, NULL, 0, NULL,
                             factor * scale, ds, ds_row, NULL, ROUNDED, m, n, r, threads);
    if (!db) return;
    artemis_thin_product(s, 1, s_row, BF16, dy, dy_row, 1, BF16, NULL, 0, NULL, factor, db, r,
                         NULL, TRANSPOSED, r, m, n, threads);
    const Matrix of_b = {b, b_row, b_column, b_held};
    if (dscale) *dscale = (float)inner(db, &of_b, n, r);
    for (int64_t i = 0; i < n * r; ++i) db[i] *= scale;
}

#endif
