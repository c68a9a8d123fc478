/* Both factors of a product with int8 codes, as the tile unit (AMX) wants them.
 *
 * A tile instruction sums over 64 bytes of depth, a step: 64 codes, or 32 bfloat16. A left block is 32 rows,
 * [step][row][64 bytes]. A right panel is 32 columns, [step][2][16 x 16 columns of 4 bytes]: four codes, or two
 * bfloat16, that follow each other in depth lie together. What lies beyond a matrix is zero.
 * A code is exact in bfloat16, whose numbers have 8 bits; a float32 is the sum of three bfloat16.
 */
#ifndef TT_INT8_BLOCKS_H
#define TT_INT8_BLOCKS_H

#include "amx.h"

#define INT8_SIDE 32   /* rows of a block, columns of a panel */
#define INT8_STEP 2048 /* bytes of a step of either */
#define INT8_TILE 1024

static inline __mmask64 first64(int64_t count) {
    return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

static int64_t int8_count(int64_t n, int64_t each) { return (n + each - 1) / each; }

typedef struct {
    const void *values; /* [rows][depth] */
    const float *scale; /* of each column, in 127ths; or null */
    char *blocks;       /* [block][part][step][row][32] */
    int64_t rows, depth;
    int32_t dtype;
} tt_int8_lay_args;

static int int8_parts(int dtype) { return dtype == TT_FLOAT32 ? 3 : 1; }

/* What x has beyond its first bits, exactly; nothing where x is not finite. */
static inline __m512 int8_rest(__m512 x, __m256i first) {
    __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(x, x), _mm512_setzero_ps(), _CMP_EQ_OQ);
    return _mm512_maskz_sub_ps(finite, x, amx_wide(first));
}

/* 16 values of a row from column d on, those of `m`, times the factors of their columns. */
TT_INLINE __m512 int8_load(const tt_int8_lay_args c, int64_t row, int64_t d, __mmask16 m, __m512 factors, int dtype) {
    const void *at = (const char *)c.values + (row * c.depth + d) * element_size(dtype);
    __m512 x = dtype == TT_FLOAT32 ? _mm512_maskz_loadu_ps(m, at) : amx_wide(_mm256_maskz_loadu_epi16(m, at));
    return c.scale ? _mm512_mul_ps(x, factors) : x;
}

TT_INLINE void int8_lay_block(const tt_int8_lay_args c, int64_t block, int dtype) {
    int64_t parts = int8_parts(dtype), size = int8_count(c.depth, 32) * INT8_STEP, first = block * INT8_SIDE;
    char *to = c.blocks + block * parts * size;
    for (int64_t d = 0; d < c.depth; d += 32) {
        __mmask16 m[2] = {(__mmask16)first64(c.depth - d), (__mmask16)first64(c.depth - d - 16)};
        __m512 factors[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int h = 0; h < 2 && c.scale; h++)
            factors[h] =
                _mm512_mul_ps(_mm512_maskz_loadu_ps(m[h], c.scale + d + h * 16), _mm512_set1_ps(1.0f / 127.0f));
        for (int64_t i = 0; i < INT8_SIDE; i++, to += 64) {
            int there = first + i < c.rows;
            __m512 low = int8_load(c, first + i, d, there ? m[0] : 0, factors[0], dtype);
            __m512 high = int8_load(c, first + i, d + 16, there ? m[1] : 0, factors[1], dtype);
            for (int64_t p = 0; p < parts; p++) {
                __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
                _mm512_storeu_si512(to + p * size, both);
                if (p + 1 == parts) break;
                low = int8_rest(low, _mm512_castsi512_si256(both));
                high = int8_rest(high, _mm512_extracti64x4_epi64(both, 1));
            }
        }
    }
}

static void int8_lay_task(void *context, int64_t block) {
    const tt_int8_lay_args *c = (const tt_int8_lay_args *)context;
    if (c->dtype == TT_FLOAT32)
        int8_lay_block(*c, block, TT_FLOAT32);
    else
        int8_lay_block(*c, block, TT_BFLOAT16);
}

/* A tile of a panel whose columns are 16 rows of codes: turned by groups of four. */
static inline void int8_turn(char *tile, const int8_t *codes, int64_t row) {
    for (int64_t quarter = 0; quarter < 64; quarter += 16, tile += 256) {
        __m512i lanes[4]; /* lanes[i]: 16 bytes of each of the rows i, 4 + i, 8 + i, 12 + i */
        for (int64_t i = 0; i < 4; i++) {
            const int8_t *at = codes + i * row + quarter;
            __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)at));
            four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(at + 4 * row)), 1);
            four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(at + 8 * row)), 2);
            lanes[i] = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(at + 12 * row)), 3);
        }
        __m512i a = _mm512_unpacklo_epi32(lanes[0], lanes[1]), b = _mm512_unpackhi_epi32(lanes[0], lanes[1]);
        __m512i c = _mm512_unpacklo_epi32(lanes[2], lanes[3]), d = _mm512_unpackhi_epi32(lanes[2], lanes[3]);
        _mm512_storeu_si512(tile, _mm512_unpacklo_epi64(a, c));
        _mm512_storeu_si512(tile + 64, _mm512_unpackhi_epi64(a, c));
        _mm512_storeu_si512(tile + 128, _mm512_unpacklo_epi64(b, d));
        _mm512_storeu_si512(tile + 192, _mm512_unpackhi_epi64(b, d));
    }
}

/* A panel whose columns are `rows` rows of codes, `depth` of each. */
static void int8_pack_rows(char *panel, const int8_t *codes, int64_t row, int64_t rows, int64_t depth) {
    for (int64_t d = 0; d < depth; d += 64)
        for (int64_t r = 0; r < INT8_SIDE; r += 16, panel += INT8_TILE) {
            if (r + 16 <= rows && d + 64 <= depth) {
                int8_turn(panel, codes + r * row + d, row);
                continue;
            }
            int8_t whole[16 * 64];
            for (int64_t i = 0; i < 16; i++) {
                __mmask64 m = r + i < rows ? first64(depth - d) : 0;
                _mm512_storeu_si512(whole + i * 64, _mm512_maskz_loadu_epi8(m, codes + (r + i) * row + d));
            }
            int8_turn(panel, whole, 64);
        }
}

/* The same of chosen columns of the codes, as bfloat16. */
static void int8_pack_chosen(char *panel, const int8_t *codes, int64_t row, int64_t rows, const int64_t *chosen,
                             int64_t depth) {
    memset(panel, 0, (size_t)(int8_count(depth, 32) * INT8_STEP));
    for (int64_t d = 0; d < depth; d++)
        for (int64_t r = 0; r < rows; r++) {
            uint16_t code = bf16_round((float)codes[r * row + chosen[d]]);
            int64_t tile = d / 32 * 2 + r / 16;
            memcpy(panel + tile * INT8_TILE + d % 32 / 2 * 64 + r % 16 * 4 + d % 2 * 2, &code, sizeof code);
        }
}

/* 16 codes as float32, whose lower halves are then 0. */
static inline __m512i int8_floats(const int8_t *codes, __mmask16 m) {
    return (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, codes)));
}

/* Panels, `apart` bytes apart, whose columns are columns of codes, `depth` of each, as bfloat16. */
static void int8_pack_columns(char *panels, int64_t apart, const int8_t *codes, int64_t row, int64_t depth,
                              int64_t columns) {
    for (int64_t step = 0; step < depth; step += 32)
        for (int64_t j = 0; j < round_up(columns, INT8_SIDE); j += 16) {
            __mmask16 m = (__mmask16)first64(columns - j);
            char *to = panels + j / INT8_SIDE * apart + step / 32 * INT8_STEP + j % INT8_SIDE / 16 * INT8_TILE;
            for (int64_t d = step; d < step + 32; d += 2, to += 64) {
                __m512i even = int8_floats(codes + d * row + j, d < depth ? m : 0);
                __m512i odd = int8_floats(codes + (d + 1) * row + j, d + 1 < depth ? m : 0);
                _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
            }
        }
}

#endif
