/* A step of an optimizer on one tensor: moments are read, advanced in float32, applied and written back.
 *
 * Block by block, so that what is decoded stays in the cache. A block is the unit of work and its arithmetic is that of
 * plain torch, operation by operation: neither the number of threads nor the tier changes a bit of parameters and state.
 */
#ifndef TT_OPTIM8BIT_H
#define TT_OPTIM8BIT_H

#include "optim8bit_state.h"

enum { TT_ADAM = 0, TT_ADEMAMIX = 1, TT_MOMENTUM = 2, TT_LION = 3, TT_RMS = 4 };

#define TT_OPTIM_BLOCK 4096 /* values of the largest block */
#define TT_OPTIM_TASKS 256  /* most tasks of a tensor */

/* The scalars of a step, as update_rule.py has them. */
typedef struct {
    float size, keep1, add1, keep2, add2, keep3, add3, mix, eps, decay, l2, scale;
} tt_rule;

typedef struct {
    void *p;
    const void *g;
    tt_moment moments[3];
    tt_rule rule;
    int64_t n, blocksize, tasks;
    int32_t p_dtype, g_dtype, kind;
    double (*sums)[2]; /* per task: of the squares of update and parameter, and nothing is written; 0: a step is made */
} tt_optim_args;

/* A product that shall be rounded before it enters a sum: hidden from the compiler, which would contract the two. */
TT_INLINE vf rounded(vf product) {
#if defined(__x86_64__) || defined(__i386__)
    __asm__("" : "+v"(product));
#elif defined(__aarch64__)
    __asm__("" : "+w"(product));
#else
    __asm__("" : "+m"(product));
#endif
    return product;
}

TT_INLINE vf vf_root(vf v) {
#if TT_WIDTH == 16
    return (vf)_mm512_sqrt_ps((__m512)v);
#elif TT_WIDTH == 8
    return (vf)_mm256_sqrt_ps((__m256)v);
#else
    for (int i = 0; i < TT_WIDTH; i++) v[i] = sqrtf(v[i]);
    return v;
#endif
}

/* keep m + add g */
TT_INLINE vf mean_of(vf m, float keep, vf g, float add) { return rounded(m * keep) + rounded(g * add); }

/* Advances the moments of some values by their gradient; returns the direction that the parameter goes. */
TT_INLINE vf direction(tt_rule r, int kind, vf g, vf *m) {
    if (kind == TT_LION) {
        vf c = mean_of(m[0], r.keep1, g, r.add1);
        m[0] = mean_of(m[0], r.keep2, g, r.add2);
        return vf_select(c > 0.0f, vf_set(1.0f), vf_select(c < 0.0f, vf_set(-1.0f), vf_set(0.0f)));
    }
    if (kind == TT_MOMENTUM) return m[0] = rounded(m[0] * r.keep1) + g;
    vf *squares = m + (kind == TT_ADAM ? 1 : kind == TT_ADEMAMIX ? 2 : 0);
    *squares = rounded(*squares * r.keep2) + rounded(g * r.add2 * g);
    vf root = vf_root(*squares) + r.eps;
    if (kind == TT_RMS) return g / root;
    m[0] = mean_of(m[0], r.keep1, g, r.add1);
    if (kind == TT_ADAM) return m[0] / root;
    m[1] = mean_of(m[1], r.keep3, g, r.add3);
    return (rounded(m[1] * r.mix) + m[0]) / root;
}

/* n values, a whole number of vectors. An element whose moments are no longer finite starts anew: they become 0, and the
 * parameter stays; it also stays where the direction is NaN. Adds the squares of both to `sums`. */
TT_INLINE void advance(tt_rule r, int kind, int used, float *p, const float *grad, float *moments, int64_t stride,
                       int64_t n, double *sums) {
    vf of_update = {0}, of_parameter = {0};
    for (int64_t i = 0; i < n; i += TT_WIDTH) {
        vf before = vf_load(p + i), g = vf_load(grad + i), m[3];
        for (int j = 0; j < used; j++) m[j] = vf_load(moments + j * stride + i);
        if (r.scale != 1.0f) g = rounded(g * r.scale);
        if (r.l2 != 0.0f) g = g + rounded(before * r.l2);
        vf u = direction(r, kind, g, m), sum = m[0];
        for (int j = 1; j < used; j++) sum += m[j];
        vi finite = (sum - sum) == 0.0f, moves = finite & (u == u);
        for (int j = 0; j < used; j++) vf_store(moments + j * stride + i, (vf)((vi)m[j] & finite));
        vf_store(p + i, vf_select(moves, rounded(before * r.decay) - rounded(u * r.size), before));
        u = (vf)((vi)u & moves);
        of_update += u * u;
        of_parameter += before * before;
    }
    sums[0] += vf_sum(of_update);
    sums[1] += vf_sum(of_parameter);
}

TT_INLINE void optim_block(const tt_optim_args *c, int kind, int used, float *scratch, int64_t from, int64_t n,
                           double *sums) {
    int64_t stride = c->blocksize + 2 * TT_WIDTH, whole = (n + TT_WIDTH - 1) / TT_WIDTH * TT_WIDTH;
    float *p = scratch, *g = scratch + stride, *moments = g + stride;
    void *at = (char *)c->p + from * element_size(c->p_dtype);
    memset(p + whole - TT_WIDTH, 0, TT_WIDTH * sizeof(float)); /* what lies beyond a short block */
    memset(g + whole - TT_WIDTH, 0, TT_WIDTH * sizeof(float));
    load_row(p, at, n, c->p_dtype);
    load_row(g, (const char *)c->g + from * element_size(c->g_dtype), n, c->g_dtype);
    for (int j = 0; j < used; j++) moment_load(moments + j * stride, c->moments[j], from, n, c->blocksize);
    advance(c->rule, kind, used, p, g, moments, stride, whole, sums);
    if (c->sums) return;
    store_row(at, p, n, c->p_dtype);
    for (int j = 0; j < used; j++) moment_store(c->moments[j], moments + j * stride, from, n, c->blocksize);
}

static void optim_task(void *context, int64_t task) {
    const tt_optim_args *c = (const tt_optim_args *)context;
    float scratch[5 * (TT_OPTIM_BLOCK + 2 * TT_WIDTH)];
    double sums[2] = {0.0, 0.0};
    int64_t blocks = blocks_of(c->n, c->blocksize), last = (task + 1) * blocks / c->tasks;
    for (int64_t block = task * blocks / c->tasks; block < last; block++) {
        int64_t from = block * c->blocksize, n = at_most(c->blocksize, c->n - from);
        switch (c->kind) {
            case TT_ADAM: optim_block(c, TT_ADAM, 2, scratch, from, n, sums); break;
            case TT_ADEMAMIX: optim_block(c, TT_ADEMAMIX, 3, scratch, from, n, sums); break;
            case TT_MOMENTUM: optim_block(c, TT_MOMENTUM, 1, scratch, from, n, sums); break;
            case TT_LION: optim_block(c, TT_LION, 1, scratch, from, n, sums); break;
            default: optim_block(c, TT_RMS, 1, scratch, from, n, sums);
        }
    }
    if (c->sums) memcpy(c->sums[task], sums, sizeof sums);
}

/* Makes a step; or, where `sums` is given, none, and writes there the sums of squares of update and parameter.
 *
 * moments[j] is float32 where scales[j] is 0. maps: signed, unsigned; the latter serves the last of several moments. */
TT_API void tt_optim_step(void *p, const void *g, void *const *moments, float *const *scales, const tt_map *maps,
                          const tt_rule *rule, double *sums, int64_t n, int64_t blocksize, int32_t p_dtype,
                          int32_t g_dtype, int32_t kind) {
    double partial[TT_OPTIM_TASKS][2];
    int64_t blocks = blocks_of(n, blocksize), tasks = at_most(at_most(n / TT_TASK + 1, blocks), TT_OPTIM_TASKS);
    int used = kind == TT_ADEMAMIX ? 3 : kind == TT_ADAM ? 2 : 1;
    tt_optim_args c = {.p = p, .g = g, .rule = *rule, .n = n, .blocksize = blocksize, .tasks = tasks,
                       .p_dtype = p_dtype, .g_dtype = g_dtype, .kind = kind, .sums = sums ? partial : 0};
    for (int j = 0; j < used; j++)
        c.moments[j] = (tt_moment){moments[j], scales[j], maps + (j > 0 && j == used - 1)};
    tt_parallel(tasks, optim_task, &c);
    if (!sums) return;
    sums[0] = sums[1] = 0.0;
    for (int64_t task = 0; task < tasks; task++) {
        sums[0] += partial[task][0];
        sums[1] += partial[task][1];
    }
}

#endif
