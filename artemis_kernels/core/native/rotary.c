/* Heads turned by their positions: x [b, h, t, d] of any strides but the last, which is 1.

   forward    y₁ = x₁·cos₁ − x₂·sin₁    y₂ = x₂·cos₂ + x₁·sin₂
   backward   y₁ = x₁·cos₁ + x₂·sin₂    y₂ = x₂·cos₂ − x₁·sin₁

   cos and sin [tables, t, d], of which there is one, or one for each b. */

#include "numbers.h"

#define ROTARY(SUFFIX, TYPE, LOAD, STORE)                                                         \
    void artemis_rotary_##SUFFIX(const TYPE *x, int64_t x_b, int64_t x_h, int64_t x_t,            \
                                 const float *cosine, const float *sine, TYPE *y, int64_t y_b,    \
                                 int64_t y_h, int64_t y_t, int64_t b, int64_t h, int64_t t,       \
                                 int64_t d, int64_t tables, int backwards, int threads) {         \
        int64_t half = d / 2;                                                                     \
        int64_t count = b * h * t * d;                                                            \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (count > 16384)")      \
        for (int64_t row = 0; row < b * t; ++row) {                                               \
            int64_t at = row % t, of = row / t;                                                   \
            const float *c = cosine + ((tables > 1 ? of : 0) * t + at) * d, *c2 = c + half;       \
            const float *s = sine + ((tables > 1 ? of : 0) * t + at) * d, *s2 = s + half;         \
            for (int64_t head = 0; head < h; ++head) {                                            \
                const TYPE *from = x + of * x_b + head * x_h + at * x_t, *from2 = from + half;    \
                TYPE *to = y + of * y_b + head * y_h + at * y_t, *to2 = to + half;                \
                if (backwards) {                                                                  \
                    _Pragma("omp simd")                                                           \
                    for (int64_t i = 0; i < half; ++i) {                                          \
                        float first = LOAD(from[i]), second = LOAD(from2[i]);                     \
                        to[i] = STORE(first * c[i] + second * s2[i]);                             \
                        to2[i] = STORE(second * c2[i] - first * s[i]);                            \
                    }                                                                             \
                } else {                                                                          \
                    _Pragma("omp simd")                                                           \
                    for (int64_t i = 0; i < half; ++i) {                                          \
                        float first = LOAD(from[i]), second = LOAD(from2[i]);                     \
                        to[i] = STORE(first * c[i] - second * s[i]);                              \
                        to2[i] = STORE(second * c2[i] + first * s2[i]);                           \
                    }                                                                             \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
    }

ROTARY(f32, float, same, same)
ROTARY(bf16, uint16_t, from_bf16, to_bf16)
