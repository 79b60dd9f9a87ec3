/* Packed weights read back: the one place in C that knows the formats of core/quantized.py. */

#ifndef ARTEMIS_FORMATS_H
#define ARTEMIS_FORMATS_H

#include "numbers.h"

enum { INT8, FP8, INT4, BF16 }; /* BF16: numbers as they are, for passes over any weight */

#define SLAB 1024 /* columns decoded at a time: a multiple of every group size */

typedef struct {
    const uint8_t *data; /* [n, k], or [n, k / 2] for int4; of two bytes for bf16 */
    const void *scale;   /* fp32 [n], or bf16 [n, k / group] for int4 */
    const uint16_t *offset; /* bf16 [n, k / group], int4 only */
    int64_t k, group;
    int format;
} Packed;

/* 4 exponent and 3 mantissa bits sit in fp32's at an exponent 120 too low; subnormals included.
   All seven set are nan. */
static inline float from_e4m3(uint8_t bits) {
    uint32_t wide = ((uint32_t)(bits & 0x80u) << 24) | ((uint32_t)(bits & 0x7fu) << 20);
    float value;
    memcpy(&value, &wide, sizeof value);
    return (bits & 0x7fu) == 0x7fu ? NAN : value * 0x1p120f;
}

/* out[0..count) = row `n` of the weight from column `from`, a multiple of the group. */
static inline void decode(const Packed *w, int64_t n, int64_t from, int64_t count, float *out) {
    if (w->format == BF16) {
        const uint16_t *row = (const uint16_t *)w->data + n * w->k + from;
        for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(row[i]);
        return;
    }
    if (w->format != INT4) {
        const uint8_t *row = w->data + n * w->k + from;
        float scale = ((const float *)w->scale)[n];
        if (w->format == INT8)
            for (int64_t i = 0; i < count; ++i) out[i] = (float)(int8_t)row[i] * scale;
        else
            for (int64_t i = 0; i < count; ++i) out[i] = from_e4m3(row[i]) * scale;
        return;
    }
    int64_t half = w->group / 2, groups = w->k / w->group;
    for (int64_t at = 0; at < count; at += w->group) { /* low nibbles, then high ones */
        int64_t index = n * groups + (from + at) / w->group;
        float scale = from_bf16(((const uint16_t *)w->scale)[index]);
        float offset = from_bf16(w->offset[index]);
        const uint8_t *pairs = w->data + (n * w->k + from + at) / 2;
        for (int64_t i = 0; i < half; ++i) {
            out[at + i] = (float)(pairs[i] & 15) * scale + offset;
            out[at + half + i] = (float)(pairs[i] >> 4) * scale + offset;
        }
    }
}

#endif
