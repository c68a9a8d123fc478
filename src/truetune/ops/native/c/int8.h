/* LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): rows of values as codes of 8 bits, and back.
 *
 * A row of codes has one scale, its largest size: value = code * scale / 127. Codes are rounded to the nearest, ties to
 * even; no product is contracted into a sum before that.
 */
#ifndef TT_INT8_H
#define TT_INT8_H

#include "product.h"
#include "rows.h"

#define INT8_ROWS 32    /* of a block, which is a task */
#define INT8_COLUMNS 64 /* of a block's part that lies together, where codes are laid out for the tile unit */

typedef int8_t int8_codes __attribute__((vector_size(TT_WIDTH))); /* one for each lane */

typedef struct {
    const void *x;
    int8_t *codes;
    float *scale;
    uint8_t *outlying; /* [n]: columns that hold a value of `limit` or more; null: none may */
    int32_t *found;    /* whether there is one */
    int64_t rows, n;
    int32_t dtype, blocked;
    float limit;
} tt_int8_quantize_args;

static inline vf int8_size(vf x) { return (vf)((vu)x & 0x7fffffffu); }

/* The same where a value reaches the limit or is a NaN: columns are marked. NaN if there is nothing to mark. */
static __attribute__((noinline)) float int8_scale_with(const tt_int8_quantize_args *c, int64_t row) {
    float most = 0.0f;
    int bad = 0;
    for (int64_t i = 0; i < c->n; i++) {
        float value;
        load_row(&value, (const char *)c->x + (row * c->n + i) * element_size(c->dtype), 1, c->dtype);
        float size = fabsf(value);
        if (size < c->limit)
            most = size > most ? size : most;
        else if (value == value && c->outlying) {
            __atomic_store_n(c->outlying + i, 1, __ATOMIC_RELAXED);
            __atomic_store_n(c->found, 1, __ATOMIC_RELAXED);
        } else
            bad = 1;
    }
    return bad ? NAN : most;
}

/* The scale of a row: its largest size, whose bits are also the largest whole number. */
TT_INLINE float int8_scale_of(tt_int8_quantize_args c, int64_t row, int dtype) {
    const void *x = at_row(c.x, row, c.n, dtype);
    int32_t bits = 0;
    if (dtype == TT_FLOAT32) {
        for (int64_t i = 0; i < c.n; i++) {
            int32_t size = ((const int32_t *)x)[i] & 0x7fffffff;
            bits = size > bits ? size : bits;
        }
    } else {
        int16_t most = 0;
        for (int64_t i = 0; i < c.n; i++) {
            int16_t size = ((const int16_t *)x)[i] & 0x7fff;
            most = size > most ? size : most;
        }
        bits = most << 16;
    }
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale < c.limit ? scale : int8_scale_with(&c, row); /* a NaN has more bits than an infinite value */
}

/* TT_WIDTH codes as whole numbers, zeros for what is beyond the limit. A product that is masked can't be contracted
 * into the sum that rounds it, which would give another number. */
TT_INLINE vi int8_whole(tt_int8_quantize_args c, vf value, float inverse) {
    vi inside = int8_size(value) < c.limit;
    vf scaled = (vf)(inside & (vi)(value * inverse));
#if TT_WIDTH == 16
    return (vi)_mm512_cvtps_epi32((__m512)scaled);
#else
    return (vi)(scaled + 12582912.0f) - 0x4b400000; /* 1.5 * 2^23 */
#endif
}

/* `count` codes of a row from the i-th on. */
TT_INLINE void int8_codes_of(tt_int8_quantize_args c, int64_t row, int64_t i, float inverse, int dtype, int8_t *to,
                             int64_t count) {
    const void *x = at_row(c.x, row, c.n, dtype);
    int64_t j = 0;
#if TT_WIDTH == 16
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (; j + 64 <= count; j += 64) {
        __m512i four[4];
        for (int k = 0; k < 4; k++)
            four[k] = (__m512i)int8_whole(c, load_at(x, i + j + 16 * k, i + j + 64, dtype, 0.0f), inverse);
        __m512i low = _mm512_packs_epi32(four[0], four[1]), high = _mm512_packs_epi32(four[2], four[3]);
        _mm512_storeu_si512(to + j, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
    }
#endif
    for (; j < count; j += TT_WIDTH) {
        vi whole = int8_whole(c, load_at(x, i + j, c.n, dtype, 0.0f), inverse);
        int8_codes codes = __builtin_convertvector(whole, int8_codes);
        memcpy(to + j, &codes, (size_t)smaller(TT_WIDTH, count - j));
    }
}

TT_INLINE void int8_quantize_block(tt_int8_quantize_args c, int64_t block, int dtype) {
    int64_t first = block * INT8_ROWS, rows = smaller(INT8_ROWS, c.rows - first);
    float inverse[INT8_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        float scale = int8_scale_of(c, first + r, dtype), factor = 1.0f / scale * 127.0f;
        c.scale[first + r] = scale;
        inverse[r] = factor < INFINITY ? factor : 0.0f; /* nothing there, or NaN */
    }
    if (!c.blocked) {
        for (int64_t r = 0; r < rows; r++)
            int8_codes_of(c, first + r, 0, inverse[r], dtype, c.codes + (first + r) * c.n, c.n);
        return;
    }
    int8_t *to = c.codes + first * round_up(c.n, INT8_COLUMNS);
    for (int64_t i = 0; i < c.n; i += INT8_COLUMNS)
        for (int64_t r = 0; r < INT8_ROWS; r++, to += INT8_COLUMNS) {
            int64_t count = smaller(INT8_COLUMNS, c.n - i);
            if (r >= rows || count < INT8_COLUMNS) memset(to, 0, INT8_COLUMNS);
            if (r < rows && count == INT8_COLUMNS)
                int8_codes_of(c, first + r, i, inverse[r], dtype, to, INT8_COLUMNS);
            else if (r < rows)
                int8_codes_of(c, first + r, i, inverse[r], dtype, to, count);
        }
}

static void int8_quantize_task(void *context, int64_t block) {
    const tt_int8_quantize_args *c = (const tt_int8_quantize_args *)context;
    if (c->dtype == TT_FLOAT32)
        int8_quantize_block(*c, block, TT_FLOAT32);
    else
        int8_quantize_block(*c, block, TT_BFLOAT16);
}

/* Whether a column was marked. */
TT_API int32_t tt_int8_quantize(const void *x, int8_t *codes, float *scale, uint8_t *outlying, int64_t rows, int64_t n,
                                int32_t dtype, int32_t blocked, float limit) {
    int32_t found = 0;
    tt_int8_quantize_args c = {x, codes, scale, outlying, &found, rows, n, dtype, blocked, limit};
    tt_parallel((rows + INT8_ROWS - 1) / INT8_ROWS, int8_quantize_task, &c);
    return found;
}

typedef struct {
    const char *x;
    int8_t *codes;
    char *values; /* [rows][count] */
    const int64_t *columns;
    int64_t rows, n, count;
    int32_t dtype, blocked;
} tt_int8_apart_args;

static void int8_apart_task(void *context, int64_t block) {
    const tt_int8_apart_args c = *(const tt_int8_apart_args *)context;
    int64_t first = block * INT8_ROWS, rows = smaller(INT8_ROWS, c.rows - first), size = element_size(c.dtype);
    int8_t *codes = c.codes + first * (c.blocked ? round_up(c.n, INT8_COLUMNS) : c.n);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < c.count; k++) {
            int64_t column = c.columns[k], inside = column % INT8_COLUMNS;
            const char *from = c.x + ((first + r) * c.n + column) * size;
            memcpy(c.values + ((first + r) * c.count + k) * size, from, (size_t)size);
            codes[c.blocked ? (column - inside) * INT8_ROWS + r * INT8_COLUMNS + inside : r * c.n + column] = 0;
        }
}

/* Some columns of x as they are, beside codes of x in which they become 0. */
TT_API void tt_int8_apart(const void *x, int8_t *codes, void *values, const int64_t *columns, int64_t rows, int64_t n,
                          int64_t count, int32_t dtype, int32_t blocked) {
    tt_int8_apart_args c = {(const char *)x, codes, (char *)values, columns, rows, n, count, dtype, blocked};
    tt_parallel((rows + INT8_ROWS - 1) / INT8_ROWS, int8_apart_task, &c);
}

#include "int8_rescale.h"
#include "int8_amx.h"

#endif
