/* A factor for every column: p = f u and y = p + c + r; backwards f g, and the factors' own gradient, sum of g p. */
#ifndef TT_RESCALE_H
#define TT_RESCALE_H

#include "rows.h"

typedef struct {
    const void *u, *residual;
    void *product, *y; /* either may be 0: not wanted */
    const float *factor, *constant;
    int64_t rows, n;
    int32_t dtype;
} tt_rescale_args;

TT_INLINE void rescale_row(tt_rescale_args c, int64_t row, int dtype) {
    const void *u = at_row(c.u, row, c.n, dtype), *residual = c.residual ? at_row(c.residual, row, c.n, dtype) : 0;
    void *product = c.product ? at_row(c.product, row, c.n, dtype) : 0, *y = c.y ? at_row(c.y, row, c.n, dtype) : 0;
    for (int64_t i = 0; i < c.n; i += TT_WIDTH) {
        vf v = load_at(u, i, c.n, dtype, 0.0f) * load_at(c.factor, i, c.n, TT_FLOAT32, 0.0f);
        if (product) store_at(product, i, c.n, v, dtype);
        if (!y) continue;
        if (c.constant) v += load_at(c.constant, i, c.n, TT_FLOAT32, 0.0f);
        if (residual) v += load_at(residual, i, c.n, dtype, 0.0f);
        store_at(y, i, c.n, v, dtype);
    }
}

static void rescale_task(void *context, int64_t task) {
    const tt_rescale_args *c = (const tt_rescale_args *)context;
    TT_EACH_ROW(c, task, row) if (c->dtype == TT_FLOAT32) rescale_row(*c, row, TT_FLOAT32);
    else rescale_row(*c, row, TT_BFLOAT16);
}

TT_API void tt_rescale(const void *u, const float *factor, const float *constant, const void *residual, void *product,
                       void *y, int64_t rows, int64_t n, int32_t dtype) {
    tt_rescale_args c = {u, residual, product, y, factor, constant, rows, n, dtype};
    tt_parallel(tasks_of(rows, n), rescale_task, &c);
}

/* Backwards some rows are the unit of work, and each has sums of its own: what they are does not depend on the number of
 * threads, nor does the error of a sum grow with all rows. */
#define TT_BURST 32

typedef struct {
    const void *grad, *product;
    void *inner;
    const float *factor;
    float *sums; /* [bursts, n] */
    int64_t rows, n;
    int32_t dtype;
} tt_rescale_backward_args;

TT_INLINE void rescale_burst(tt_rescale_backward_args c, int64_t burst, int dtype) {
    float *sums = c.sums + burst * c.n;
    int64_t first = burst * TT_BURST, end = first + TT_BURST < c.rows ? first + TT_BURST : c.rows;
    memset(sums, 0, (size_t)c.n * sizeof *sums);
    for (int64_t row = first; row < end; row++) {
        const void *grad = at_row(c.grad, row, c.n, dtype), *product = at_row(c.product, row, c.n, dtype);
        void *inner = at_row(c.inner, row, c.n, dtype);
        for (int64_t i = 0; i < c.n; i += TT_WIDTH) {
            vf g = load_at(grad, i, c.n, dtype, 0.0f);
            vf sum = load_at(sums, i, c.n, TT_FLOAT32, 0.0f) + g * load_at(product, i, c.n, dtype, 0.0f);
            store_at(sums, i, c.n, sum, TT_FLOAT32);
            store_at(inner, i, c.n, g * load_at(c.factor, i, c.n, TT_FLOAT32, 0.0f), dtype);
        }
    }
}

static void rescale_burst_task(void *context, int64_t task) {
    const tt_rescale_backward_args *c = (const tt_rescale_backward_args *)context;
    if (c->dtype == TT_FLOAT32)
        rescale_burst(*c, task, TT_FLOAT32);
    else
        rescale_burst(*c, task, TT_BFLOAT16);
}

/* How many rows of sums there are. */
TT_API int64_t tt_rescale_bursts(int64_t rows) { return (rows + TT_BURST - 1) / TT_BURST; }

/* The first row of sums becomes their total, over the factors where the product has them in it: 0 where a factor is 0. */
static void rescale_total(float *sums, const float *factor, int64_t bursts, int64_t n, int32_t divides) {
    for (int64_t burst = 1; burst < bursts; burst++)
        for (int64_t i = 0; i < n; i++) sums[i] += sums[burst * n + i];
    if (divides)
        for (int64_t i = 0; i < n; i++) sums[i] = factor[i] == 0.0f ? 0.0f : sums[i] / factor[i];
}

TT_API void tt_rescale_backward(const void *grad, const void *product, const float *factor, void *inner, float *sums,
                                int64_t rows, int64_t n, int32_t dtype, int32_t divides) {
    tt_rescale_backward_args c = {grad, product, inner, factor, sums, rows, n, dtype};
    int64_t bursts = tt_rescale_bursts(rows);
    tt_parallel(bursts, rescale_burst_task, &c);
    if (bursts) rescale_total(sums, factor, bursts, n, divides);
}

#endif
