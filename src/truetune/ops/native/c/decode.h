/* One new token of each of several texts through the layers of a decoder of the common build (models/families.py).
 *
 * What costs time here is reading the weights: each is read once for all rows, and nothing but products touches them.
 * Every sum belongs to one row and runs in one order, so a row's result does not depend on its neighbours.
 * Activations are float32 between products; a product with bfloat16 weights takes its input rounded to bfloat16.
 */
#ifndef TT_DECODE_H
#define TT_DECODE_H

#include <stdlib.h>

#include "gated.h"
#include "norm.h"
#include "skinny.h"

typedef struct {
    const void *norm[4]; /* of the input, of the MLP's input, of each query head, of each key head; NULL: none */
    float eps[4], offset[4];
    skinny_map q, k, v, o, gate, up, down;
    void *keys, *values; /* [pages, page, kv_heads, dim] */
    float scale, softcap;
    int64_t window;
} decode_layer;

typedef struct {
    const decode_layer *layers;
    float *x;                       /* [rows, hidden], in and out */
    const float *cos, *sin;         /* [rows, rotary] */
    const int64_t *positions;       /* [rows] */
    const int64_t *pages, *edges;   /* row r has pages[edges[r]] ... pages[edges[r + 1] - 1] */
    int64_t count, rows, hidden, inner, heads, kv_heads, dim, rotary, page;
    int32_t dtype, kind;
} decode_step;

typedef struct {
    const decode_step *s;
    const decode_layer *layer;
    float *q, *k, *v, *mixed, *scores;
    int64_t longest;
} decode_attention;

static void decode_norm(const decode_step *s, const decode_layer *layer, int which, const float *x, float *y,
                        int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * n;
        float *to = y + r * n;
        float scale = 1.0f / sqrtf(row_squares(from, n, TT_FLOAT32) / (float)n + layer->eps[which]);
        for (int64_t i = 0; i < n; i += TT_WIDTH) {
            vf w = load_at(layer->norm[which], i, n, s->dtype, 0.0f) + layer->offset[which];
            store_at(to, i, n, load_at(from, i, n, TT_FLOAT32, 0.0f) * scale * w, TT_FLOAT32);
        }
    }
}

/* Dimension i turns with dimension i + rotary / 2. */
static void decode_turn(float *x, const float *cos, const float *sin, int64_t heads, int64_t dim, int64_t rotary) {
    int64_t half = rotary / 2;
    for (int64_t h = 0; h < heads; h++, x += dim)
        for (int64_t i = 0; i < half; i++) {
            float low = x[i], high = x[i + half];
            x[i] = low * cos[i] - high * sin[i];
            x[i + half] = high * cos[i + half] + low * sin[i + half];
        }
}

static const void *decode_at(const decode_step *s, const void *held, int64_t row, int64_t position, int64_t head) {
    int64_t page = s->pages[s->edges[row] + position / s->page];
    int64_t token = page * s->page + position % s->page;
    return (const char *)held + (token * s->kv_heads + head) * s->dim * element_size(s->dtype);
}

TT_INLINE float decode_dot(const float *q, const void *k, int64_t n, int dtype) {
    vf sum = {0};
    for (int64_t i = 0; i < n; i += TT_WIDTH)
        sum += load_at(q, i, n, TT_FLOAT32, 0.0f) * load_at(k, i, n, dtype, 0.0f);
    return vf_sum(sum);
}

TT_INLINE void decode_add(float *to, const void *v, float weight, int64_t n, int dtype) {
    for (int64_t i = 0; i < n; i += TT_WIDTH)
        store_at(to, i, n, load_at(to, i, n, TT_FLOAT32, 0.0f) + weight * load_at(v, i, n, dtype, 0.0f), TT_FLOAT32);
}

/* Scores [n] become weights that sum to 1. */
static void decode_softmax(float *scores, int64_t n) {
    float largest = -INFINITY, total = 0.0f;
    for (int64_t i = 0; i < n; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (int64_t i = 0; i < n; i += TT_WIDTH) {
        vf e = vf_exp(load_at(scores, i, n, TT_FLOAT32, -INFINITY) - largest);
        total += vf_sum(e);
        store_at(scores, i, n, e, TT_FLOAT32);
    }
    for (int64_t i = 0; i < n; i++) scores[i] /= total;
}

/* One key head of one row, with the query heads that read it. */
TT_INLINE void decode_attend(const decode_attention *a, int64_t task, int dtype) {
    const decode_step *s = a->s;
    int64_t row = task / s->kv_heads, head = task % s->kv_heads, group = s->heads / s->kv_heads, dim = s->dim;
    int64_t end = s->positions[row] + 1, window = a->layer->window;
    int64_t first = window && end > window ? end - window : 0;
    const float *q = a->q + (row * s->heads + head * group) * dim;
    float *out = a->mixed + (row * s->heads + head * group) * dim;
    float *scores = a->scores + (row * s->heads + head * group) * a->longest;
    float cap = a->layer->softcap;
    for (int64_t p = first; p < end; p++) {
        const void *k = decode_at(s, a->layer->keys, row, p, head);
        for (int64_t g = 0; g < group; g++) {
            float score = decode_dot(q + g * dim, k, dim, dtype) * a->layer->scale;
            scores[g * a->longest + p - first] = cap != 0.0f ? cap * tanhf(score / cap) : score;
        }
    }
    memset(out, 0, (size_t)(group * dim) * sizeof(float));
    for (int64_t g = 0; g < group; g++) decode_softmax(scores + g * a->longest, end - first);
    for (int64_t p = first; p < end; p++) {
        const void *v = decode_at(s, a->layer->values, row, p, head);
        for (int64_t g = 0; g < group; g++)
            decode_add(out + g * dim, v, scores[g * a->longest + p - first], dim, dtype);
    }
}

static void decode_attend_task(void *context, int64_t task) {
    const decode_attention *a = (const decode_attention *)context;
    if (a->s->dtype == TT_FLOAT32)
        decode_attend(a, task, TT_FLOAT32);
    else
        decode_attend(a, task, TT_BFLOAT16);
}

static void decode_mix(const decode_attention *a) {
    const decode_step *s = a->s;
    const decode_layer *layer = a->layer;
    int64_t width = s->kv_heads * s->dim;
    if (layer->norm[2]) decode_norm(s, layer, 2, a->q, a->q, s->rows * s->heads, s->dim);
    if (layer->norm[3]) decode_norm(s, layer, 3, a->k, a->k, s->rows * s->kv_heads, s->dim);
    for (int64_t r = 0; r < s->rows; r++) {
        const float *cos = s->cos + r * s->rotary, *sin = s->sin + r * s->rotary;
        decode_turn(a->q + r * s->heads * s->dim, cos, sin, s->heads, s->dim, s->rotary);
        decode_turn(a->k + r * width, cos, sin, s->kv_heads, s->dim, s->rotary);
        store_row((void *)decode_at(s, layer->keys, r, s->positions[r], 0), a->k + r * width, width, s->dtype);
        store_row((void *)decode_at(s, layer->values, r, s->positions[r], 0), a->v + r * width, width, s->dtype);
    }
    tt_parallel(s->rows * s->kv_heads, decode_attend_task, (void *)a);
}

static void decode_gate(float *gate, const float *up, int64_t n, int kind) {
    vf derivative;
    for (int64_t i = 0; i < n; i += TT_WIDTH) {
        vf g = load_at(gate, i, n, TT_FLOAT32, 0.0f);
        vf act = kind == TT_SILU ? activation(g, TT_SILU, &derivative) : activation(g, kind, &derivative);
        store_at(gate, i, n, act * load_at(up, i, n, TT_FLOAT32, 0.0f), TT_FLOAT32);
    }
}

static void decode_plus(float *to, const float *more, int64_t n) {
    for (int64_t i = 0; i < n; i += TT_WIDTH)
        store_at(to, i, n, load_at(to, i, n, TT_FLOAT32, 0.0f) + load_at(more, i, n, TT_FLOAT32, 0.0f), TT_FLOAT32);
}

/* Returns 0, or 1 when there is no memory. */
TT_API int32_t tt_decode(const decode_step *s) {
    int64_t longest = 0, wide = s->heads * s->dim;
    for (int64_t r = 0; r < s->rows; r++) longest = s->positions[r] + 1 > longest ? s->positions[r] + 1 : longest;
    if (s->hidden > wide) wide = s->hidden;
    if (s->inner > wide) wide = s->inner;
    int64_t block = s->rows * wide, scores = s->rows * s->heads * longest;
    float *memory = (float *)malloc((size_t)(7 * block + scores) * sizeof(float));
    skinny_scratch scratch = {0};
    if (!memory || !skinny_take(&scratch, s->rows, wide)) {
        free(memory);
        return 1;
    }
    float *normed = memory, *q = normed + block, *k = q + block, *v = k + block, *mixed = v + block;
    float *gate = mixed + block, *up = gate + block;
    for (int64_t l = 0; l < s->count; l++) {
        const decode_layer *layer = s->layers + l;
        decode_attention a = {s, layer, q, k, v, mixed, up + block, longest};
        decode_norm(s, layer, 0, s->x, normed, s->rows, s->hidden);
        skinny(&layer->q, normed, q, s->rows, s->dtype, &scratch);
        skinny(&layer->k, normed, k, s->rows, s->dtype, &scratch);
        skinny(&layer->v, normed, v, s->rows, s->dtype, &scratch);
        decode_mix(&a);
        skinny(&layer->o, mixed, normed, s->rows, s->dtype, &scratch);
        decode_plus(s->x, normed, s->rows * s->hidden);
        decode_norm(s, layer, 1, s->x, normed, s->rows, s->hidden);
        skinny(&layer->gate, normed, gate, s->rows, s->dtype, &scratch);
        skinny(&layer->up, normed, up, s->rows, s->dtype, &scratch);
        decode_gate(gate, up, s->rows * s->inner, s->kind);
        skinny(&layer->down, gate, normed, s->rows, s->dtype, &scratch);
        decode_plus(s->x, normed, s->rows * s->hidden);
    }
    free(memory);
    skinny_give(&scratch);
    return 0;
}

#endif
