/* Which keys a query sees, and where what the backward needs of it is kept: what attention by plain
   products, with passes between them, and in one pass have in common. */

#ifndef ARTEMIS_ATTENTION_H
#define ARTEMIS_ATTENTION_H

#include "units.h"

#define KEPT_QUERIES 128 /* those of all heads lie together: a block of plain products */

typedef struct {
    int64_t keys;
    const uint8_t *mask; /* bytes 0 or 1: [batch, query, keys], or NULL */
    int64_t mask_batch, mask_query;
    int causal;
} Sight;

/* How many keys a query may see, and which of them, unless that is NULL. */
static inline int64_t seen_by(const Sight *of, int64_t batch, int64_t query,
                              const uint8_t **mask) {
    *mask = of->mask ? of->mask + batch * of->mask_batch + query * of->mask_query : NULL;
    return of->causal && query + 1 < of->keys ? query + 1 : of->keys;
}

/* Of a query of a head: its largest score, and the logarithm of its sum. */
static inline float *kept_of(float *kept, int64_t head, int64_t query, int64_t queries,
                             int64_t heads) {
    int64_t first = query / KEPT_QUERIES * KEPT_QUERIES, left = queries - first;
    int64_t count = left < KEPT_QUERIES ? left : KEPT_QUERIES;
    return kept + 2 * (heads * first + head * count + query - first);
}

#endif
