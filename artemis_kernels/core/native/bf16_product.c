/* A bf16 product with a bias and a low-rank term: fp32 sums are rounded once, with all added.

       y[m, n] (+)= Σ_k x[m, k]·w[k, n] + bias[n] + alpha·Σ_r s[m, r]·g[n, r] */

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include "bf16_panels.h"
#include "panel_product.h"

const int artemis_has_bf16_product = 1;

typedef struct {
    const float *bias; /* [n] or NULL */
    Term expand;
    NUMBER *y;
    int64_t n;
    int accumulate;
} Epilogue;

static void finish(const void *epilogue, const int64_t *rows, int count, int64_t first,
                   const __mmask16 *within, const Tile *tile) {
    const Epilogue *with = epilogue;
    for (int h = 0; h < 2; ++h) {
        int64_t from = first + 16 * h;
        __m512 values[TILE_ROWS], bias = _mm512_setzero_ps();
        if (with->bias) bias = _mm512_maskz_loadu_ps(within[h], with->bias + from);
        for (int i = 0; i < TILE_ROWS; ++i) values[i] = _mm512_add_ps(tile->sums[i][h], bias);
        add_term(&with->expand, rows, first, h, values);
        for (int i = 0; i < count; ++i) {
            NUMBER *to = with->y + rows[i] * with->n + from;
            __m512 value = values[i];
            if (with->accumulate) value = _mm512_add_ps(load_bf16(within[h], to), value);
            store_bf16(to, within[h], value);
        }
    }
}

void artemis_bf16_product(const NUMBER *x, const NUMBER *data, const float *bias, const NUMBER *s,
                          int64_t s_m, const void *g, int64_t g_n, int64_t g_r, int g_in_bf16,
                          int64_t rank, float alpha, NUMBER *y, int64_t m, int64_t k, int64_t n,
                          int by_output, int accumulate, int threads) {
    int64_t panels = parts_of(n, PANEL);
    float *left = malloc(sizeof(float) * (size_t)(m * rank + 1));
    float *right = malloc(sizeof(float) * (size_t)(panels * PANEL * rank + 1));
    Expand expand = {g, g_n, g_r, g_in_bf16, rank};
    Epilogue with = {bias, {left, right, rank}, y, n, accumulate};
    Product product =
        product_of(x, m, (Weight){data, by_output ? k : n, k, n, by_output}, finish, NULL, &with,
                   threads);
    _Pragma("omp parallel num_threads(threads) if (m * k * n > 65536)")
    {
        _Pragma("omp for schedule(static) nowait")
        for (int64_t i = 0; i < m; ++i)
            for (int64_t r = 0; r < rank; ++r)
                left[i * rank + r] = alpha * from_bf16(s[i * s_m + r]);
        _Pragma("omp for schedule(static)")
        for (int64_t p = 0; p < panels; ++p)
            line_up(&expand, p * PANEL, n, right + p * PANEL * rank);
        multiply_by_panels(&product);
    }
    free(right);
    free(left);
}

#else
const int artemis_has_bf16_product = 0;
#endif
