/* The backward pass of attention for one segment and some of the heads that share a key and value head.
 *
 * With P the weights, recomputed from the saved log-sums: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)),
 * dQ = dS K, dK = dS^T Q (Dao et al. 2022, arXiv:2205.14135, appendix B). A tile of queries meets all of its keys
 * before the next one starts, so dQ is finished tile by tile, and dK and dV add up over tiles and heads.
 */
#ifndef TT_ATTENTION_BACKWARD_H
#define TT_ATTENTION_BACKWARD_H

#include "attention_forward.h"

typedef struct {
    float *k, *k_panels, *v_panels, *dk, *dv; /* the segment: [length][dim] */
    float *rows, *dout, *dq;                  /* the tile: [TT_TILE][dim] */
    float *weights, *slopes;                  /* the tile: [TT_TILE][TT_SCORE_ROW] */
    float lse[TT_TILE], inner[TT_TILE];       /* inner = rowsum(dO O) */
} backward_tile;

static void load_backward_row(const stretch *s, backward_tile *t, int64_t r, int64_t position, int64_t head) {
    const tt_attention *a = s->a;
    int64_t dim = padded_dim(a);
    float out[TT_MAX_DIM], *dout = t->dout + r * dim;
    vf inner = vf_set(0.0f);
    load_turned(s, t->rows + r * dim, a->q, a->q_stride, position, head, a->scale);
    load_head(s, dout, a->dout, a->dout_stride, position, head);
    load_head(s, out, a->out, a->heads * a->dim, position, head);
    for (int64_t d = 0; d < dim; d += TT_WIDTH) inner += vf_load(out + d) * vf_load(dout + d);
    t->inner[r] = vf_sum(inner);
    t->lse[r] = a->lse[head * tokens_of(a) + s->start + position];
}

/* Scores of the tile become weights P, and dP becomes dS, TT_ROWS queries at a time. */
static void differentiate(backward_tile *t, band b, float softcap) {
    for (int64_t i = b.query; i < b.query_end; i += TT_ROWS) {
        int64_t row = i - b.query;
        span stored = columns_of(b, i);
        for (int64_t j = stored.from; j < stored.to; j += TT_WIDTH) {
            int whole = is_whole(b, i, j);
            for (int r = 0; r < TT_ROWS; r++) {
                int64_t at = (row + r) * TT_SCORE_ROW + j - b.key;
                vf score = vf_load(t->weights + at), slope = vf_load(t->slopes + at) - t->inner[row + r];
                if (softcap > 0.0f) {
                    score = capped(score, softcap);
                    slope *= 1.0f - (score / softcap) * (score / softcap);
                }
                vf weight = vf_exp(score - t->lse[row + r]);
                if (!whole) weight = vf_select(seen_lanes(b, i + r, j), weight, vf_set(0.0f));
                vf_store(t->weights + at, weight);
                vf_store(t->slopes + at, weight * slope);
            }
        }
    }
}

/* One head, queries [query, query_end). */
static void backward_rows(const stretch *s, backward_tile *t, int64_t query, int64_t query_end, int64_t head) {
    const tt_attention *a = s->a;
    int64_t dim = padded_dim(a), window = window_of(a);
    for (int64_t i = query; i < query_end; i++) load_backward_row(s, t, i - query, i, head);
    memset(t->dq, 0, (size_t)(TT_TILE * dim) * sizeof(float));
    for (int64_t key = round_down(larger(0, query - window + 1), TT_PANEL); key < query_end; key += TT_BLOCK) {
        band b = {query, query_end, key, smaller(key + TT_BLOCK, query_end), window};
        band_scores(b, dim, t->rows, t->k_panels, t->weights, TT_SCORE_ROW);
        band_scores(b, dim, t->dout, t->v_panels, t->slopes, TT_SCORE_ROW);
        differentiate(t, b, a->softcap);
        band_scatter(b, dim, t->weights, TT_SCORE_ROW, t->dout, t->dv);
        band_scatter(b, dim, t->slopes, TT_SCORE_ROW, t->rows, t->dk);
        band_gather(b, dim, t->slopes, TT_SCORE_ROW, t->k, t->dq);
    }
    for (int64_t i = query; i < query_end; i++)
        store_turned(s, a->dq, a->heads, i, head, t->dq + (i - query) * dim, a->scale);
}

static void backward_arrays(arena *scratch, backward_tile *t, int64_t room, int64_t tile) {
    float **segment[] = {&t->k, &t->k_panels, &t->v_panels, &t->dk, &t->dv}, **tiles[] = {&t->rows, &t->dout, &t->dq};
    for (int i = 0; i < 5; i++) *segment[i] = take_floats(scratch, room);
    for (int i = 0; i < 3; i++) *tiles[i] = take_floats(scratch, tile);
    t->weights = take_floats(scratch, TT_TILE * TT_SCORE_ROW);
    t->slopes = take_floats(scratch, TT_TILE * TT_SCORE_ROW);
    /* What the last rows of a tile leave unused must be numbers. */
    memset(t->rows, 0, (size_t)tile * sizeof(float));
    memset(t->dout, 0, (size_t)tile * sizeof(float));
    memset(t->lse, 0, sizeof t->lse);
    memset(t->inner, 0, sizeof t->inner);
    memset(t->dk, 0, (size_t)room * sizeof(float));
    memset(t->dv, 0, (size_t)room * sizeof(float));
}

/* The gradients of one key and value head, float32, into the tensors, or, if `parts` is given, to be added to those of
 * other heads of the group: [tokens][2][dim], dk before dv. */
static void store_key_gradients(const stretch *s, float *dk, float *dv, int64_t length, int64_t row, int64_t kv_head,
                                float scale, float *parts) {
    const tt_attention *a = s->a;
    int64_t dim = padded_dim(a);
    for (int64_t j = 0; j < length; j++) {
        if (parts) {
            for (int64_t d = 0; d < dim; d++) parts[2 * j * dim + d] = dk[j * row + d] * scale;
            memcpy(parts + (2 * j + 1) * dim, dv + j * row, (size_t)dim * sizeof(float));
        } else {
            store_turned(s, a->dk, a->kv_heads, j, kv_head, dk + j * row, scale);
            store_head(s, a->dv, a->kv_heads, j, kv_head, dv + j * row, 1.0f);
        }
    }
}

/* Heads [head, head_end), which share one key and value head, over the segment [start, start + length).
 * Returns 0 when there is no memory. */
static int backward_task(const tt_attention *a, int64_t start, int64_t length, int64_t head, int64_t head_end,
                         float *parts) {
    int64_t dim = padded_dim(a), kv_head = head / group_of(a), room = (length + TT_PANEL) * dim, tile = TT_TILE * dim;
    arena scratch;
    backward_tile t;
    if (!arena_open(&scratch, stretch_bytes(a, length) + 4 * (5 * room + 3 * tile + 2 * TT_TILE * TT_SCORE_ROW), 12))
        return 0;
    stretch s = stretch_from(a, &scratch, start, length);
    backward_arrays(&scratch, &t, room, tile);
    for (int64_t j = 0; j < length; j++) load_head(&s, t.k + j * dim, a->v, a->v_stride, j, kv_head);
    to_panels(t.v_panels, t.k, length, dim);
    for (int64_t j = 0; j < length; j++) load_turned(&s, t.k + j * dim, a->k, a->k_stride, j, kv_head, 1.0f);
    to_panels(t.k_panels, t.k, length, dim);
    for (; head < head_end; head++)
        for (int64_t i = 0; i < length; i += TT_TILE) backward_rows(&s, &t, i, smaller(i + TT_TILE, length), head);
    store_key_gradients(&s, t.dk, t.dv, length, dim, kv_head, 1.0f, parts);
    free(scratch.memory);
    return 1;
}

#endif
