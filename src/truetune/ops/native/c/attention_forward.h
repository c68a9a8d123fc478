/* The forward pass of attention for some queries of a segment and all heads that share a key and value head.
 *
 * Scores exist for one tile at a time; each row keeps its maximum and its sum, and is rescaled when the maximum rises
 * (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
 */
#ifndef TT_ATTENTION_FORWARD_H
#define TT_ATTENTION_FORWARD_H

#include <math.h>

#include "heads.h"

#define TT_TILE 64   /* queries of a tile: their scores, rows and outputs fit the nearest cache */
#define TT_BLOCK 256 /* keys of a tile */
#define TT_SCORE_ROW (TT_BLOCK + TT_WIDTH)

/* The rows of a tile that outlive one block of keys. */
typedef struct {
    float *rows, *scores, *out; /* [TT_TILE][dim], [TT_TILE][TT_SCORE_ROW], [TT_TILE][dim] */
    float max[TT_TILE], sum[TT_TILE];
} forward_tile;

static inline vf capped(vf score, float softcap) { return softcap * vf_tanh(score / softcap); }

/* Masks and caps the scores of the TT_ROWS queries from i on, and finds the largest of each. */
static inline void settle_scores(band b, int64_t i, float *scores, float softcap, vf largest[TT_ROWS]) {
    span stored = columns_of(b, i);
    for (int r = 0; r < TT_ROWS; r++) largest[r] = vf_set(-INFINITY);
    for (int64_t j = stored.from; j < stored.to; j += TT_WIDTH) {
        int whole = is_whole(b, i, j);
        for (int r = 0; r < TT_ROWS; r++) {
            float *at = scores + r * TT_SCORE_ROW + j - b.key;
            vf score = vf_load(at);
            if (softcap > 0.0f) score = capped(score, softcap);
            if (!whole) score = vf_select(seen_lanes(b, i + r, j), score, vf_set(-INFINITY));
            if (softcap > 0.0f || !whole) vf_store(at, score);
            largest[r] = vf_max(largest[r], score);
        }
    }
}

/* Brings the sum and the output of a row to a new maximum. */
static inline void raise_max(forward_tile *t, int64_t row, int64_t dim, float max) {
    if (t->sum[row] > 0.0f) {
        float shrink = vf_exp(vf_set(t->max[row] - max))[0];
        t->sum[row] *= shrink;
        for (int64_t d = 0; d < dim; d++) t->out[row * dim + d] *= shrink;
    }
    t->max[row] = max;
}

/* Scores of the tile become weights e^(score - max), TT_ROWS queries at a time. */
static void soften(forward_tile *t, band b, int64_t dim, float softcap) {
    for (int64_t i = b.query; i < b.query_end; i += TT_ROWS) {
        int64_t row = i - b.query;
        float *scores = t->scores + row * TT_SCORE_ROW;
        span stored = columns_of(b, i);
        vf largest[TT_ROWS], sum[TT_ROWS];
        settle_scores(b, i, scores, softcap, largest);
        for (int r = 0; r < TT_ROWS; r++) {
            float max = vf_largest(largest[r]);
            if (max > t->max[row + r]) raise_max(t, row + r, dim, max);
            sum[r] = vf_set(0.0f);
        }
        for (int64_t j = stored.from - b.key; j < stored.to - b.key; j += TT_WIDTH)
            for (int r = 0; r < TT_ROWS; r++) {
                vf weight = vf_exp(vf_load(scores + r * TT_SCORE_ROW + j) - t->max[row + r]);
                vf_store(scores + r * TT_SCORE_ROW + j, weight);
                sum[r] += weight;
            }
        for (int r = 0; r < TT_ROWS; r++) t->sum[row + r] += vf_sum(sum[r]);
    }
}

/* One head, queries [query, query_end) of at most TT_TILE. */
static void forward_rows(const stretch *s, forward_tile *t, const float *panels, const float *values, int64_t query,
                         int64_t query_end, int64_t head) {
    const tt_attention *a = s->a;
    int64_t dim = padded_dim(a), window = window_of(a);
    for (int64_t i = query; i < query_end; i++)
        load_turned(s, t->rows + (i - query) * dim, a->q, a->q_stride, i, head, a->scale);
    /* The first maximum is finite: a block of which a row sees no key must not make inf - inf. */
    for (int64_t r = 0; r < TT_TILE; r++) t->max[r] = -1e30f;
    memset(t->sum, 0, sizeof t->sum);
    memset(t->out, 0, (size_t)(TT_TILE * dim) * sizeof(float));
    for (int64_t key = round_down(larger(0, query - window + 1), TT_PANEL); key < query_end; key += TT_BLOCK) {
        band b = {query, query_end, key, smaller(key + TT_BLOCK, query_end), window};
        band_scores(b, dim, t->rows, panels, t->scores, TT_SCORE_ROW);
        soften(t, b, dim, a->softcap);
        band_gather(b, dim, t->scores, TT_SCORE_ROW, values, t->out);
    }
    for (int64_t i = query; i < query_end; i++) {
        int64_t r = i - query;
        store_head(s, a->out, a->heads, i, head, t->out + r * dim, 1.0f / t->sum[r]);
        a->lse[head * tokens_of(a) + s->start + i] = t->max[r] + logf(t->sum[r]);
    }
}

/* Queries [query, query_end) of the segment that starts at token `start`. Returns 0 when there is no memory. */
static int forward_task(const tt_attention *a, int64_t start, int64_t query, int64_t query_end, int64_t kv_head) {
    int64_t dim = padded_dim(a), tile = TT_TILE * dim;
    int64_t skipped = round_down(larger(0, query - window_of(a) + 1), TT_PANEL); /* keys that no query sees */
    int64_t keys = query_end - skipped, room = (keys + TT_PANEL) * dim;
    arena scratch;
    forward_tile t;
    if (!arena_open(&scratch, stretch_bytes(a, keys) + 4 * (2 * room + 2 * tile + TT_TILE * TT_SCORE_ROW), 7)) return 0;
    stretch s = stretch_from(a, &scratch, start + skipped, keys);
    float *values = take_floats(&scratch, room), *panels = take_floats(&scratch, room);
    t.rows = take_floats(&scratch, tile);
    t.out = take_floats(&scratch, tile);
    t.scores = take_floats(&scratch, TT_TILE * TT_SCORE_ROW);
    memset(t.rows, 0, (size_t)tile * sizeof(float)); /* the last rows of a tile may stay unused */
    for (int64_t j = 0; j < keys; j++) load_turned(&s, values + j * dim, a->k, a->k_stride, j, kv_head, 1.0f);
    to_panels(panels, values, keys, dim);
    for (int64_t j = 0; j < keys; j++) load_head(&s, values + j * dim, a->v, a->v_stride, j, kv_head);
    for (int64_t g = 0; g < group_of(a); g++)
        for (int64_t i = query - skipped; i < keys; i += TT_TILE)
            forward_rows(&s, &t, panels, values, i, smaller(i + TT_TILE, keys), kv_head * group_of(a) + g);
    free(scratch.memory);
    return 1;
}

#endif
