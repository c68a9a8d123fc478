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

/* 16 results of row i from column j on: times the row's factor, with what was chosen, times the columns' factors, with
 * the bias. */
TT_INLINE __m512 int8_result(const int8_product *c, int8_area u, int64_t i, int64_t j, const char *results,
                             const char *chosen, const float *factors, int forward) {
    int64_t at = j / INT8_SIDE * INT8_RESULTS + (i / 16 * 2 + j / 16 % 2) * INT8_TILE + i % 16 * 64;
    if (!forward) return _mm512_loadu_ps(results + at);
    __m512 y = _mm512_cvtepi32_ps(_mm512_loadu_si512(results + at));
    y = _mm512_mul_ps(y, _mm512_set1_ps(c->left_scale[u.row + i] * (1.0f / 127.0f)));
    if (chosen) y = _mm512_add_ps(y, _mm512_loadu_ps(chosen + at));
    y = _mm512_mul_ps(y, _mm512_loadu_ps(factors + j));
    __mmask16 m = (__mmask16)first64(u.columns - j);
    return c->bias ? _mm512_add_ps(y, _mm512_maskz_loadu_ps(m, c->bias + u.column + j)) : y;
}

/* Stores 32 results side by side, or as many as there are. */
TT_INLINE void int8_store(const int8_product *c, int64_t at, __m512 y[2], int64_t count, int dtype) {
    if (dtype == TT_FLOAT32) {
        for (int h = 0; h < 2; h++) {
            float *out = (float *)c->out + at + h * 16;
            __mmask16 m = (__mmask16)first64(count - h * 16);
            if (c->add) y[h] = _mm512_add_ps(y[h], _mm512_maskz_loadu_ps(m, out));
            _mm512_mask_storeu_ps(out, m, y[h]);
        }
        return;
    }
    uint16_t *out = (uint16_t *)c->out + at;
    __mmask32 m = (__mmask32)first64(count);
    if (c->add) {
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

/* One row of blocks, side by side: row by row, so that what is stored lies together. */
TT_INLINE void int8_finish_as(const int8_product *c, int8_area u, const char *results, const char *chosen,
                              const float *factors, int dtype, int forward) {
    for (int64_t i = 0; i < u.rows; i++)
        for (int64_t j = 0; j < u.columns; j += 32) {
            __m512 y[2] = {int8_result(c, u, i, j, results, chosen, factors, forward),
                           int8_result(c, u, i, j + 16, results, chosen, factors, forward)};
            int8_store(c, (u.row + i) * c->columns + u.column + j, y, u.columns - j, dtype);
        }
}

static void int8_finish(const int8_product *c, int8_area u, const char *results, const char *chosen,
                        const float *factors) {
    switch ((c->left_scale != 0) * 2 + c->dtype) {
    case 0: int8_finish_as(c, u, results, chosen, factors, TT_FLOAT32, 0); break;
    case 1: int8_finish_as(c, u, results, chosen, factors, TT_BFLOAT16, 0); break;
    case 2: int8_finish_as(c, u, results, chosen, factors, TT_FLOAT32, 1); break;
    default: int8_finish_as(c, u, results, chosen, factors, TT_BFLOAT16, 1);
    }
}

#endif
