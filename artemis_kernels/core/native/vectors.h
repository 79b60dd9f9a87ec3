/* Sixteen numbers of a row as fp32, read and rounded back; those not `within` are zero, and kept.
   And sixteen rows of sixteen, transposed. */

#ifndef ARTEMIS_VECTORS_H
#define ARTEMIS_VECTORS_H

#include "numbers.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

/* A mask of the first `count` lanes; of all from 16 on. */
static inline __mmask16 first_of(int64_t count) {
    return count >= 16 ? 0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : 0;
}

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

/* 16 rows of 16 ints, transposed. */
static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
            r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
#endif

#endif
