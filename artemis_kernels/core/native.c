/* Element-wise passes for the CPU, one read and one write each. Built and loaded by native.py.

   Dropout mask: the hash of docs/dropout.md, two 16-bit decisions a hash. The compiler vectorizes
   the inner loops; every value is computed as the plain-torch path computes it, bit for bit. */

#include <stdint.h>
#include <string.h>

#define CHUNK 8192 /* elements a thread takes at a time; even, so that no pair is split */

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

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) { /* round to nearest even, NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline float same(float value) { return value; }

/* Factors of one chunk: keep_scale where kept, 0 where dropped. `first` is even. */
static void factors(float *out, int64_t first, int64_t count, uint64_t seed, uint32_t threshold,
                    float keep_scale) {
    uint64_t pair = (uint64_t)first >> 1;
    uint32_t k0 = mix((uint32_t)seed + 0x9E3779B9u * ((uint32_t)(pair >> 32) + 1u));
    uint32_t k1 = mix((uint32_t)(seed >> 32) ^ k0 ^ 0x85EBCA6Bu);
    uint32_t low = (uint32_t)pair;
    for (int64_t i = 0; i < (count + 1) / 2; ++i) {
        uint32_t h = draw(low + (uint32_t)i, k0, k1);
        out[2 * i] = (h & 0xffffu) >= threshold ? keep_scale : 0.0f;
        out[2 * i + 1] = (h >> 16) >= threshold ? keep_scale : 0.0f;
    }
}

/* out = dropped(x), or out += dropped(x). A dropped value is 0 even where x is inf or nan. */
#define DROPOUT(NAME, TYPE, LOAD, STORE)                                                          \
    void NAME(const TYPE *x, TYPE *out, int64_t n, uint64_t seed, uint32_t threshold,             \
              float keep_scale, int accumulate, int threads) {                                    \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (n > 65536)")          \
        for (int64_t first = 0; first < n; first += CHUNK) {                                      \
            float factor[CHUNK];                                                                  \
            int64_t count = n - first < CHUNK ? n - first : CHUNK;                                \
            factors(factor, first, count, seed, threshold, keep_scale);                           \
            const TYPE *from = x + first;                                                         \
            TYPE *to = out + first;                                                               \
            if (accumulate)                                                                       \
                for (int64_t i = 0; i < count; ++i) {                                             \
                    float term = factor[i] > 0.0f ? LOAD(from[i]) * factor[i] : 0.0f;             \
                    to[i] = STORE(LOAD(to[i]) + LOAD(STORE(term)));                               \
                }                                                                                 \
            else                                                                                  \
                for (int64_t i = 0; i < count; ++i)                                               \
                    to[i] = STORE(factor[i] > 0.0f ? LOAD(from[i]) * factor[i] : 0.0f);           \
        }                                                                                         \
    }

DROPOUT(artemis_dropout_f32, float, same, same)
DROPOUT(artemis_dropout_bf16, uint16_t, from_bf16, to_bf16)
