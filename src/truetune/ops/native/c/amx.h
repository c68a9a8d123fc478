/* Products of bfloat16 matrices on the tile unit of x86 (AMX): 16 x 32 by 32 x 16 in one instruction, float32 sums.
 *
 * A left factor is a plain row-major matrix. A right factor has each two of its rows interleaved, one pair of elements
 * in 32 bits. All sizes are multiples of AMX_BLOCK; rows and pairs are padded with zeros up to there.
 */
#ifndef TT_AMX_H
#define TT_AMX_H

#include "heads.h"

#define AMX_BLOCK 32

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TT_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

/* Whether this process may use the tiles: Linux wants to be asked once, and the answer holds for all threads. */
static int amx_is_allowed(void) {
    static int answer = -1;
    int known = __atomic_load_n(&answer, __ATOMIC_RELAXED);
    if (known < 0) {
        known = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* the tiles' data */) == 0;
        __atomic_store_n(&answer, known, __ATOMIC_RELAXED);
    }
    return known;
}

/* All eight tiles at their full size: 16 rows of 64 bytes. */
static void amx_open(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } layout = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&layout);
}

static void amx_close(void) { _tile_release(); }

/* to[32][32] = or += left [32][depth] right [depth / 2][32], each with its row in elements. */
static inline void amx_product(const uint16_t *left, int64_t left_row, const uint32_t *right, int64_t right_row,
                               float *to, int64_t to_row, int64_t depth, int add) {
    __asm__ volatile("" ::: "memory"); /* the compiler does not know that a tile is loaded from what it stores */
    if (add) {
        _tile_loadd(0, to, 4 * to_row);
        _tile_loadd(1, to + 16, 4 * to_row);
        _tile_loadd(2, to + 16 * to_row, 4 * to_row);
        _tile_loadd(3, to + 16 * to_row + 16, 4 * to_row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t p = 0; p < depth; p += 32, right += 16 * right_row) {
        _tile_loadd(4, left + p, 2 * left_row);
        _tile_loadd(5, left + p + 16 * left_row, 2 * left_row);
        _tile_loadd(6, right, 4 * right_row);
        _tile_loadd(7, right + 16, 4 * right_row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, 4 * to_row);
    _tile_stored(1, to + 16, 4 * to_row);
    _tile_stored(2, to + 16 * to_row, 4 * to_row);
    _tile_stored(3, to + 16 * to_row + 16, 4 * to_row);
    __asm__ volatile("" ::: "memory");
}

/* to[column][row] = from[row][column], of 32-bit elements; both counts are multiples of 16. */
static inline void amx_transpose(uint32_t *to, int64_t to_row, const uint32_t *from, int64_t from_row, int64_t rows,
                                 int64_t columns) {
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < columns; j += 16) {
            vf block[16];
            for (int r = 0; r < 16; r++) memcpy(&block[r], from + (i + r) * from_row + j, 64);
            vf_transpose(block);
            for (int r = 0; r < 16; r++) memcpy(to + (j + r) * to_row + i, &block[r], 64);
        }
}

/* Right factor of a sum over the rows: pairs[row / 2][column] of rows [count][columns], `apart` from each other. */
static void amx_pair_rows(uint32_t *pairs, const uint16_t *rows, int64_t apart, int64_t count, int64_t columns) {
    __m512i low, high;
    uint16_t at[64];
    for (int i = 0; i < 32; i++) {
        at[i] = (uint16_t)(i / 2 + i % 2 * 32);
        at[32 + i] = (uint16_t)(at[i] + 16);
    }
    memcpy(&low, at, 64);
    memcpy(&high, at + 32, 64);
    for (int64_t i = 0; i < count; i += 2)
        for (int64_t j = 0; j < columns; j += 32) {
            __m512i even = _mm512_loadu_si512(rows + i * apart + j);
            __m512i odd = _mm512_loadu_si512(rows + (i + 1) * apart + j);
            uint32_t *to = pairs + i / 2 * columns + j;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, high, odd));
        }
}

/* Right factor of a sum over the columns: pairs[column / 2][row] of rows [count][columns]. */
static void amx_pair_columns(uint32_t *pairs, int64_t pairs_row, const uint16_t *rows, int64_t count, int64_t columns) {
    amx_transpose(pairs, pairs_row, (const uint32_t *)rows, columns / 2, count, columns / 2);
}

/* Left factor of a sum over the rows: to[column][row] of rows [count][columns], by way of their `pairs`. */
static void amx_columns(uint16_t *to, int64_t to_row, uint32_t *pairs, const uint16_t *rows, int64_t count,
                        int64_t columns) {
    amx_pair_rows(pairs, rows, columns, count, columns);
    amx_transpose((uint32_t *)to, to_row / 2, pairs, columns, count / 2, columns);
}

/* 2^x to within 1e-7; 0 for -inf, and NaN for NaN. */
static inline __m512 amx_exp2(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, 0x09); /* x - floor(x) */
    __m512 p = _mm512_set1_ps(1.86713025e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.01702981e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.57999136e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4016445e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93151312e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x); /* p 2^floor(x) */
}

static inline __m512 amx_wide(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* The first `count` of 16 lanes, and of 32. */
static inline __mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }
static inline __mmask32 first32(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

/* One head of a token as bfloat16, padded with zeros to a multiple of 32. */
static inline void amx_load_head(const stretch *s, uint16_t *row, const void *base, int64_t stride, int64_t position,
                                 int64_t head) {
    const uint16_t *from = (const uint16_t *)base + (s->start + position) * stride + head * s->a->dim;
    prefetch_row(from, stride, s->a);
    for (int64_t d = 0; d < s->a->dim; d += 32)
        _mm512_storeu_si512(row + d, _mm512_maskz_loadu_epi16(first32(s->a->dim - d), from + d));
}

/* The same, turned by the token's angle in float32 and rounded once. */
static inline void amx_load_turned(const stretch *s, uint16_t *row, const void *base, int64_t stride, int64_t position,
                                   int64_t head) {
    amx_load_head(s, row, base, stride, position, head);
    if (!s->cos) return;
    const uint16_t *from = (const uint16_t *)base + (s->start + position) * stride + head * s->a->dim;
    int64_t half = s->a->rotary / 2;
    const float *cos = s->cos + position * s->a->rotary, *sin = s->sin + position * s->a->rotary;
    for (int64_t d = 0; d < half; d += 16) {
        __mmask16 m = first16(half - d);
        __m512 low = amx_wide(_mm256_maskz_loadu_epi16(m, from + d));
        __m512 high = amx_wide(_mm256_maskz_loadu_epi16(m, from + half + d));
        __m512 low_sin = _mm512_mul_ps(high, _mm512_maskz_loadu_ps(m, sin + d));
        __m512 high_sin = _mm512_mul_ps(low, _mm512_maskz_loadu_ps(m, sin + half + d));
        low = _mm512_fmsub_ps(low, _mm512_maskz_loadu_ps(m, cos + d), low_sin);
        high = _mm512_fmadd_ps(high, _mm512_maskz_loadu_ps(m, cos + half + d), high_sin);
        _mm256_mask_storeu_epi16(row + d, m, (__m256i)_mm512_cvtneps_pbh(low));
        _mm256_mask_storeu_epi16(row + half + d, m, (__m256i)_mm512_cvtneps_pbh(high));
    }
}

#endif
#endif
