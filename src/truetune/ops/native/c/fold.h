/* W + s B A in place: the products are summed up in float32, added to W, and rounded once; and whether all of it is
 * finite.
 *
 * A band of columns of A stays in the cache while all rows pass by; within it a tile of rows and vectors stays in
 * registers. An element's sum runs over the rank in order, so neither tiles nor threads change a bit of it.
 */
#ifndef TT_FOLD_H
#define TT_FOLD_H

#include "rows.h"

#if TT_WIDTH == 16
#define TT_FOLD_ROWS 6
#define TT_FOLD_VECTORS 4
#else
#define TT_FOLD_ROWS 4
#define TT_FOLD_VECTORS 2
#endif
#define TT_FOLD_TASK 48    /* rows: a multiple of both tiles' */
#define TT_FOLD_BAND 32768 /* bytes of A */

/* A loop over a tile's rows or vectors, which is to become that many registers. */
#define TT_WHOLE _Pragma("GCC unroll 8")

typedef struct {
    char *w;
    const float *a, *b;
    int64_t rows, n, rank;
    float scale;
    int32_t dtype;
    int32_t *spoilt;
} tt_fold_args;

/* Weights keep their subnormal values, which the instruction behind vf_to_bf16 would take for 0. */
TT_INLINE void fold_store(void *row, int64_t i, int64_t n, vf v, int dtype) {
    if (dtype == TT_FLOAT32) {
        store_at(row, i, n, v, TT_FLOAT32);
        return;
    }
#if TT_WIDTH == 16 && defined(__AVX512BF16__)
    if (n - i >= TT_WIDTH && !_mm512_fpclass_ps_mask((__m512)v, 0x20)) { /* 0x20: is subnormal */
        vf_to_bf16((uint16_t *)row + i, v);
        return;
    }
#endif
    vu rounded = (vu)v + 0x7fffu + (((vu)v >> 16) & 1u);
    vh h = vu_narrowed((vu)vf_select(v != v, vf_set(NAN), (vf)rounded) >> 16);
    if (n - i < TT_WIDTH)
        memcpy((uint16_t *)row + i, &h, (size_t)(n - i) * sizeof h[0]);
    else
        memcpy((uint16_t *)row + i, &h, sizeof h);
}

/* Rows `row` and on, `high` of them, by `wide` vectors of columns from `i` on; only a single vector may be cut by n.
 * `zeros` stays 0 as long as every sum is finite, once rounded too: of bf16 those that would not be, from 2^128 less
 * half a step on, are exactly the ones that this factor brings beyond float32. */
TT_INLINE void fold_tile(tt_fold_args c, int64_t row, int64_t i, int high, int wide, int dtype, vf *zeros) {
    vf sums[TT_FOLD_ROWS][TT_FOLD_VECTORS] = {{{0}}};
    for (int64_t k = 0; k < c.rank; k++) {
        vf a[TT_FOLD_VECTORS];
        TT_WHOLE
        for (int v = 0; v < wide; v++) {
            const float *from = c.a + k * c.n;
            a[v] = wide > 1 ? vf_load(from + i + v * TT_WIDTH) : load_at(from, i, c.n, TT_FLOAT32, 0.0f);
        }
        TT_WHOLE
        for (int r = 0; r < high; r++) {
            vf b = vf_set(c.b[(row + r) * c.rank + k]);
            TT_WHOLE
            for (int v = 0; v < wide; v++) sums[r][v] += b * a[v];
        }
    }
    TT_WHOLE
    for (int r = 0; r < high; r++) {
        void *w = at_row(c.w, row + r, c.n, dtype);
        TT_WHOLE
        for (int v = 0; v < wide; v++) {
            int64_t at = i + v * TT_WIDTH, end = wide > 1 ? at + TT_WIDTH : c.n;
            vf sum = load_at(w, at, end, dtype, 0.0f) + vf_set(c.scale) * sums[r][v];
            *zeros += sum * (dtype == TT_FLOAT32 ? 1.0f : 1.0f + 0x1.008p-9f) * 0.0f;
            fold_store(w, at, end, sum, dtype);
        }
    }
}

TT_INLINE void fold_rows(tt_fold_args c, int64_t row, int64_t first, int64_t end, int high, int dtype, vf *zeros) {
    int64_t i = first;
    for (; i + TT_FOLD_VECTORS * TT_WIDTH <= end; i += TT_FOLD_VECTORS * TT_WIDTH)
        fold_tile(c, row, i, high, TT_FOLD_VECTORS, dtype, zeros);
    for (; i < end; i += TT_WIDTH) fold_tile(c, row, i, high, 1, dtype, zeros);
}

TT_INLINE void fold_band(tt_fold_args c, int64_t row, int64_t last, int64_t first, int64_t end, int dtype) {
    vf zeros = {0};
    for (; row + TT_FOLD_ROWS <= last; row += TT_FOLD_ROWS) fold_rows(c, row, first, end, TT_FOLD_ROWS, dtype, &zeros);
    for (; row + 4 <= last; row += 4) fold_rows(c, row, first, end, 4, dtype, &zeros);
    for (; row < last; row++) fold_rows(c, row, first, end, 1, dtype, &zeros);
    if (vf_sum(zeros) != 0.0f) __atomic_store_n(c.spoilt, 1, __ATOMIC_RELAXED);
}

/* Columns of a band: whole tiles, at least one. */
static int64_t fold_columns(int64_t rank) {
    int64_t tile = TT_FOLD_VECTORS * TT_WIDTH, tiles = TT_FOLD_BAND / (4 * tile * (rank ? rank : 1));
    return tile * (tiles ? tiles : 1);
}

static void fold_task(void *context, int64_t task) {
    tt_fold_args c = *(const tt_fold_args *)context;
    int64_t row = task * TT_FOLD_TASK, last = row + TT_FOLD_TASK < c.rows ? row + TT_FOLD_TASK : c.rows;
    int64_t columns = fold_columns(c.rank);
    for (int64_t first = 0; first < c.n; first += columns) {
        int64_t end = first + columns < c.n ? first + columns : c.n;
        if (c.dtype == TT_FLOAT32)
            fold_band(c, row, last, first, end, TT_FLOAT32);
        else
            fold_band(c, row, last, first, end, TT_BFLOAT16);
    }
}

/* w [rows, n] in `dtype`, a [rank, n] and b [rows, rank] in float32; 0 where a sum is NaN or infinite. */
TT_API int32_t tt_fold(void *w, const float *a, const float *b, int64_t rows, int64_t n, int64_t rank, float scale,
                       int32_t dtype) {
    int32_t spoilt = 0;
    tt_fold_args c = {(char *)w, a, b, rows, n, rank, scale, dtype, &spoilt};
    tt_parallel((rows + TT_FOLD_TASK - 1) / TT_FOLD_TASK, fold_task, &c);
    return !spoilt;
}

/* Numbers in float32. */
TT_API void tt_wide(float *to, const void *from, int64_t n, int32_t dtype) { load_row(to, from, n, dtype); }

#endif
