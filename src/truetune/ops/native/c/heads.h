/* Heads in and out of attention: tokens from tensors into float32 rows, turned by their rotary angle if there is one.
 *
 * Rotary positions: Su et al. 2021, arXiv:2104.09864, in the form where dimension i turns with dimension
 * i + rotary / 2. Turning a row while it is loaded costs a few loads, and no turned copy is ever stored.
 */
#ifndef TT_HEADS_H
#define TT_HEADS_H

#include <stdlib.h>

#include "product.h"

#define TT_MAX_DIM 256

/* What Python hands over, both ways; see ops/native/attention.py, which mirrors it. */
typedef struct {
    const void *q, *k, *v;  /* [tokens, heads or kv_heads, dim], tokens apart by their stride */
    void *out;              /* [tokens, heads, dim], dense */
    float *lse;             /* [heads, tokens]: log of the sum of e^score */
    const void *dout;       /* the rest: backward only; the gradients are dense */
    void *dq, *dk, *dv;
    const void *cos, *sin;  /* [tokens, rotary], dense, or null */
    const int32_t *edges;   /* [segments + 1], rising from 0 to tokens */
    int64_t q_stride, k_stride, v_stride, dout_stride;
    int32_t segments, heads, kv_heads, dim, rotary;
    int32_t window;         /* 0: none */
    int32_t dtype, rotary_dtype;
    float scale, softcap;   /* softcap 0: none */
} tt_attention;

static inline int64_t group_of(const tt_attention *a) { return a->heads / a->kv_heads; }
static inline int64_t tokens_of(const tt_attention *a) { return a->edges[a->segments]; }
static inline int64_t window_of(const tt_attention *a) { return a->window > 0 ? a->window : INT32_MAX; }

/* Rows in scratch are padded with zeros to whole vectors. */
static inline int64_t padded_dim(const tt_attention *a) { return round_up(a->dim, TT_WIDTH); }

/* Scratch of one task, cut into arrays that each start on a cache line. */
typedef struct {
    void *memory;
    char *next;
} arena;

#define TT_LINE 64

static int arena_open(arena *s, int64_t bytes, int64_t arrays) {
    s->memory = malloc((size_t)(bytes + TT_LINE * (arrays + 1)));
    s->next = (char *)(((uintptr_t)s->memory + TT_LINE - 1) & ~(uintptr_t)(TT_LINE - 1));
    return s->memory != 0;
}

static void *arena_take(arena *s, int64_t bytes) {
    void *taken = s->next;
    s->next += round_up(bytes, TT_LINE);
    return taken;
}

static float *take_floats(arena *s, int64_t count) { return (float *)arena_take(s, 4 * count); }

/* Some tokens of a segment, as a task sees them: positions count from `start`. */
typedef struct {
    const tt_attention *a;
    int64_t start;
    const float *cos, *sin; /* [positions][rotary], or null */
} stretch;

static int64_t stretch_bytes(const tt_attention *a, int64_t count) { return a->cos ? 8 * count * a->rotary : 0; }

/* The stretch [start, start + count), with its angles as float32 in the arena. */
static stretch stretch_from(const tt_attention *a, arena *scratch, int64_t start, int64_t count) {
    stretch s = {a, start, 0, 0};
    if (!a->cos) return s;
    int64_t values = count * a->rotary, offset = start * a->rotary * element_size(a->rotary_dtype);
    float *cos = take_floats(scratch, values), *sin = take_floats(scratch, values);
    load_row(cos, (const char *)a->cos + offset, values, a->rotary_dtype);
    load_row(sin, (const char *)a->sin + offset, values, a->rotary_dtype);
    s.cos = cos;
    s.sin = sin;
    return s;
}

/* low, high = low cos - high sin, high cos + low sin. */
static void turn(float *restrict low, float *restrict high, const float *restrict cos, const float *restrict sin,
                 int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float x = low[i], y = high[i];
        low[i] = x * cos[i] - y * sin[i];
        high[i] = y * cos[i + half] + x * sin[i + half];
    }
}

/* The transpose of that, for gradients. */
static void turn_back(float *restrict low, float *restrict high, const float *restrict cos, const float *restrict sin,
                      int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float x = low[i], y = high[i];
        low[i] = x * cos[i] + y * sin[i + half];
        high[i] = y * cos[i + half] - x * sin[i];
    }
}

/* A head's rows are too far apart for the CPU to guess the next: asks for the one that is wanted eight tokens on. */
static inline void prefetch_row(const void *row, int64_t stride, const tt_attention *a) {
    int64_t size = element_size(a->dtype);
    const char *wanted = (const char *)row + 8 * stride * size;
    for (int64_t at = 0; at < a->dim * size; at += TT_LINE) __builtin_prefetch(wanted + at);
}

/* One head of the token at `position` as float32, padded. */
static inline void load_head(const stretch *s, float *row, const void *base, int64_t stride, int64_t position,
                             int64_t head) {
    const tt_attention *a = s->a;
    const char *from = (const char *)base + ((s->start + position) * stride + head * a->dim) * element_size(a->dtype);
    prefetch_row(from, stride, a);
    load_row(row, from, a->dim, a->dtype);
    for (int64_t i = a->dim; i < padded_dim(a); i++) row[i] = 0.0f;
}

/* The same, turned by the token's angle and scaled. */
static inline void load_turned(const stretch *s, float *row, const void *base, int64_t stride, int64_t position,
                               int64_t head, float scale) {
    int64_t rotary = s->a->rotary;
    load_head(s, row, base, stride, position, head);
    if (s->cos) turn(row, row + rotary / 2, s->cos + position * rotary, s->sin + position * rotary, rotary / 2);
    for (int64_t i = 0; i < padded_dim(s->a); i++) row[i] *= scale;
}

/* One head of a token into a dense [tokens, heads, dim], scaled; `row` is overwritten. */
static inline void store_head(const stretch *s, void *base, int64_t heads, int64_t position, int64_t head, float *row,
                              float scale) {
    const tt_attention *a = s->a;
    int64_t at = ((s->start + position) * heads + head) * a->dim;
    for (int64_t i = 0; i < padded_dim(a); i++) row[i] *= scale;
    store_row((char *)base + at * element_size(a->dtype), row, a->dim, a->dtype);
}

/* The same for a gradient of what load_turned gave. */
static inline void store_turned(const stretch *s, void *base, int64_t heads, int64_t position, int64_t head, float *row,
                                float scale) {
    int64_t rotary = s->a->rotary;
    if (s->cos) turn_back(row, row + rotary / 2, s->cos + position * rotary, s->sin + position * rotary, rotary / 2);
    store_head(s, base, heads, position, head, row, scale);
}

/* panels: for each TT_PANEL of the `count` rows, [dim][TT_PANEL]; what lies beyond the last row becomes zero.
 * rows [..][dim] has room for TT_PANEL rows more than count needs. */
static void to_panels(float *panels, float *rows, int64_t count, int64_t dim) {
    int64_t whole = round_up(count, TT_PANEL);
    memset(rows + count * dim, 0, (size_t)((whole - count) * dim) * sizeof(float));
    for (int64_t j = 0; j < whole; j += TT_WIDTH)
        for (int64_t d = 0; d < dim; d += TT_WIDTH) {
            vf block[TT_WIDTH];
            for (int i = 0; i < TT_WIDTH; i++) block[i] = vf_load(rows + (j + i) * dim + d);
            vf_transpose(block);
            float *to = panels + round_down(j, TT_PANEL) * dim + d * TT_PANEL + j % TT_PANEL;
            for (int i = 0; i < TT_WIDTH; i++) vf_store(to + i * TT_PANEL, block[i]);
        }
}

#endif
