/* Panels of bf16, multiplied in pairs and summed in fp32. */

#include <immintrin.h>
#include <stdint.h>

#define NUMBER uint16_t
#define SUMS __m512
#define ZERO _mm512_setzero_ps()
#define DOT(sums, packed, x) _mm512_dpbf16_ps(sums, (__m512bh)(packed), (__m512bh)(x))
#define FLIPPED 0

#include "panels.h"

/* Two rows of 32, number by number: 16 pairs, and the others. */
static inline void interleave(__m512i one, __m512i other, NUMBER *to) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    __m512i low = _mm512_unpacklo_epi16(one, other), high = _mm512_unpackhi_epi16(one, other);
    _mm512_store_si512(to, _mm512_permutex2var_epi64(low, first, high));
    _mm512_store_si512(to + OF_LINE, _mm512_permutex2var_epi64(low, second, high));
}

/* After the last of an odd number of rows come zeros. */
static void pack_by_input(const Weight *w, Part part, __mmask64 within, NUMBER *panel) {
    const NUMBER *from = w->data + part.from * w->pitch + part.first;
    for (int64_t c = part.from; c < part.to; c += 2, from += 2 * w->pitch, panel += 2 * PANEL) {
        __builtin_prefetch(from + ROWS_AHEAD * w->pitch, 0, 3);
        __builtin_prefetch(from + (ROWS_AHEAD + 1) * w->pitch, 0, 3);
        __m512i one = _mm512_maskz_loadu_epi8(within, from), other = _mm512_setzero_si512();
        if (c + 1 < part.to) other = _mm512_maskz_loadu_epi8(within, from + w->pitch);
        interleave(one, other, panel);
    }
}
