/* The activations in both arithmetics, and their numbers. */

#ifndef ARTEMIS_UNITS_H
#define ARTEMIS_UNITS_H

#include "numbers.h"

static inline float fma_f(float a, float b, float c) { return FMA(a, b, c); }

static inline double fma_d(double a, double b, double c) {
#ifdef __FP_FAST_FMA
    return fma(a, b, c);
#else
    return a * b + c;
#endif
}

static inline float nearest_f(float x) { return rintf(x); }
static inline double nearest_d(double x) { return rint(x); }

static inline float power_of_two_f(float n) {
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline double power_of_two_d(double n) {
    uint64_t bits = (uint64_t)((int64_t)n + 1023) << 52;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define REAL float
#define NAME(x) x##_f
#include "activations.h"
#undef REAL
#undef NAME
#define REAL double
#define NAME(x) x##_d
#include "activations.h"
#undef REAL
#undef NAME

enum { IDENTITY, RELU, SILU, GELU, GELU_TANH };

/* value[0..n) and slope[0..n) of z[0..n), in either arithmetic: _f of bf16 tensors, _d of fp32. */
#define ACTIVATE(REAL, SUFFIX, TYPE, LOAD)                                                        \
    static inline void activate_##SUFFIX(int kind, const TYPE *z, int64_t n, REAL *value,         \
                                         REAL *slope) {                                           \
        switch (kind) {                                                                           \
            case IDENTITY: EACH(identity, SUFFIX, LOAD) break;                                    \
            case RELU: EACH(relu, SUFFIX, LOAD) break;                                            \
            case SILU: EACH(silu, SUFFIX, LOAD) break;                                            \
            case GELU: EACH(gelu, SUFFIX, LOAD) break;                                            \
            default: EACH(gelu_tanh, SUFFIX, LOAD) break;                                         \
        }                                                                                         \
    }
#define EACH(FUNCTION, SUFFIX, LOAD)                                                              \
    for (int64_t i = 0; i < n; ++i) FUNCTION##_##SUFFIX(LOAD(z[i]), value + i, slope + i);

ACTIVATE(float, f, uint16_t, from_bf16)
ACTIVATE(double, d, float, same)

#endif
