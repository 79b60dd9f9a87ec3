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

#endif
