/* One row of x in 16-bit fixed point, for products with 8- and 4-bit weights by the processor's
   int8 dot product: two of them, for the high and the low byte, where conversion to bf16 would take
   more time than reading the weight.

   Each block of columns has its own step, a 32512th of its largest value: x's bf16 numbers keep their
   eight bits down to a 128th of it. Sums within a block are exact. */

#ifndef ARTEMIS_FIXED_POINT_H
#define ARTEMIS_FIXED_POINT_H

#include "formats.h"

typedef struct {
    int8_t *high, *low; /* x ≈ step·(256·high + low); zeros up to a block and 64 bytes beyond */
    float *steps;       /* one a block of 256 columns, or a group of int4 */
    float sum;          /* Σ step·(256·high + low) */
} Fixed;

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_FIXED_POINT 1

enum { BLOCK = 256 };

/* False where a block's largest value stands so far out that its step would be coarse for the rest
   (64 means), where one is not finite or all are next to nothing: bf16 serves those. */
static inline int fix(const uint16_t *x, int64_t k, int64_t block, Fixed *to) {
    to->sum = 0;
    for (int64_t from = 0, b = 0; from < k; from += block, ++b) {
        int64_t count = k - from < block ? k - from : block;
        uint16_t most = 0;
        for (int64_t c = 0; c < count; ++c) {
            uint16_t size = x[from + c] & 0x7fffu;
            most = size > most ? size : most;
        }
        float largest = from_bf16(most), step = largest / 32512;
        if (most >= 0x7f80u || (most && largest < 1e-30f)) return 0;
        __m512 inverse = _mm512_set1_ps(most ? 1 / step : 0);
        __m512i totals = _mm512_setzero_si512(), sizes = totals;
        for (int64_t c = from; c < from + count; c += 16) {
            int64_t left = from + count - c;
            __mmask16 within = left >= 16 ? 0xffff : (1u << left) - 1;
            __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(within, x + c));
            __m512 numbers = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
            __m512i values = _mm512_cvtps_epi32(_mm512_mul_ps(numbers, inverse));
            __m512i high = _mm512_srai_epi32(_mm512_add_epi32(values, _mm512_set1_epi32(128)), 8);
            __m512i low = _mm512_sub_epi32(values, _mm512_slli_epi32(high, 8));
            _mm512_mask_cvtepi32_storeu_epi8(to->high + c, within, high);
            _mm512_mask_cvtepi32_storeu_epi8(to->low + c, within, low);
            totals = _mm512_add_epi32(totals, values);
            sizes = _mm512_add_epi32(sizes, _mm512_abs_epi32(values));
        }
        if (most && 32512 * count > 64 * (int64_t)_mm512_reduce_add_epi32(sizes)) return 0;
        to->steps[b] = step;
        to->sum += step * (float)_mm512_reduce_add_epi32(totals);
    }
    return 1;
}

/* sum + one block of a row of int8 by x, its numbers read as 128 too large; up to `end`. */
static inline __attribute__((always_inline)) __m512 int8_block(const Fixed *x, const uint8_t *w,
                                                               int64_t from, int64_t end,
                                                               __m512 sum) {
    __m512i high = _mm512_setzero_si512(), low = high;
    for (int64_t c = from; c < end; c += 64) {
        __mmask64 within = end - c >= 64 ? ~0ull : (1ull << (end - c)) - 1;
        __m512i bytes = _mm512_maskz_loadu_epi8(within, w + c);
        __m512i values = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
        high = _mm512_dpbusd_epi32(high, values, _mm512_loadu_si512(x->high + c));
        low = _mm512_dpbusd_epi32(low, values, _mm512_loadu_si512(x->low + c));
    }
    __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
    __m512 step = _mm512_set1_ps(x->steps[from / BLOCK]);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), step, sum);
}

/* What adds up to x·(w + 128). A row is read from end to end: memory gives a core more that way than by four rows in turns. */
static __m512 int8_fixed(const Fixed *x, const uint8_t *w, int64_t k) {
    __m512 sum = _mm512_setzero_ps();
    int64_t from = 0;
    for (; from + BLOCK <= k; from += BLOCK) sum = int8_block(x, w, from, from + BLOCK, sum);
    return from < k ? int8_block(x, w, from, k, sum) : sum;
}

/* The same for row `number` of an int4 weight; x_sums are x's sums over groups. */
static float int4_fixed(const Fixed *x, const float *x_sums, const Packed *w, int64_t number) {
    int64_t groups = w->k / w->group, half = w->group / 2;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 sum = _mm512_setzero_ps();
    float through = 0;
    for (int64_t q = 0; q < groups; ++q) {
        const uint8_t *pairs = w->data + (number * w->k + q * w->group) / 2;
        int64_t index = number * groups + q, first = q * w->group;
        __m512i high = _mm512_setzero_si512(), low = high;
        __builtin_prefetch(pairs + 1024);
        for (int64_t c = 0; c < half; c += 64) {
            __mmask64 within = half - c >= 64 ? ~0ull : (1ull << (half - c)) - 1;
            __m512i both = _mm512_maskz_loadu_epi8(within, pairs + c);
            __m512i codes = _mm512_and_si512(both, nibble);
            __m512i others = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
            const int8_t *h = x->high + first + c, *l = x->low + first + c;
            high = _mm512_dpbusd_epi32(high, codes, _mm512_loadu_si512(h));
            low = _mm512_dpbusd_epi32(low, codes, _mm512_loadu_si512(l));
            high = _mm512_dpbusd_epi32(high, others, _mm512_loadu_si512(h + half));
            low = _mm512_dpbusd_epi32(low, others, _mm512_loadu_si512(l + half));
        }
        __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
        float scale = from_bf16(((const uint16_t *)w->scale)[index]);
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(x->steps[q] * scale), sum);
        through += from_bf16(w->offset[index]) * x_sums[q];
    }
    return _mm512_reduce_add_ps(sum) + through;
}

#else
#define HAS_FIXED_POINT 0
#endif
#endif
