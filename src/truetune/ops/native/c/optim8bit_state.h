/* Moments of an optimizer in memory: float32, or codes of 8 bits with one scale per block.
 *
 * Codes are those of blockwise_8bit.h, to the bit, found with one lookup per value instead of two.
 */
#ifndef TT_OPTIM8BIT_STATE_H
#define TT_OPTIM8BIT_STATE_H

#include "blockwise.h"

/* A map of 256 ascending values, and how to find the nearest of them.
 *
 * `nearest` has an entry for each upper half of a float's bits. With all bits flipped where the float is negative,
 * (entry + bits) >> 16 is the code: moment_codes.py tells why. */
typedef struct {
    const float *values;    /* [256] */
    const int32_t *nearest; /* [65536] */
} tt_map;

/* One moment of a tensor. */
typedef struct {
    void *at;      /* float32, or codes */
    float *absmax; /* per block; 0: float32 */
    const tt_map *map;
} tt_moment;

/* Where CPUs have tiles, gathering is the faster way to look up, by a third of a step; elsewhere often the slower. */
#if TT_WIDTH == 16 && defined(__AMX_TILE__)
#define TT_GATHERS 1
#else
#define TT_GATHERS 0
#endif

TT_INLINE void decode_moment(float *to, const uint8_t *codes, const tt_map *map, float absmax, int64_t n) {
    int64_t i = 0;
#if TT_GATHERS
    for (; i + TT_WIDTH <= n; i += TT_WIDTH) {
        __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i)));
        vf_store(to + i, (vf)_mm512_i32gather_ps(code, map->values, 4) * absmax);
    }
#endif
    for (; i < n; i++) to[i] = map->values[codes[i]] * absmax;
}

/* The codes of n values between -1 and 1. Signs are as good as random, so nothing branches on them. */
TT_INLINE void encode_moment(uint8_t *codes, const float *values, const tt_map *map, int64_t n) {
    int64_t i = 0;
#if TT_GATHERS
    for (; i + TT_WIDTH <= n; i += TT_WIDTH) {
        vi bits = (vi)vf_load(values + i);
        vi entry = (vi)_mm512_i32gather_epi32((__m512i)((vu)bits >> 16), map->nearest, 4);
        vi code = (entry + (bits ^ (bits >> 31))) >> 16;
        _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtepi32_epi8((__m512i)code));
    }
#endif
    for (; i < n; i++) {
        int32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        codes[i] = (uint8_t)((map->nearest[(uint32_t)bits >> 16] + (bits ^ (bits >> 31))) >> 16);
    }
}

/* n values of a moment from `from` on, which starts a block, and zeros up to a whole vector. */
TT_INLINE void moment_load(float *to, tt_moment m, int64_t from, int64_t n, int64_t blocksize) {
    if (m.absmax)
        decode_moment(to, (const uint8_t *)m.at + from, m.map, m.absmax[from / blocksize], n);
    else
        memcpy(to, (const float *)m.at + from, (size_t)n * sizeof(float));
    for (int64_t i = n; i % TT_WIDTH; i++) to[i] = 0.0f;
}

/* Writes them back; `values` is overwritten. */
TT_INLINE void moment_store(tt_moment m, float *values, int64_t from, int64_t n, int64_t blocksize) {
    if (!m.absmax) {
        memcpy((float *)m.at + from, values, (size_t)n * sizeof(float));
        return;
    }
    float absmax = block_absmax(values, n, TT_FLOAT32), inverse = block_inverse(absmax);
    m.absmax[from / blocksize] = absmax;
    for (int64_t i = 0; i < n; i += TT_WIDTH) vf_store(values + i, vf_load(values + i) * inverse);
    encode_moment((uint8_t *)m.at + from, values, m.map, n);
}

#endif
