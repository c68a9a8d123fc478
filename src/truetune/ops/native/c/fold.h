/* W + s B A in place: the products are summed up in float32, added to W, and rounded once; and whether all of it is
 * finite.
 *
 * A is laid out in blocks of columns, so that what is read in turn lies in turn: rows of A that are a power of two apart
 * would all compete for the same few lines of the cache. A band of such blocks stays in the cache while all rows pass by;
 * within it a tile of rows and vectors stays in registers. An element's sum runs over the rank in order, so neither tiles
 * nor threads change a bit of it.
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
#define TT_FOLD_COLUMNS 64 /* of a block of A: a whole number of tiles */
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

/* Twice the bits of the first number that is no longer finite once it is rounded: the sign falls out. */
#define TT_FOLD_LARGE(dtype) ((dtype) == TT_FLOAT32 ? 0xff000000u : 0xfeff0000u)
#define TT_FOLD_NORMAL 0x01000000u /* likewise of the smallest normal number */

/* Every number, those included that the instruction for 16 bits would take for 0. */
TT_INLINE void fold_store(void *row, int64_t i, int64_t n, vf v, int dtype) {
    if (dtype == TT_FLOAT32) {
        store_at(row, i, n, v, TT_FLOAT32);
        return;
    }
    vu rounded = (vu)v + 0x7fffu + (((vu)v >> 16) & 1u);
    vh h = vu_narrowed((vu)vf_select(v != v, vf_set(NAN), (vf)rounded) >> 16);
    int64_t count = n - i < TT_WIDTH ? n - i : TT_WIDTH;
    memcpy((uint16_t *)row + i, &h, (size_t)count * sizeof h[0]);
}

/* Rows `row` and on, `high` of them, by `wide` vectors of columns from `i` on; only a single vector may be cut by n. */
TT_INLINE void fold_tile(tt_fold_args c, int64_t row, int64_t i, int high, int wide, int dtype) {
    const float *block = c.a + i / TT_FOLD_COLUMNS * TT_FOLD_COLUMNS * c.rank + i % TT_FOLD_COLUMNS;
    vf sums[TT_FOLD_ROWS][TT_FOLD_VECTORS] = {{{0}}};
    for (int64_t k = 0; k < c.rank; k++) {
        vf a[TT_FOLD_VECTORS];
        TT_WHOLE
        for (int v = 0; v < wide; v++) a[v] = vf_load(block + k * TT_FOLD_COLUMNS + v * TT_WIDTH);
        TT_WHOLE
        for (int r = 0; r < high; r++) {
            vf b = vf_set(c.b[(row + r) * c.rank + k]);
            TT_WHOLE
            for (int v = 0; v < wide; v++) sums[r][v] += b * a[v];
        }
    }
    vu size = {0}, odd = {0}; /* odd: how far beyond the normal numbers; what lies below them wraps around */
    TT_WHOLE
    for (int r = 0; r < high; r++) {
        TT_WHOLE
        for (int v = 0; v < wide; v++) {
            int64_t at = i + v * TT_WIDTH, end = wide > 1 ? at + TT_WIDTH : c.n;
            vf w = load_at(at_row(c.w, row + r, c.n, dtype), at, end, dtype, 0.0f);
            sums[r][v] = w + vf_set(c.scale) * sums[r][v];
            odd = vu_max(odd, (vu)sums[r][v] + (vu)sums[r][v] - TT_FOLD_NORMAL);
        }
    }
    int plain = !vu_reaches(odd, TT_FOLD_LARGE(dtype) - TT_FOLD_NORMAL);
    if (!plain) {
        TT_WHOLE
        for (int r = 0; r < high; r++)
            for (int v = 0; v < wide; v++) size = vu_max(size, (vu)sums[r][v] + (vu)sums[r][v]);
        if (vu_reaches(size, TT_FOLD_LARGE(dtype))) __atomic_store_n(c.spoilt, 1, __ATOMIC_RELAXED);
    }
    TT_WHOLE
    for (int r = 0; r < high; r++) {
        void *w = at_row(c.w, row + r, c.n, dtype);
        TT_WHOLE
        for (int v = 0; v < wide; v++) {
            int64_t at = i + v * TT_WIDTH, end = wide > 1 ? at + TT_WIDTH : c.n;
            if (plain)
                store_at(w, at, end, sums[r][v], dtype);
            else
                fold_store(w, at, end, sums[r][v], dtype);
        }
    }
}

TT_INLINE void fold_rows(tt_fold_args c, int64_t row, int64_t first, int64_t end, int high, int dtype) {
    int64_t i = first;
    for (; i + TT_FOLD_VECTORS * TT_WIDTH <= end; i += TT_FOLD_VECTORS * TT_WIDTH)
        fold_tile(c, row, i, high, TT_FOLD_VECTORS, dtype);
    for (; i < end; i += TT_WIDTH) fold_tile(c, row, i, high, 1, dtype);
}

TT_INLINE void fold_band(tt_fold_args c, int64_t row, int64_t last, int64_t first, int64_t end, int dtype) {
    for (; row + TT_FOLD_ROWS <= last; row += TT_FOLD_ROWS) fold_rows(c, row, first, end, TT_FOLD_ROWS, dtype);
    for (; row + 4 <= last; row += 4) fold_rows(c, row, first, end, 4, dtype);
    for (; row < last; row++) fold_rows(c, row, first, end, 1, dtype);
}

static void fold_task(void *context, int64_t task) {
    tt_fold_args c = *(const tt_fold_args *)context;
    int64_t row = task * TT_FOLD_TASK, last = row + TT_FOLD_TASK < c.rows ? row + TT_FOLD_TASK : c.rows;
    int64_t blocks = TT_FOLD_BAND / (4 * TT_FOLD_COLUMNS * (c.rank ? c.rank : 1));
    int64_t columns = TT_FOLD_COLUMNS * (blocks ? blocks : 1);
    for (int64_t first = 0; first < c.n; first += columns) {
        int64_t end = first + columns < c.n ? first + columns : c.n;
        if (c.dtype == TT_FLOAT32)
            fold_band(c, row, last, first, end, TT_FLOAT32);
        else
            fold_band(c, row, last, first, end, TT_BFLOAT16);
    }
}

/* A [rank, n] in `dtype` as `tt_fold` wants it: [blocks, rank, TT_FOLD_COLUMNS] in float32, with zeros beyond n. */
TT_API void tt_fold_blocks(float *to, const void *a, int64_t rank, int64_t n, int32_t dtype) {
    for (int64_t i = 0; i < n; i += TT_FOLD_COLUMNS) {
        int64_t count = n - i < TT_FOLD_COLUMNS ? n - i : TT_FOLD_COLUMNS;
        for (int64_t k = 0; k < rank; k++, to += TT_FOLD_COLUMNS) {
            load_row(to, (const char *)a + (k * n + i) * element_size(dtype), count, dtype);
            memset(to + count, 0, (size_t)(TT_FOLD_COLUMNS - count) * sizeof(float));
        }
    }
}

/* w [rows, n] in `dtype`, a as `tt_fold_blocks` makes it, b [rows, rank] in float32; 0 where a sum is NaN or infinite. */
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
