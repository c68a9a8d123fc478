/* Causal attention within the segments of packed rows: forward and backward.
 *
 * A task is some queries of one segment, for one key and value head or one query head. The split depends on the lengths
 * alone, and every sum has a fixed order: neither the number of threads nor a segment's neighbours change a bit of it.
 */
#ifndef TT_ATTENTION_H
#define TT_ATTENTION_H

#include "attention_amx_backward.h"
#include "attention_backward.h"
#include "parallel.h"

#define TT_SPLIT 256 /* longer segments are more than one task; a multiple of TT_TILE */

/* Queries [from, to) of the segment that starts at token `start`. */
typedef struct {
    int64_t start, from, to;
} attention_unit;

typedef struct attention_work {
    const tt_attention *a;
    int (*run)(const struct attention_work *work, attention_unit unit, int64_t head); /* 0: no memory */
    int64_t heads;         /* tasks of a unit */
    attention_unit *units;
    int64_t count;
    float *parts;          /* [heads][tokens][2][dim], for segments whose heads are separate tasks */
    int failed;
} attention_work;

static int64_t cost_of(const attention_unit *u) { return (u->to - u->from) * (u->to + u->from); }

/* Longest first, so that no thread is left with a long one at the end. */
static int by_cost(const void *x, const void *y) {
    const attention_unit *a = (const attention_unit *)x, *b = (const attention_unit *)y;
    int64_t difference = cost_of(b) - cost_of(a);
    if (!difference) difference = a->start - b->start;
    return (difference > 0) - (difference < 0);
}

/* The segments in pieces of at most `split` queries. Returns 0 when there is no memory. */
static int attention_units(attention_work *work, int64_t split) {
    const tt_attention *a = work->a;
    work->units = (attention_unit *)malloc((size_t)(tokens_of(a) / split + a->segments + 1) * sizeof(attention_unit));
    if (!work->units) return 0;
    for (int64_t s = 0; s < a->segments; s++)
        for (int64_t from = 0, length = a->edges[s + 1] - a->edges[s]; from < length; from += split)
            work->units[work->count++] = (attention_unit){a->edges[s], from, smaller(from + split, length)};
    qsort(work->units, (size_t)work->count, sizeof(attention_unit), by_cost);
    return 1;
}

/* Arithmetic on numbers below 1e-38 takes a hundred times as long, and a weight that small is as good as none. */
static unsigned flush_denormals(void) {
#if defined(__SSE__)
    unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8040u);
    return before;
#else
    return 0;
#endif
}

static void restore_denormals(unsigned before) {
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr(before);
#else
    (void)before;
#endif
}

static void attention_body(void *context, int64_t task) {
    attention_work *work = (attention_work *)context;
    unsigned before = flush_denormals();
    if (!work->run(work, work->units[task / work->heads], task % work->heads))
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
    restore_denormals(before);
}

static void run_all(attention_work *work) { tt_parallel(work->count * work->heads, attention_body, work); }

static int run_forward(const attention_work *work, attention_unit u, int64_t kv_head) {
#if defined(TT_AMX)
    if (amx_takes(work->a)) return amx_forward_task(work->a, u.start, u.from, u.to, kv_head);
#endif
    return forward_task(work->a, u.start, u.from, u.to, kv_head);
}

/* Fills out and lse. Returns 0, or 1 when there is no memory. */
TT_API int32_t tt_attention_forward(const tt_attention *a) {
    attention_work work = {a, run_forward, a->kv_heads, 0, 0, 0, 0};
    if (!attention_units(&work, TT_SPLIT)) return 1;
    run_all(&work);
    free(work.units);
    return work.failed;
}

static int is_split(const attention_work *work, attention_unit u) {
    return u.to > TT_SPLIT && group_of(work->a) > 1;
}

static float *part_of(const attention_work *work, attention_unit u, int64_t head) {
    return work->parts + (head * tokens_of(work->a) + u.start) * 2 * padded_dim(work->a);
}

/* A head of its own where the segment is split, else its whole group at the group's first head. */
static int run_backward(const attention_work *work, attention_unit u, int64_t head) {
    const tt_attention *a = work->a;
    int split = is_split(work, u);
    int64_t head_end = head + (split ? 1 : group_of(a));
    float *parts = split ? part_of(work, u, head) : 0;
    if (!split && head % group_of(a)) return 1;
#if defined(TT_AMX)
    if (amx_takes(a)) return amx_backward_task(a, u.start, u.to, head, head_end, parts);
#endif
    return backward_task(a, u.start, u.to, head, head_end, parts);
}

/* Adds up what the heads of a group found for their common keys and values. */
static int run_sum(const attention_work *work, attention_unit u, int64_t kv_head) {
    const tt_attention *a = work->a;
    if (!is_split(work, u)) return 1;
    int64_t dim = padded_dim(a), first = kv_head * group_of(a);
    float *sum = part_of(work, u, first);
    for (int64_t g = 1; g < group_of(a); g++) {
        const float *part = part_of(work, u, first + g);
        for (int64_t i = 0; i < u.to * 2 * dim; i += TT_WIDTH) vf_store(sum + i, vf_load(sum + i) + vf_load(part + i));
    }
    arena scratch;
    if (!arena_open(&scratch, stretch_bytes(a, u.to), 2)) return 0;
    stretch s = stretch_from(a, &scratch, u.start, u.to);
    store_key_gradients(&s, sum, sum + dim, u.to, 2 * dim, kv_head, 1.0f, 0);
    free(scratch.memory);
    return 1;
}

/* Fills dq, dk and dv. Returns 0, or 1 when there is no memory. */
TT_API int32_t tt_attention_backward(const tt_attention *a) {
    attention_work work = {a, run_backward, a->heads, 0, 0, 0, 0};
    if (!attention_units(&work, INT32_MAX)) return 1;
    int split = work.count > 0 && is_split(&work, work.units[0]);
    if (split) {
        work.parts = (float *)malloc((size_t)(a->heads * tokens_of(a) * 2 * padded_dim(a)) * sizeof(float));
        work.failed = !work.parts;
    }
    if (!work.failed) run_all(&work);
    work.run = run_sum;
    work.heads = a->kv_heads;
    if (split && !work.failed) run_all(&work);
    free(work.parts);
    free(work.units);
    return work.failed;
}

#endif
