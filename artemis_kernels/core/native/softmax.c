/* What attention does between its products, in place, a row of scores s [rows, keys] at a time:

       forward    p = e^(scale·s − most) / Σ e^(scale·s − most)
       backward   p again, and ds = scale·p·(dp − Σ p·dp)

   Row r is of query `first` + r mod `queries`, and of batch r / `rows_of_batch`. It sees the keys up
   to its own if `causal`, those that its row of `mask` names if there is one, else all; the others
   get 0. A row that sees none is 0. `kept` [rows, 2]: most, and the logarithm of the sum. */

#include <stdlib.h>

#include "attention.h"

typedef struct {
    Sight sight;
    int64_t queries, first, rows_of_batch;
} Rows;

/* How many keys row r may see, and which of them, unless that is NULL. */
static int64_t seen(const Rows *of, int64_t row, const uint8_t **mask) {
    return seen_by(&of->sight, row / of->rows_of_batch, of->first + row % of->queries, mask);
}

#define SIGHT                                                                                     \
    int64_t keys, int64_t queries, int64_t first, int64_t rows_of_batch, const uint8_t *mask,     \
        int64_t mask_batch, int64_t mask_query, int causal

#define SOFTMAX(SUFFIX, TYPE, LOAD, STORE)                                                        \
    void artemis_softmax_forward_##SUFFIX(TYPE *s, float *kept, int64_t rows, SIGHT, float scale, \
                                          int threads) {                                          \
        const Rows of = {{keys, mask, mask_batch, mask_query, causal},                            \
                         queries, first, rows_of_batch};                                          \
        _Pragma("omp parallel num_threads(threads) if (rows * keys > 16384)")                     \
        {                                                                                         \
            float *e = malloc((size_t)keys * sizeof *e);                                          \
            _Pragma("omp for schedule(static)")                                                   \
            for (int64_t i = 0; i < rows; ++i) {                                                  \
                const uint8_t *sees;                                                              \
                TYPE *row = s + i * keys;                                                         \
                int64_t n = seen(&of, i, &sees);                                                  \
                float most = -INFINITY, sum = 0;                                                  \
                for (int64_t j = 0; j < n; ++j) e[j] = LOAD(row[j]) * scale;                      \
                if (sees)                                                                         \
                    for (int64_t j = 0; j < n; ++j) e[j] = sees[j] ? e[j] : -INFINITY;            \
                _Pragma("omp simd reduction(max : most)")                                         \
                for (int64_t j = 0; j < n; ++j) most = e[j] > most ? e[j] : most;                 \
                float base = most == -INFINITY ? 0 : most; /* no nan from -inf − -inf */          \
                _Pragma("omp simd reduction(+ : sum)")                                            \
                for (int64_t j = 0; j < n; ++j) {                                                 \
                    e[j] = decay_f(e[j] - base);                                                  \
                    sum += e[j];                                                                  \
                }                                                                                 \
                float inverse = sum == 0 ? 0 : 1 / sum;                                           \
                _Pragma("omp simd")                                                               \
                for (int64_t j = 0; j < n; ++j) row[j] = STORE(e[j] * inverse);                   \
                memset(row + n, 0, sizeof(TYPE) * (size_t)(keys - n));                            \
                kept[2 * i] = base, kept[2 * i + 1] = sum == 0 ? 0 : logf(sum);                   \
            }                                                                                     \
            free(e);                                                                              \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    /* s becomes p, dp becomes ds. */                                                             \
    void artemis_softmax_backward_##SUFFIX(TYPE *s, TYPE *dp, const float *kept, int64_t rows,    \
                                           SIGHT, float scale, int threads) {                     \
        const Rows of = {{keys, mask, mask_batch, mask_query, causal},                            \
                         queries, first, rows_of_batch};                                          \
        _Pragma("omp parallel num_threads(threads) if (rows * keys > 16384)")                     \
        {                                                                                         \
            float *p = malloc((size_t)keys * sizeof *p);                                          \
            _Pragma("omp for schedule(static)")                                                   \
            for (int64_t i = 0; i < rows; ++i) {                                                  \
                const uint8_t *sees;                                                              \
                TYPE *row = s + i * keys, *d = dp + i * keys;                                     \
                int64_t n = seen(&of, i, &sees);                                                  \
                float most = kept[2 * i], log_sum = kept[2 * i + 1], along = 0;                   \
                for (int64_t j = 0; j < n; ++j)                                                   \
                    p[j] = decay_f(LOAD(row[j]) * scale - most - log_sum);                        \
                if (sees)                                                                         \
                    for (int64_t j = 0; j < n; ++j) p[j] = sees[j] ? p[j] : 0;                    \
                _Pragma("omp simd reduction(+ : along)")                                          \
                for (int64_t j = 0; j < n; ++j) along += p[j] * LOAD(d[j]);                       \
                _Pragma("omp simd")                                                               \
                for (int64_t j = 0; j < n; ++j) {                                                 \
                    d[j] = STORE(p[j] * (LOAD(d[j]) - along) * scale);                            \
                    row[j] = STORE(p[j]);                                                         \
                }                                                                                 \
                memset(row + n, 0, sizeof(TYPE) * (size_t)(keys - n));                            \
                memset(d + n, 0, sizeof(TYPE) * (size_t)(keys - n));                              \
            }                                                                                     \
            free(p);                                                                              \
        }                                                                                         \
    }

SOFTMAX(f32, float, same, same)
SOFTMAX(bf16, uint16_t, from_bf16, to_bf16)
