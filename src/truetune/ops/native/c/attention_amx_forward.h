/* The forward pass of attention in bfloat16 on the tile unit (see amx.h), in the tasks of attention_forward.h.
 *
 * Scores are kept with keys as rows and queries as lanes: maxima and sums over keys are then those of whole vectors.
 * Weights are rounded to bfloat16 before they are multiplied, as GPU kernels do; sums are float32. Exponents are of
 * base 2.
 */
#ifndef TT_ATTENTION_AMX_FORWARD_H
#define TT_ATTENTION_AMX_FORWARD_H

#include "amx.h"

#if defined(TT_AMX)

#define AMX_KEYS 128 /* of a tile */
#define LOG2E 1.44269504088896341f

static int amx_takes(const tt_attention *a) { return a->dtype == TT_BFLOAT16 && amx_is_allowed(); }

static inline int64_t amx_dim(const tt_attention *a) { return round_up(a->dim, AMX_BLOCK); }

/* The keys [from, to) that a block of queries [i, i + AMX_BLOCK) meets in the tile [key, key + AMX_KEYS). */
static inline span amx_keys(int64_t i, int64_t key, int64_t window) {
    int64_t from = larger(key, round_down(larger(0, i - window + 1), AMX_BLOCK));
    return (span){from, smaller(key + AMX_KEYS, i + AMX_BLOCK)};
}

/* Of those, the pairs of rows in which one of the queries [i, i + 16) sees a key. */
static inline span amx_seen(span keys, int64_t i, int64_t window) {
    return (span){round_down(larger(keys.from, i - window + 1), 2), smaller(keys.to, round_up(i + 16, 2))};
}

/* Which of the queries [i, i + 16) see key j. */
static inline __mmask16 amx_sees(int64_t i, int64_t j, int64_t window) {
    if (j <= i && j > i + 15 - window) return 0xffff;
    vi ago = (int32_t)(i - j) + TT_LANES;
    return _mm512_movepi32_mask((__m512i)((ago >= 0) & (ago < (int32_t)window)));
}

static inline __m512 amx_tanh(__m512 x) { return (__m512)vf_tanh((vf)x); }

/* Two rows of 16 as bfloat16, one after the other. */
static inline __m512i amx_narrow(__m512 first, __m512 second) {
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

/* The same, element by element in turn: a row of a right factor. */
static inline __m512i amx_interleaved(__m512i halves) {
    const __m512i step = _mm512_set1_epi32(0x00100000); /* lane l: halves l and 16 + l */
    return _mm512_permutexvar_epi16(_mm512_add_epi32((__m512i)(TT_LANES * 0x00010001), step), halves);
}

typedef struct {
    uint16_t *k, *v_columns; /* [keys][dim], [dim][columns_row] */
    int64_t columns_row;
    uint16_t *rows;          /* the block of queries: [32][dim] */
    uint32_t *q, *weights;   /* right factors: [dim / 2][32], [AMX_KEYS / 2][32] */
    float *scores, *out;     /* [AMX_KEYS][32], [dim][32] */
    float *out_rows;         /* [32][dim] */
    float max[AMX_BLOCK], sum[AMX_BLOCK];
} amx_forward;

/* Scales, caps and masks scores of 16 queries; returns their maxima. `scores` is where key 0 would be. */
static inline __m512 amx_settle(const tt_attention *a, float *scores, span seen, int64_t i, __m512 top) {
    int64_t window = window_of(a);
    for (int64_t j = seen.from; j < seen.to; j++) {
        __m512 x = _mm512_loadu_ps(scores + j * AMX_BLOCK);
        if (a->softcap > 0.0f)
            x = amx_tanh(x * (a->scale / a->softcap)) * (a->softcap * LOG2E);
        else
            x = x * (a->scale * LOG2E);
        x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), amx_sees(i, j, window), x);
        _mm512_storeu_ps(scores + j * AMX_BLOCK, x);
        top = _mm512_max_ps(top, x);
    }
    return top;
}

/* 16 of the block's queries, from lane g on: their scores become weights, a right factor, and what was summed so far is
 * brought to the new maxima. `i` is the first of them. */
static void amx_soften(const tt_attention *a, amx_forward *t, span keys, int64_t key, int64_t i, int g) {
    span seen = amx_seen(keys, i, window_of(a));
    float *scores = t->scores + g - key * AMX_BLOCK;
    uint32_t *weights = t->weights + g - key / 2 * AMX_BLOCK;
    __m512 before = _mm512_loadu_ps(t->max + g), top = amx_settle(a, scores, seen, i, before);
    __m512 shrink = amx_exp2(before - top), sum = _mm512_loadu_ps(t->sum + g);
    if (_mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_GT_OQ)) {
        sum = sum * shrink;
        for (int64_t d = 0; d < amx_dim(a); d++) {
            float *out = t->out + d * AMX_BLOCK + g;
            _mm512_storeu_ps(out, _mm512_loadu_ps(out) * shrink);
        }
    }
    for (int64_t j = keys.from; j < keys.to; j += 2) {
        __m512i pair = _mm512_setzero_si512();
        if (j >= seen.from && j < seen.to) {
            __m512 even = amx_exp2(_mm512_loadu_ps(scores + j * AMX_BLOCK) - top);
            __m512 odd = amx_exp2(_mm512_loadu_ps(scores + (j + 1) * AMX_BLOCK) - top);
            sum = sum + even + odd;
            pair = amx_interleaved(amx_narrow(even, odd));
        }
        _mm512_storeu_si512(weights + j / 2 * AMX_BLOCK, pair);
    }
    _mm512_storeu_ps(t->max + g, top);
    _mm512_storeu_ps(t->sum + g, sum);
}

/* Divides by the sums, and writes the block's rows. */
static void amx_finish(const stretch *s, amx_forward *t, int64_t query, int64_t query_end, int64_t head) {
    const tt_attention *a = s->a;
    int64_t dim = amx_dim(a);
    for (int g = 0; g < AMX_BLOCK; g += 16) {
        __m512 share = 1.0f / _mm512_loadu_ps(t->sum + g);
        for (float *out = t->out + g; out < t->out + dim * AMX_BLOCK; out += AMX_BLOCK)
            _mm512_storeu_ps(out, _mm512_loadu_ps(out) * share);
    }
    amx_transpose((uint32_t *)t->out_rows, dim, (const uint32_t *)t->out, AMX_BLOCK, dim, AMX_BLOCK);
    for (int64_t i = query; i < query_end; i++) {
        int64_t r = i - query;
        store_head(s, a->out, a->heads, i, head, t->out_rows + r * dim, 1.0f);
        a->lse[head * tokens_of(a) + s->start + i] = t->max[r] / LOG2E + logf(t->sum[r]);
    }
}

/* One head, queries [query, query_end) of at most AMX_BLOCK. */
static void amx_forward_block(const stretch *s, amx_forward *t, int64_t query, int64_t query_end, int64_t head) {
    const tt_attention *a = s->a;
    int64_t dim = amx_dim(a), window = window_of(a);
    for (int64_t i = query; i < query_end; i++)
        amx_load_turned(s, t->rows + (i - query) * dim, a->q, a->q_stride, i, head);
    memset(t->rows + (query_end - query) * dim, 0, (size_t)(2 * (query + AMX_BLOCK - query_end) * dim));
    amx_pair_columns(t->q, AMX_BLOCK, t->rows, AMX_BLOCK, dim);
    for (int r = 0; r < AMX_BLOCK; r++) t->max[r] = -1e30f; /* finite: see attention_forward.h */
    memset(t->sum, 0, sizeof t->sum);
    memset(t->out, 0, (size_t)(4 * dim * AMX_BLOCK));
    for (int64_t key = round_down(larger(0, query - window + 1), AMX_BLOCK); key < query_end; key += AMX_KEYS) {
        span keys = amx_keys(query, key, window);
        for (int64_t j = keys.from; j < keys.to; j += AMX_BLOCK)
            amx_product(t->k + j * dim, dim, t->q, AMX_BLOCK, t->scores + (j - key) * AMX_BLOCK, AMX_BLOCK, dim, 0);
        for (int g = 0; g < AMX_BLOCK; g += 16) amx_soften(a, t, keys, key, query + g, g);
        for (int64_t d = 0; d < dim; d += AMX_BLOCK)
            amx_product(t->v_columns + d * t->columns_row + keys.from, t->columns_row,
                        t->weights + (keys.from - key) / 2 * AMX_BLOCK, AMX_BLOCK, t->out + d * AMX_BLOCK, AMX_BLOCK,
                        keys.to - keys.from, 1);
    }
    amx_finish(s, t, query, query_end, head);
}

static int amx_forward_task(const tt_attention *a, int64_t start, int64_t query, int64_t query_end, int64_t kv_head) {
    int64_t dim = amx_dim(a);
    int64_t skipped = round_down(larger(0, query - window_of(a) + 1), AMX_BLOCK); /* keys that no query sees */
    int64_t keys = query_end - skipped, room = round_up(keys, AMX_BLOCK);
    arena scratch;
    amx_forward t = {.columns_row = room + AMX_BLOCK};
    if (!arena_open(&scratch, stretch_bytes(a, keys) + 2 * dim * (3 * room + AMX_BLOCK) +
                    AMX_BLOCK * (12 * dim + 6 * AMX_KEYS), 10))
        return 0;
    stretch s = stretch_from(a, &scratch, start + skipped, keys);
    t.k = (uint16_t *)arena_take(&scratch, 2 * room * dim);
    t.v_columns = (uint16_t *)arena_take(&scratch, 2 * dim * t.columns_row);
    uint32_t *pairs = (uint32_t *)arena_take(&scratch, 2 * room * dim);
    t.rows = (uint16_t *)arena_take(&scratch, 2 * AMX_BLOCK * dim);
    t.q = (uint32_t *)arena_take(&scratch, 2 * AMX_BLOCK * dim);
    t.out = take_floats(&scratch, AMX_BLOCK * dim);
    t.out_rows = take_floats(&scratch, AMX_BLOCK * dim);
    t.scores = take_floats(&scratch, AMX_KEYS * AMX_BLOCK);
    t.weights = (uint32_t *)arena_take(&scratch, 2 * AMX_KEYS * AMX_BLOCK);
    memset(t.k + keys * dim, 0, (size_t)(2 * (room - keys) * dim));
    for (int64_t j = 0; j < keys; j++) amx_load_head(&s, t.k + j * dim, a->v, a->v_stride, j, kv_head);
    amx_columns(t.v_columns, t.columns_row, pairs, t.k, room, dim);
    for (int64_t j = 0; j < keys; j++) amx_load_turned(&s, t.k + j * dim, a->k, a->k_stride, j, kv_head);
    amx_open();
    for (int64_t g = 0; g < group_of(a); g++)
        for (int64_t i = query - skipped; i < keys; i += AMX_BLOCK)
            amx_forward_block(&s, &t, i, smaller(i + AMX_BLOCK, keys), kv_head * group_of(a) + g);
    amx_close();
    free(scratch.memory);
    return 1;
}

#endif
#endif
