/* Softmax cross-entropy of a row of logits, and its gradient in place of them. */
#ifndef TT_CROSS_ENTROPY_H
#define TT_CROSS_ENTROPY_H

#include <math.h>

#include "rows.h"

#define TT_LOGITS 1024 /* logits whose maximum is taken before their exponentials: they stay in the first cache */

typedef struct {
    void *logits;
    const int64_t *targets;
    float *losses;
    int64_t rows, n, stride;
    int32_t dtype, grad;
    float softcap, smoothing;
} tt_cross_entropy_args;

TT_INLINE float block_max(const void *row, int64_t start, int64_t end, int dtype) {
    vf top[2] = {vf_set(-INFINITY), vf_set(-INFINITY)};
    for (int64_t i = start; i < end; i += 2 * TT_WIDTH) {
        top[0] = vf_max(top[0], load_at(row, i, end, dtype, -INFINITY));
        if (i + TT_WIDTH < end) top[1] = vf_max(top[1], load_at(row, i + TT_WIDTH, end, dtype, -INFINITY));
    }
    return vf_largest(vf_max(top[0], top[1]));
}

/* What the first pass learns of a row: the largest logit, the sum of e^(l - base), the sum of all logits. */
typedef struct {
    float max, base;
    double exponentials, all;
} tt_row_sums;

TT_INLINE vf capped_at(const void *z, int64_t i, int64_t end, int dtype, int capping, float cap) {
    vf v = load_at(z, i, end, dtype, 0.0f);
    return capping ? vf_tanh(v * (1.0f / cap)) * cap : v;
}

/* Sums of a block in float32, over blocks in float64: a vocabulary is too long for float32 alone. */
TT_INLINE void add_block(tt_row_sums *s, const void *z, int64_t start, int64_t end, int dtype, int capping,
                         float cap) {
    float top = block_max(z, start, end, dtype);
    if (capping) top = vf_tanh(vf_set(top * (1.0f / cap)))[0] * cap; /* tanh is monotonic */
    if (top > s->max) {
        if (s->max > -INFINITY) s->exponentials *= exp((double)s->max - (double)top); /* else 0 or NaN, and stays so */
        s->max = s->base = top;
    }
    vf sum[2] = {{0}}, all[2] = {{0}};
    for (int64_t i = start; i < end; i += 2 * TT_WIDTH)
        for (int k = 0; k < 2; k++) {
            int64_t j = i + k * TT_WIDTH;
            if (j >= end) break;
            vf l = capped_at(z, j, end, dtype, capping, cap);
            vf e = vf_exp(l - s->base);
            if (end - j < TT_WIDTH) e = vf_select(TT_LANES < (int32_t)(end - j), e, vf_set(0.0f));
            sum[k] += e;
            all[k] += l;
        }
    s->exponentials += vf_sum(sum[0] + sum[1]);
    s->all += vf_sum(all[0] + all[1]);
}

/* l = c tanh(z / c), or z where c = 0; loss = log(sum(e^l)) - (1 - smoothing) l[target] - smoothing mean(l);
 * dz = (e^l / sum(e^l) - smoothing / n - (1 - smoothing) [target]) (1 - (l / c)^2). */
TT_INLINE void cross_entropy_row(tt_cross_entropy_args c, int64_t row, int dtype, int capping) {
    void *z = at_row(c.logits, row, c.stride, dtype);
    tt_row_sums s = {-INFINITY, 0.0f, 0.0, 0.0}; /* base 0: e^(-inf - base) shall be 0, even before a finite logit */
    for (int64_t i = 0; i < c.n; i += TT_LOGITS)
        add_block(&s, z, i, i + TT_LOGITS < c.n ? i + TT_LOGITS : c.n, dtype, capping, c.softcap);
    int64_t target = c.targets[row], start = target / TT_WIDTH * TT_WIDTH;
    float l_target = capped_at(z, start, c.n, dtype, capping, c.softcap)[target - start];
    double uniform = (double)c.smoothing / (double)c.n, share = 1.0 - (double)c.smoothing;
    double loss = log(s.exponentials) + s.base - share * l_target;
    c.losses[row] = (float)(c.smoothing ? loss - uniform * s.all : loss); /* 0 * inf would be NaN */
    if (!c.grad) return;
    float inverse = (float)(1.0 / s.exponentials), less = (float)uniform, one = (float)share;
    for (int64_t i = 0; i < c.n; i += TT_WIDTH) {
        vf l = capped_at(z, i, c.n, dtype, capping, c.softcap);
        vf g = vf_exp(l - s.base) * inverse - less;
        if (i == start) g[target - start] -= one;
        if (capping) {
            vf t = l * (1.0f / c.softcap);
            g *= 1.0f - t * t;
        }
        store_at(z, i, c.n, g, dtype);
    }
}

static void cross_entropy_task(void *context, int64_t task) {
    const tt_cross_entropy_args *c = (const tt_cross_entropy_args *)context;
    TT_EACH_ROW(c, task, row) switch (c->dtype + (c->softcap ? 2 : 0)) {
        case 0: cross_entropy_row(*c, row, TT_FLOAT32, 0); break;
        case 1: cross_entropy_row(*c, row, TT_BFLOAT16, 0); break;
        case 2: cross_entropy_row(*c, row, TT_FLOAT32, 1); break;
        default: cross_entropy_row(*c, row, TT_BFLOAT16, 1);
    }
}

/* Returns the first row whose target is not in [0, n), before anything is written; -1 when there is none. */
TT_API int64_t tt_cross_entropy(void *logits, int64_t stride, const int64_t *targets, float *losses, int64_t rows,
                                int64_t n, int32_t dtype, float softcap, float smoothing, int32_t grad) {
    tt_cross_entropy_args c = {logits, targets, losses, rows, n, stride, dtype, grad, softcap, smoothing};
    for (int64_t row = 0; row < rows; row++)
        if (targets[row] < 0 || targets[row] >= n) return row;
    tt_parallel(tasks_of(rows, n), cross_entropy_task, &c);
    return -1;
}

#endif
