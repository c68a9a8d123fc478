/* The backward pass of attention in bfloat16 on the tile unit (see amx.h), in the tasks of attention_backward.h.
 *
 * Weights and their gradients come with keys as rows, as in the forward pass: so they are a left factor of dV and dK as
 * they are, and with two rows interleaved a right factor of the transpose of dQ.
 */
#ifndef TT_ATTENTION_AMX_BACKWARD_H
#define TT_ATTENTION_AMX_BACKWARD_H

#include "attention_amx_forward.h"
#include "attention_backward.h"

#if defined(TT_AMX)

#define AMX_QUERIES 128 /* of a tile */

typedef struct {
    uint16_t *k, *v, *k_columns;                 /* the segment: [keys][dim] twice, [dim][columns_row] */
    int64_t columns_row;
    float *dk, *dv;                              /* [keys][dim] */
    uint16_t *rows;                              /* the tile: [AMX_QUERIES][dim] */
    uint32_t *q_columns, *dout_columns;          /* right factors: [dim / 2][AMX_QUERIES] */
    uint32_t *q_rows, *dout_rows;                /* right factors: [AMX_QUERIES / 2][dim] */
    float *scores, *slopes;                      /* a block of queries: [AMX_KEYS][32] */
    uint16_t *weights, *weight_slopes;           /* the tile: [AMX_KEYS][AMX_QUERIES] */
    uint32_t *slope_pairs;                       /* a block of queries: [AMX_KEYS / 2][32] */
    float *dq, *dq_rows;                         /* [dim][AMX_QUERIES], [32][dim] */
    float lse[AMX_QUERIES], inner[AMX_QUERIES];  /* of base 2; rowsum(dO O) */
} amx_backward;

/* The 16 queries from i on, lane g of their block and `lane` of the tile: scores become weights and dP becomes dS, both
 * as left factors, and dS as a right factor too. */
static void amx_differentiate(const tt_attention *a, amx_backward *t, span keys, int64_t key, int64_t i, int64_t lane,
                              int g) {
    int64_t window = window_of(a);
    span seen = amx_seen(keys, i, window);
    __m512 lse = _mm512_loadu_ps(t->lse + lane), inner = _mm512_loadu_ps(t->inner + lane);
    for (int64_t j = keys.from; j < keys.to; j += 2) {
        __m512 weight[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, slope[2] = {weight[0], weight[0]};
        for (int r = 0; r < 2 && j >= seen.from && j < seen.to; r++) {
            __m512 x = _mm512_loadu_ps(t->scores + (j + r - key) * AMX_BLOCK + g);
            slope[r] = _mm512_loadu_ps(t->slopes + (j + r - key) * AMX_BLOCK + g) - inner;
            if (a->softcap > 0.0f) {
                __m512 capped_by = amx_tanh(x * (a->scale / a->softcap));
                x = capped_by * (a->softcap * LOG2E) - lse;
                slope[r] = slope[r] * (1.0f - capped_by * capped_by);
            } else {
                x = x * (a->scale * LOG2E) - lse;
            }
            weight[r] = _mm512_maskz_mov_ps(amx_sees(i, j + r, window), amx_exp2(x));
            slope[r] = slope[r] * weight[r];
        }
        __m512i weights = amx_narrow(weight[0], weight[1]), slopes = amx_narrow(slope[0], slope[1]);
        int64_t at = (j - key) * AMX_QUERIES + lane;
        _mm256_storeu_si256((__m256i *)(t->weights + at), _mm512_castsi512_si256(weights));
        _mm256_storeu_si256((__m256i *)(t->weights + at + AMX_QUERIES), _mm512_extracti64x4_epi64(weights, 1));
        _mm256_storeu_si256((__m256i *)(t->weight_slopes + at), _mm512_castsi512_si256(slopes));
        _mm256_storeu_si256((__m256i *)(t->weight_slopes + at + AMX_QUERIES), _mm512_extracti64x4_epi64(slopes, 1));
        _mm512_storeu_si512(t->slope_pairs + (j - key) / 2 * AMX_BLOCK + g, amx_interleaved(slopes));
    }
}

/* rowsum(dO O) of one head of a token. */
static inline float amx_inner(const stretch *s, int64_t position, int64_t head) {
    const tt_attention *a = s->a;
    const uint16_t *out = (const uint16_t *)a->out + ((s->start + position) * a->heads + head) * a->dim;
    const uint16_t *dout = (const uint16_t *)a->dout + (s->start + position) * a->dout_stride + head * a->dim;
    __m512 sum = _mm512_setzero_ps();
    prefetch_row(out, a->heads * a->dim, a);
    for (int64_t d = 0; d < a->dim; d += 32) {
        __mmask32 m = first32(a->dim - d);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(m, out + d),
                               (__m512bh)_mm512_maskz_loadu_epi16(m, dout + d));
    }
    return vf_sum((vf)sum);
}

/* Queries [query, query_end) of one head become right factors. */
static void amx_load_tile(const stretch *s, amx_backward *t, int64_t query, int64_t query_end, int64_t head) {
    const tt_attention *a = s->a;
    int64_t dim = amx_dim(a), count = query_end - query, room = round_up(count, AMX_BLOCK);
    memset(t->rows + count * dim, 0, (size_t)(2 * (room - count) * dim));
    for (int64_t r = 0; r < count; r++) amx_load_turned(s, t->rows + r * dim, a->q, a->q_stride, query + r, head);
    amx_pair_columns(t->q_columns, AMX_QUERIES, t->rows, room, dim);
    amx_pair_rows(t->q_rows, t->rows, dim, room, dim);
    for (int64_t r = 0; r < count; r++) amx_load_head(s, t->rows + r * dim, a->dout, a->dout_stride, query + r, head);
    amx_pair_columns(t->dout_columns, AMX_QUERIES, t->rows, room, dim);
    amx_pair_rows(t->dout_rows, t->rows, dim, room, dim);
    for (int64_t r = 0; r < room; r++) {
        t->lse[r] = r < count ? a->lse[head * tokens_of(a) + s->start + query + r] * LOG2E : 0.0f;
        t->inner[r] = r < count ? amx_inner(s, query + r, head) : 0.0f;
    }
}

/* dQ of the queries [i, i + AMX_BLOCK), from the keys of one tile. `lane` is their place in the tile of queries. */
static void amx_query_gradient(const tt_attention *a, amx_backward *t, span keys, int64_t key, int64_t i,
                               int64_t lane) {
    int64_t dim = amx_dim(a);
    for (int64_t j = keys.from; j < keys.to; j += AMX_BLOCK) {
        int64_t at = (j - key) * AMX_BLOCK;
        amx_product(t->k + j * dim, dim, t->q_columns + lane, AMX_QUERIES, t->scores + at, AMX_BLOCK, dim, 0);
        amx_product(t->v + j * dim, dim, t->dout_columns + lane, AMX_QUERIES, t->slopes + at, AMX_BLOCK, dim, 0);
    }
    for (int g = 0; g < AMX_BLOCK; g += 16) amx_differentiate(a, t, keys, key, i + g, lane + g, g);
    for (int64_t d = 0; d < dim; d += AMX_BLOCK)
        amx_product(t->k_columns + d * t->columns_row + keys.from, t->columns_row,
                    t->slope_pairs + (keys.from - key) / 2 * AMX_BLOCK, AMX_BLOCK, t->dq + d * AMX_QUERIES + lane,
                    AMX_QUERIES, keys.to - keys.from, 1);
}

/* dK and dV of the keys [j, j + AMX_BLOCK), from those queries of a tile that see them. */
static void amx_key_gradients(const tt_attention *a, amx_backward *t, int64_t key, int64_t j, int64_t query,
                              span queries) {
    int64_t dim = amx_dim(a), depth = queries.to - queries.from, lane = queries.from - query;
    int64_t at = (j - key) * AMX_QUERIES + lane, row = lane / 2 * dim;
    for (int64_t d = 0; d < dim && depth > 0; d += AMX_BLOCK) {
        amx_product(t->weights + at, AMX_QUERIES, t->dout_rows + row + d, dim, t->dv + j * dim + d, dim, depth, 1);
        amx_product(t->weight_slopes + at, AMX_QUERIES, t->q_rows + row + d, dim, t->dk + j * dim + d, dim, depth, 1);
    }
}

/* One head, queries [query, query_end) of at most AMX_QUERIES. */
static void amx_backward_rows(const stretch *s, amx_backward *t, int64_t query, int64_t query_end, int64_t head) {
    const tt_attention *a = s->a;
    int64_t dim = amx_dim(a), window = window_of(a), whole_end = round_up(query_end, AMX_BLOCK);
    amx_load_tile(s, t, query, query_end, head);
    memset(t->dq, 0, (size_t)(4 * dim * AMX_QUERIES));
    for (int64_t key = round_down(larger(0, query - window + 1), AMX_BLOCK); key < query_end; key += AMX_KEYS) {
        for (int64_t i = query; i < query_end; i += AMX_BLOCK) {
            span keys = amx_keys(i, key, window);
            if (keys.from < keys.to) amx_query_gradient(a, t, keys, key, i, i - query);
        }
        for (int64_t j = key; j < smaller(key + AMX_KEYS, whole_end); j += AMX_BLOCK) {
            int64_t last = round_up(j + AMX_BLOCK - 1 + window, AMX_BLOCK);
            amx_key_gradients(a, t, key, j, query, (span){larger(query, j), smaller(whole_end, last)});
        }
    }
    for (int64_t i = query; i < query_end; i += AMX_BLOCK) {
        amx_transpose((uint32_t *)t->dq_rows, dim, (const uint32_t *)t->dq + i - query, AMX_QUERIES, dim, AMX_BLOCK);
        for (int64_t r = 0; r < smaller(AMX_BLOCK, query_end - i); r++)
            store_turned(s, a->dq, a->heads, i + r, head, t->dq_rows + r * dim, a->scale);
    }
}

/* The arrays of a task; returns 0 when there is no memory. */
static int amx_backward_open(const tt_attention *a, arena *scratch, amx_backward *t, int64_t length) {
    int64_t dim = amx_dim(a), room = round_up(length, AMX_BLOCK), tile = AMX_QUERIES * dim;
    t->columns_row = room + AMX_BLOCK;
    int64_t segment = 2 * dim * (3 * room + AMX_BLOCK) + 8 * room * dim;
    int64_t tiles = 14 * tile + 4 * AMX_BLOCK * dim + AMX_KEYS * (4 * AMX_QUERIES + 10 * AMX_BLOCK);
    if (!arena_open(scratch, stretch_bytes(a, length) + segment + tiles, 20)) return 0;
    t->k = (uint16_t *)arena_take(scratch, 2 * room * dim);
    t->v = (uint16_t *)arena_take(scratch, 2 * room * dim);
    t->k_columns = (uint16_t *)arena_take(scratch, 2 * dim * t->columns_row);
    t->dk = take_floats(scratch, room * dim);
    t->dv = take_floats(scratch, room * dim);
    t->rows = (uint16_t *)arena_take(scratch, 2 * tile);
    uint32_t **factors[] = {&t->q_columns, &t->dout_columns, &t->q_rows, &t->dout_rows};
    for (int f = 0; f < 4; f++) *factors[f] = (uint32_t *)arena_take(scratch, 2 * tile);
    t->dq = take_floats(scratch, tile);
    t->dq_rows = take_floats(scratch, AMX_BLOCK * dim);
    t->scores = take_floats(scratch, AMX_KEYS * AMX_BLOCK);
    t->slopes = take_floats(scratch, AMX_KEYS * AMX_BLOCK);
    t->slope_pairs = (uint32_t *)arena_take(scratch, 2 * AMX_KEYS * AMX_BLOCK);
    t->weights = (uint16_t *)arena_take(scratch, 2 * AMX_KEYS * AMX_QUERIES);
    t->weight_slopes = (uint16_t *)arena_take(scratch, 2 * AMX_KEYS * AMX_QUERIES);
    return 1;
}

static int amx_backward_task(const tt_attention *a, int64_t start, int64_t length, int64_t head, int64_t head_end,
                             float *parts) {
    int64_t dim = amx_dim(a), kv_head = head / group_of(a), room = round_up(length, AMX_BLOCK);
    arena scratch;
    amx_backward t;
    if (!amx_backward_open(a, &scratch, &t, length)) return 0;
    stretch s = stretch_from(a, &scratch, start, length);
    memset(t.k + length * dim, 0, (size_t)(2 * (room - length) * dim));
    memset(t.v + length * dim, 0, (size_t)(2 * (room - length) * dim));
    for (int64_t j = 0; j < length; j++) amx_load_turned(&s, t.k + j * dim, a->k, a->k_stride, j, kv_head);
    for (int64_t j = 0; j < length; j++) amx_load_head(&s, t.v + j * dim, a->v, a->v_stride, j, kv_head);
    amx_columns(t.k_columns, t.columns_row, (uint32_t *)t.dk, t.k, room, dim); /* dk is not in use yet */
    memset(t.dk, 0, (size_t)(4 * room * dim));
    memset(t.dv, 0, (size_t)(4 * room * dim));
    amx_open();
    for (; head < head_end; head++)
        for (int64_t i = 0; i < length; i += AMX_QUERIES)
            amx_backward_rows(&s, &t, i, smaller(i + AMX_QUERIES, length), head);
    amx_close();
    store_key_gradients(&s, t.dk, t.dv, length, dim, kv_head, a->scale, parts);
    free(scratch.memory);
    return 1;
}

#endif
#endif
