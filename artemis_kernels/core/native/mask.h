/* The dropout mask: the hash of docs/dropout.md, two 16-bit decisions a hash. */

#ifndef ARTEMIS_MASK_H
#define ARTEMIS_MASK_H

#include <stdint.h>

static inline uint32_t mix(uint32_t h) {
    h ^= h >> 16;
    h *= 0x7feb352du;
    h ^= h >> 15;
    h *= 0x846ca68bu;
    return h ^ (h >> 16);
}

static inline uint32_t draw(uint32_t pair, uint32_t k0, uint32_t k1) {
    uint32_t h = pair ^ k0;
    h ^= h >> 16;
    h *= 0x7feb352du;
    h ^= h >> 15;
    h += k1;
    h *= 0x846ca68bu;
    return h ^ (h >> 16);
}

/* Factors of the elements from `first` on: keep_scale where kept, 0 where dropped. Returns where
   they start in `buffer`, which needs room for two more (a chunk may start or end inside a pair). */
static const float *factors(float *buffer, int64_t first, int64_t count, uint64_t seed,
                            uint32_t threshold, float keep_scale) {
    int64_t odd = first & 1, pairs = (count + odd + 1) / 2;
    uint32_t seed_high = (uint32_t)(seed >> 32);
    for (int64_t from = 0, until; from < pairs; from = until) { /* keys hold for 2³² pairs */
        uint64_t pair = ((uint64_t)first >> 1) + (uint64_t)from;
        uint32_t low = (uint32_t)pair, high = (uint32_t)(pair >> 32);
        uint32_t k0 = mix((uint32_t)seed + mix(seed_high) + 0x9E3779B9u * (high + 1u));
        uint32_t k1 = mix(seed_high ^ k0 ^ 0x85EBCA6Bu);
        int64_t left = ((int64_t)1 << 32) - low, n = pairs - from < left ? pairs - from : left;
        float *to = buffer + 2 * from;
        for (int64_t i = 0; i < n; ++i) {
            uint32_t h = draw(low + (uint32_t)i, k0, k1);
            to[2 * i] = (h & 0xffffu) >= threshold ? keep_scale : 0.0f;
            to[2 * i + 1] = (h >> 16) >= threshold ? keep_scale : 0.0f;
        }
        until = from + n;
    }
    return buffer + odd;
}

#endif
