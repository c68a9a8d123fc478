/* 32 x 32 results of a product with int8 codes: summed up on the tile unit (AMX), scaled, and stored. */
#ifndef TT_INT8_TILES_H
#define TT_INT8_TILES_H

#include "int8_blocks.h"

#define INT8_RESULTS 4096 /* bytes of 32 x 32 results: [2 x 2 tiles][16][16] */

enum { INT8_ALL, INT8_CHOSEN, INT8_TURNED };

/* A sum over depth. ALL: codes with the weight's rows. CHOSEN: bfloat16 with chosen columns of the weight's rows.
 * TURNED: bfloat16 with the weight's columns. */
typedef struct {
    const char *left; /* blocks, each of `parts` */
    int64_t depth;
    const int64_t *chosen;
    int32_t kind, parts;
} int8_sum;

typedef struct {
    int8_sum sum, chosen; /* chosen.depth 0: there is none */
    const int8_t *codes;  /* the weight [out][in] */
    int64_t in, rows, columns;
    const float *left_scale, *right_scale, *bias; /* of rows; of columns; of columns or null. No left_scale: none */
    void *out;
    int32_t dtype, add;
    int64_t height, width, next; /* of a unit of work; the first that nobody took */
    char *scratch;
} int8_product;

#define INT8_TILES(to, a, b)     \
    if (codes)                   \
        _tile_dpbssd(to, a, b);  \
    else                         \
        _tile_dpbf16ps(to, a, b)

/* to = or += left times right, `parts` left blocks one after the other; `codes` is a constant at every call.
 * 256 bytes of what is `wanted` next come nearer with each step. */
__attribute__((target("amx-int8"))) static inline void int8_results(char *to, const char *left, int64_t part,
                                                                    int64_t parts, const char *right, int64_t steps,
                                                                    int add, const char *wanted, const int codes) {
    __asm__ volatile("" ::: "memory"); /* the compiler does not know that a tile is loaded from what it stores */
    if (add) {
        _tile_loadd(0, to, 64);
        _tile_loadd(1, to + INT8_TILE, 64);
        _tile_loadd(2, to + 2 * INT8_TILE, 64);
        _tile_loadd(3, to + 3 * INT8_TILE, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (const char *end = left + parts * part; left < end; left += part)
        for (int64_t s = 0; s < steps; s++) {
            const char *a = left + s * INT8_STEP, *b = right + s * INT8_STEP;
            _tile_stream_loadd(6, b, 64); /* panels only pass through the first cache; the left block stays there */
            _tile_loadd(4, a, 64);
            INT8_TILES(0, 4, 6);
            _tile_loadd(5, a + INT8_TILE, 64);
            INT8_TILES(2, 5, 6);
            _tile_stream_loadd(7, b + INT8_TILE, 64);
            INT8_TILES(1, 4, 7);
            INT8_TILES(3, 5, 7);
            for (int64_t line = 0; line < 256; line += 64) __builtin_prefetch(wanted + s * 256 + line, 0, 2);
        }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + INT8_TILE, 64);
    _tile_stored(2, to + 2 * INT8_TILE, 64);
    _tile_stored(3, to + 3 * INT8_TILE, 64);
    __asm__ volatile("" ::: "memory");
}

/* Some rows and columns of the result. */
typedef struct {
    int64_t row, rows, column, columns;
} int8_area;

/* 16 sums of a row: times the row's factor, with what was chosen, times the columns' factors, with the bias. */
TT_INLINE __m512 int8_result(const char *sums, const char *chosen, __m512 row, const float *factors, const float *bias,
                             int64_t count, int forward) {
    if (!forward) return _mm512_loadu_ps(sums);
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), row);
    if (chosen) y = _mm512_add_ps(y, _mm512_loadu_ps(chosen));
    y = _mm512_mul_ps(y, _mm512_loadu_ps(factors));
    return bias ? _mm512_add_ps(y, _mm512_maskz_loadu_ps((__mmask16)first64(count), bias)) : y;
}

/* Stores 32 results side by side, or as many as there are. */
TT_INLINE void int8_store(void *to, int64_t at, __m512 y[2], int64_t count, int add, int dtype) {
    if (dtype == TT_FLOAT32) {
        for (int h = 0; h < 2; h++) {
            float *out = (float *)to + at + h * 16;
            __mmask16 m = (__mmask16)first64(count - h * 16);
            if (add) y[h] = _mm512_add_ps(y[h], _mm512_maskz_loadu_ps(m, out));
            _mm512_mask_storeu_ps(out, m, y[h]);
        }
        return;
    }
    uint16_t *out = (uint16_t *)to + at;
    __mmask32 m = (__mmask32)first64(count);
    if (add) {
        __m512i there = _mm512_maskz_loadu_epi16(m, out);
        y[0] = _mm512_add_ps(y[0], amx_wide(_mm512_castsi512_si256(there)));
        y[1] = _mm512_add_ps(y[1], amx_wide(_mm512_extracti64x4_epi64(there, 1)));
    }
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]);
    if (count >= 32)
        _mm512_storeu_si512(out, both);
    else
        _mm512_mask_storeu_epi16(out, m, both);
}

/* One row of blocks, side by side: row by row, so that what is stored lies together. `c` is a copy, or each store could
 * have changed it. */
TT_INLINE void int8_finish_as(const int8_product c, int8_area u, const char *results, const char *chosen,
                              const float *factors, int dtype, int forward) {
    for (int64_t i = 0; i < u.rows; i++) {
        int64_t at = (i >> 4) * 2 * INT8_TILE + (i & 15) * 64, to = (u.row + i) * c.columns + u.column;
        __m512 row = _mm512_set1_ps(forward ? c.left_scale[u.row + i] * (1.0f / 127.0f) : 0.0f);
        for (int64_t j = 0; j < u.columns; j += 32, at += INT8_RESULTS) {
            __m512 y[2];
            for (int h = 0; h < 2; h++)
                y[h] = int8_result(results + at + h * INT8_TILE, chosen ? chosen + at + h * INT8_TILE : 0, row,
                                   factors + j + h * 16, c.bias ? c.bias + u.column + j + h * 16 : 0,
                                   u.columns - j - h * 16, forward);
            int8_store(c.out, to + j, y, u.columns - j, c.add, dtype);
        }
    }
}

static void int8_finish(const int8_product *c, int8_area u, const char *results, const char *chosen,
                        const float *factors) {
    switch ((c->left_scale != 0) * 2 + c->dtype) {
    case 0: int8_finish_as(*c, u, results, chosen, factors, TT_FLOAT32, 0); break;
    case 1: int8_finish_as(*c, u, results, chosen, factors, TT_BFLOAT16, 0); break;
    case 2: int8_finish_as(*c, u, results, chosen, factors, TT_FLOAT32, 1); break;
    default: int8_finish_as(*c, u, results, chosen, factors, TT_BFLOAT16, 1);
    }
}

#endif
