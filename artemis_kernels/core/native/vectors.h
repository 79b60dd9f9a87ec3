/* Sixteen numbers of a row as fp32, read and rounded back; those not `within` are zero, and kept. */

#ifndef ARTEMIS_VECTORS_H
#define ARTEMIS_VECTORS_H

#include "numbers.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

static inline __m512 load_f32(__mmask16 within, const float *from) {
    return _mm512_maskz_loadu_ps(within, from);
}

static inline void store_f32(float *to, __mmask16 within, __m512 value) {
    _mm512_mask_storeu_ps(to, within, value);
}

static inline __m512 load_bf16(__mmask16 within, const uint16_t *from) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(within, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

static inline __m512i bf16_bits(__m512 value) { /* as to_bf16, in the low halves */
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_srli_epi32(bits, 16), nan, _mm512_set1_epi32(0x7fc0));
}

static inline void store_bf16(uint16_t *to, __mmask16 within, __m512 value) {
    _mm256_mask_storeu_epi16(to, within, _mm512_cvtepi32_epi16(bf16_bits(value)));
}
#endif

#endif
