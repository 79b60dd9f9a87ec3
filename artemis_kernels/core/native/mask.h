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
    uint64_t pair = (uint64_t)first >> 1;
    uint32_t seed_high = (uint32_t)(seed >> 32);
    uint32_t k0 = mix((uint32_t)seed + mix(seed_high) + 0x9E3779B9u * ((uint32_t)(pair >> 32) + 1u));
    uint32_t k1 = mix(seed_high ^ k0 ^ 0x85EBCA6Bu);
    uint32_t low = (uint32_t)pair;
    int64_t odd = first & 1;
    for (int64_t i = 0; i < (count + odd + 1) / 2; ++i) {
        uint32_t h = draw(low + (uint32_t)i, k0, k1);
        buffer[2 * i] = (h & 0xffffu) >= threshold ? keep_scale : 0.0f;
        buffer[2 * i + 1] = (h >> 16) >= threshold ? keep_scale : 0.0f;
    }
    return buffer + odd;
}

#endif
