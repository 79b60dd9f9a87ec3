/* Attention in bf16, scores and sums in fp32 that never leave the caches.

       forward    s = scale·Q Kᵀ    p = e^(s − most)    y = p V / Σ p
       backward   p = e^(s − most − log Σ)    dp = dY Vᵀ    ds = scale·p·(dp − Σ p·dp)
                  dV = pᵀ dY    dQ = ds K    dK = dsᵀ Q

   Here: heads as models lay them out, and a query's scores that become probabilities. */

#ifndef ARTEMIS_ATTENTION_ROWS_H
#define ARTEMIS_ATTENTION_ROWS_H

#include <stdlib.h>

#include "attention.h"
#include "tile.h"

typedef struct { /* [batch, head, position, size] of these strides, the last of which is 1 */
    const uint16_t *data;
    int64_t batch, head, row, size;
} Heads;

typedef struct {
    Heads q, k, v, dy;
    int64_t queries, keys, heads, groups;
    Sight sight;
    float scale;
    float *kept; /* two numbers a query, of all heads */
    int64_t heads_in_all;
} Attention;

/* Heads as they are returned: [batch, position, head, size], one after the other. */
static inline Heads in_rows(const uint16_t *data, int64_t positions, int64_t heads, int64_t size) {
    return (Heads){data, positions * heads * size, size, heads * size, size};
}

static inline const uint16_t *row_of(const Heads *x, int64_t b, int64_t h, int64_t i) {
    return x->data + b * x->batch + h * x->head + i * x->row;
}

static inline int64_t up_to(int64_t size, int64_t whole) { return parts_of(size, whole) * whole; }

static inline void *room(int64_t bytes) { return aligned_alloc(64, (size_t)up_to(bytes + 1, 64)); }

#define HEADS(x) const uint16_t *x, int64_t x##_batch, int64_t x##_head, int64_t x##_row
#define OF(x, size) {x, x##_batch, x##_head, x##_row, size}

/* s [keys] becomes scale·s, −inf where the query sees nothing. Returns how many are to be looked at:
   whole vectors, since what loops leave over costs as much as many of them. */
static inline int64_t looked_at(const Attention *a, int64_t b, int64_t query, int64_t keys,
                                float *s) {
    const uint8_t *mask;
    int64_t n = smaller(seen_by(&a->sight, b, query, &mask), keys), whole = up_to(n, 16);
    if (mask)
        for (int64_t j = 0; j < n; ++j) s[j] = mask[j] ? s[j] : -INFINITY;
    for (int64_t j = n; j < whole; ++j) s[j] = -INFINITY;
    _Pragma("omp simd")
    for (int64_t j = 0; j < whole; ++j) s[j] *= a->scale;
    return whole;
}

static inline float largest_of(const float *x, int64_t count) {
    __m512 most = _mm512_loadu_ps(x);
    for (int64_t j = 16; j < count; j += 16) most = _mm512_max_ps(_mm512_loadu_ps(x + j), most);
    return _mm512_reduce_max_ps(most);
}

static inline float sum_of(const float *x, int64_t count) {
    __m512 sum = _mm512_loadu_ps(x);
    for (int64_t j = 16; j < count; j += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + j));
    return _mm512_reduce_add_ps(sum);
}

/* A query's s [keys] become p, of which `inverse` times the sum is 1; what the backward needs is
   kept. Returns as `looked_at`. */
static inline int64_t weigh(const Attention *a, int64_t b, int64_t h, int64_t query, int64_t keys,
                            float *s, float *inverse) {
    int64_t n = looked_at(a, b, query, keys, s);
    float most = n ? largest_of(s, n) : -INFINITY, base = most == -INFINITY ? 0 : most; /* never nan */
    _Pragma("omp simd")
    for (int64_t j = 0; j < n; ++j) s[j] = decay_f(s[j] - base);
    float sum = n ? sum_of(s, n) : 0;
    float *kept = kept_of(a->kept, b * a->heads + h, query, a->queries, a->heads_in_all);
    kept[0] = base, kept[1] = sum == 0 ? 0 : logf(sum);
    *inverse = sum == 0 ? 0 : 1 / sum;
    return n;
}

#endif
