/* Cross entropy of logits x [m, n] as they are stored, a pass each way.

   forward    loss = log Σ_j e^(x[j] − most) − (x[target] − most), 0 where the target is `ignored`
   backward   dx[j] = (e^(x[j] − most − log_sum) − [j = target])·d

   `most` and `log_sum` are kept apart: their sum would round away what large logits differ by.
   Exponentials are of float; a row is summed in blocks, and these in double. */

#include "units.h"

#define COLUMNS 1024 /* of a block */

#define CROSS_ENTROPY(SUFFIX, TYPE, LOAD, STORE)                                                  \
    static float largest_##SUFFIX(const TYPE *x, int64_t n) {                                     \
        float most = -INFINITY;                                                                   \
        _Pragma("omp simd reduction(max : most)")                                                 \
        for (int64_t j = 0; j < n; ++j) most = LOAD(x[j]) > most ? LOAD(x[j]) : most;             \
        return most;                                                                              \
    }                                                                                             \
                                                                                                  \
    void artemis_cross_entropy_forward_##SUFFIX(const TYPE *x, const int64_t *target,             \
                                                float *loss, float *kept, int64_t m, int64_t n,   \
                                                int64_t ignored, int threads) {                   \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * n > 16384)")      \
        for (int64_t i = 0; i < m; ++i) {                                                         \
            const TYPE *row = x + i * n;                                                          \
            float most = largest_##SUFFIX(row, n);                                                \
            double total = 0;                                                                     \
            for (int64_t from = 0; from < n; from += COLUMNS) {                                   \
                int64_t to = from + COLUMNS < n ? from + COLUMNS : n;                             \
                float sum = 0;                                                                    \
                _Pragma("omp simd reduction(+ : sum)")                                            \
                for (int64_t j = from; j < to; ++j) sum += decay_f(LOAD(row[j]) - most);          \
                total += sum;                                                                     \
            }                                                                                     \
            double log_sum = log(total);                                                          \
            kept[2 * i] = most, kept[2 * i + 1] = (float)log_sum;                                 \
            loss[i] = 0;                                                                          \
            if (target[i] != ignored)                                                             \
                loss[i] = (float)(log_sum - (LOAD(row[target[i]]) - most));                       \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    void artemis_cross_entropy_backward_##SUFFIX(const TYPE *x, const int64_t *target,            \
                                                 const float *kept, const float *d, TYPE *dx,     \
                                                 int64_t m, int64_t n, int64_t ignored,           \
                                                 int threads) {                                   \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (m * n > 16384)")      \
        for (int64_t i = 0; i < m; ++i) {                                                         \
            const TYPE *row = x + i * n;                                                          \
            TYPE *to = dx + i * n;                                                                \
            if (target[i] == ignored) {                                                           \
                memset(to, 0, sizeof(TYPE) * (size_t)n);                                          \
                continue;                                                                         \
            }                                                                                     \
            float most = kept[2 * i], log_sum = kept[2 * i + 1], factor = d[i];                   \
            _Pragma("omp simd")                                                                   \
            for (int64_t j = 0; j < n; ++j)                                                       \
                to[j] = STORE(decay_f(LOAD(row[j]) - most - log_sum) * factor);                   \
            int64_t at = target[i];                                                               \
            to[at] = STORE((decay_f(LOAD(row[at]) - most - log_sum) - 1) * factor);               \
        }                                                                                         \
    }

CROSS_ENTROPY(f32, float, same, same)
CROSS_ENTROPY(bf16, uint16_t, from_bf16, to_bf16)
