/* From codes, and from sums of their products, back to values: each in one pass, rounded once. */
#ifndef TT_INT8_RESCALE_H
#define TT_INT8_RESCALE_H

#include "rows.h"

typedef struct {
    const int8_t *codes;
    const float *scale;
    void *out;
    int64_t rows, n;
    int32_t dtype;
} tt_int8_dequantize_args;

/* `count` codes, at most TT_WIDTH, as float32. */
static inline vf int8_floats_at(const int8_t *codes, int64_t count) {
    int8_t some[TT_WIDTH] = {0};
#if TT_WIDTH == 16
    if (count >= TT_WIDTH) return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
#endif
    memcpy(some, codes, (size_t)(count < TT_WIDTH ? count : TT_WIDTH));
    vf values;
    for (int i = 0; i < TT_WIDTH; i++) values[i] = (float)some[i];
    return values;
}

/* code * scale is exact where the scale is a float16's value, as the format has it: the division rounds once. */
TT_INLINE void int8_dequantize_row(tt_int8_dequantize_args c, int64_t row, int dtype) {
    void *out = at_row(c.out, row, c.n, dtype);
    for (int64_t i = 0; i < c.n; i += TT_WIDTH)
        store_at(out, i, c.n, int8_floats_at(c.codes + row * c.n + i, c.n - i) * c.scale[row] / 127.0f, dtype);
}

static void int8_dequantize_task(void *context, int64_t task) {
    const tt_int8_dequantize_args *c = (const tt_int8_dequantize_args *)context;
    TT_EACH_ROW(c, task, row) {
        if (c->dtype == TT_FLOAT32)
            int8_dequantize_row(*c, row, TT_FLOAT32);
        else
            int8_dequantize_row(*c, row, TT_BFLOAT16);
    }
}

TT_API void tt_int8_dequantize(const int8_t *codes, const float *scale, void *out, int64_t rows, int64_t n,
                               int32_t dtype) {
    tt_int8_dequantize_args c = {codes, scale, out, rows, n, dtype};
    tt_parallel(tasks_of(rows, n), int8_dequantize_task, &c);
}

typedef struct {
    const void *sums;           /* [rows][n] */
    const float *left, *right;  /* factors of each row and of each column */
    const float *apart, *bias;  /* [rows][n], added before the columns' factors; [n], added after; or null */
    void *out;
    int64_t rows, n, stride;    /* out's rows are `stride` elements apart */
    int32_t whole, dtype;       /* whole: sums are int32, else float32 */
} tt_int8_rescale_args;

TT_INLINE void int8_rescale_row(tt_int8_rescale_args c, int64_t row, int dtype) {
    void *out = at_row(c.out, row, c.stride, dtype);
    const void *sums = (const char *)c.sums + row * c.n * 4;
    for (int64_t i = 0; i < c.n; i += TT_WIDTH) {
        vf y = load_at(sums, i, c.n, TT_FLOAT32, 0.0f);
        if (c.whole) y = __builtin_convertvector((vi)y, vf);
        y *= c.left[row];
        if (c.apart) y += load_at(c.apart + row * c.n, i, c.n, TT_FLOAT32, 0.0f);
        y *= load_at(c.right, i, c.n, TT_FLOAT32, 0.0f);
        if (c.bias) y += load_at(c.bias, i, c.n, TT_FLOAT32, 0.0f);
        store_at(out, i, c.n, y, dtype);
    }
}

static void int8_rescale_task(void *context, int64_t task) {
    const tt_int8_rescale_args *c = (const tt_int8_rescale_args *)context;
    TT_EACH_ROW(c, task, row) {
        if (c->dtype == TT_FLOAT32)
            int8_rescale_row(*c, row, TT_FLOAT32);
        else
            int8_rescale_row(*c, row, TT_BFLOAT16);
    }
}

TT_API void tt_int8_rescale(const void *sums, const float *left, const float *right, const float *apart,
                            const float *bias, void *out, int64_t rows, int64_t n, int64_t stride, int32_t whole,
                            int32_t dtype) {
    tt_int8_rescale_args c = {sums, left, right, apart, bias, out, rows, n, stride, whole, dtype};
    tt_parallel(tasks_of(rows, n), int8_rescale_task, &c);
}

#endif
