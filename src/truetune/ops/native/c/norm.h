/* RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467): y = x r (offset + w), with r = 1 / sqrt(mean(x^2) + eps). */
#ifndef TT_NORM_H
#define TT_NORM_H

#include <math.h>

#include "rows.h"

typedef struct {
    const void *x, *weight, *grad;
    void *out;
    float *rstd;
    int64_t rows, n;
    int32_t dtype, weight_dtype;
    float eps, offset;
} tt_norm_args;

TT_INLINE vf norm_weight(tt_norm_args c, int64_t i, int weight_dtype) {
    return c.weight ? load_at(c.weight, i, c.n, weight_dtype, 0.0f) + c.offset : vf_set(1.0f);
}

/* The sum of squares in four strands: one would wait for its own last addition. */
TT_INLINE float row_squares(const void *x, int64_t n, int dtype) {
    vf sum[4] = {{0}};
    for (int64_t i = 0; i < n; i += 4 * TT_WIDTH)
        for (int k = 0; k < 4; k++) {
            if (i + k * TT_WIDTH >= n) break;
            vf v = load_at(x, i + k * TT_WIDTH, n, dtype, 0.0f);
            sum[k] += v * v;
        }
    return vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

TT_INLINE void norm_row(tt_norm_args c, int64_t row, int dtype, int weight_dtype) {
    const void *x = at_row(c.x, row, c.n, dtype);
    void *y = at_row(c.out, row, c.n, dtype);
    float r = 1.0f / sqrtf(row_squares(x, c.n, dtype) / (float)c.n + c.eps);
    for (int64_t i = 0; i < c.n; i += TT_WIDTH)
        store_at(y, i, c.n, load_at(x, i, c.n, dtype, 0.0f) * r * norm_weight(c, i, weight_dtype), dtype);
    c.rstd[row] = r;
}

/* With u = g (offset + w) and z = x r: dx = r (u - z mean(u z)). */
TT_INLINE void norm_backward_row(tt_norm_args c, int64_t row, int dtype, int weight_dtype) {
    const void *x = at_row(c.x, row, c.n, dtype), *g = at_row(c.grad, row, c.n, dtype);
    void *dx = at_row(c.out, row, c.n, dtype);
    float r = c.rstd[row];
    vf sum[2] = {{0}};
    for (int64_t i = 0; i < c.n; i += 2 * TT_WIDTH)
        for (int k = 0; k < 2; k++) {
            int64_t j = i + k * TT_WIDTH;
            if (j >= c.n) break;
            vf u = load_at(g, j, c.n, dtype, 0.0f) * norm_weight(c, j, weight_dtype);
            sum[k] += u * (load_at(x, j, c.n, dtype, 0.0f) * r);
        }
    float mean = vf_sum(sum[0] + sum[1]) / (float)c.n;
    for (int64_t i = 0; i < c.n; i += TT_WIDTH) {
        vf u = load_at(g, i, c.n, dtype, 0.0f) * norm_weight(c, i, weight_dtype);
        vf z = load_at(x, i, c.n, dtype, 0.0f) * r;
        store_at(dx, i, c.n, (u - z * mean) * r, dtype);
    }
}

#define TT_NORM_TASK(name, body)                                            \
    static void name(void *context, int64_t task) {                         \
        const tt_norm_args *c = (const tt_norm_args *)context;              \
        TT_EACH_ROW(c, task, row) switch (c->dtype * 2 + c->weight_dtype) { \
            case 0: body(*c, row, TT_FLOAT32, TT_FLOAT32); break;            \
            case 1: body(*c, row, TT_FLOAT32, TT_BFLOAT16); break;           \
            case 2: body(*c, row, TT_BFLOAT16, TT_FLOAT32); break;           \
            default: body(*c, row, TT_BFLOAT16, TT_BFLOAT16);                \
        }                                                                   \
    }
TT_NORM_TASK(norm_task, norm_row)
TT_NORM_TASK(norm_backward_task, norm_backward_row)

TT_API void tt_norm_forward(const void *x, const void *weight, void *y, float *rstd, int64_t rows, int64_t n,
                            int32_t dtype, int32_t weight_dtype, float eps, float offset) {
    tt_norm_args c = {x, weight, 0, y, rstd, rows, n, dtype, weight_dtype, eps, offset};
    tt_parallel(tasks_of(rows, n), norm_task, &c);
}

TT_API void tt_norm_backward(const void *grad, const void *x, const void *weight, float *rstd, void *dx, int64_t rows,
                             int64_t n, int32_t dtype, int32_t weight_dtype, float offset) {
    tt_norm_args c = {x, weight, grad, dx, rstd, rows, n, dtype, weight_dtype, 0.0f, offset};
    tt_parallel(tasks_of(rows, n), norm_backward_task, &c);
}

#endif
