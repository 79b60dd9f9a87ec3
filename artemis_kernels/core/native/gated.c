/* y = act(g)·u element by element, and its gradients dg = dy·u·act'(g), du = dy·act(g).

   In both arithmetics: _f of bf16 tensors, _d of fp32 ones. */

#include "units.h"

#define SOME 512 /* elements taken at a time */

#define GATED(NAME, REAL, SUFFIX, TYPE, LOAD, STORE)                                              \
    void artemis_gated_forward_##NAME(const TYPE *g, const TYPE *u, TYPE *y, int64_t count,       \
                                      int kind, int threads) {                                    \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (count > 16384)")      \
        for (int64_t from = 0; from < count; from += SOME) {                                      \
            REAL value[SOME], slope[SOME];                                                        \
            int64_t n = count - from < SOME ? count - from : SOME;                                \
            activate_##SUFFIX(kind, g + from, n, value, slope);                                   \
            for (int64_t i = 0; i < n; ++i)                                                       \
                y[from + i] = STORE((float)(value[i] * LOAD(u[from + i])));                       \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    void artemis_gated_backward_##NAME(const TYPE *dy, const TYPE *g, const TYPE *u, TYPE *dg,    \
                                       TYPE *du, int64_t count, int kind, int threads) {          \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (count > 16384)")      \
        for (int64_t from = 0; from < count; from += SOME) {                                      \
            REAL value[SOME], slope[SOME];                                                        \
            int64_t n = count - from < SOME ? count - from : SOME;                                \
            activate_##SUFFIX(kind, g + from, n, value, slope);                                   \
            for (int64_t i = 0; i < n; ++i) {                                                     \
                REAL d = LOAD(dy[from + i]);                                                      \
                dg[from + i] = STORE((float)(d * LOAD(u[from + i]) * slope[i]));                  \
                du[from + i] = STORE((float)(d * value[i]));                                      \
            }                                                                                     \
        }                                                                                         \
    }

GATED(f32, double, d, float, same, same)
GATED(bf16, float, f, uint16_t, from_bf16, to_bf16)
