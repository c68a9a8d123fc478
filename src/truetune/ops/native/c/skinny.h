/* Products of a few rows with a large frozen weight, and what adapters add to them (generate/terms.py):
 * y = o * (g * (W (i * x) + B A (i * x)) + b + c), each adapter for its own rows. */
#ifndef TT_SKINNY_H
#define TT_SKINNY_H

#include <stdlib.h>

#include "rows.h"
#include "skinny_amx.h"

typedef struct {
    const void *a, *b, *shift; /* [rank, in], [rank, out] with the scale in it, [out]: of the weight's element type */
    const float *magnitude, *of_input, *of_output;
    int64_t first, end, rank; /* rows first ... end - 1 */
} skinny_term;

typedef struct {
    const void *weight, *bias; /* [out, in], [out] or NULL */
    const skinny_term *terms;
    int64_t in, out, count;
} skinny_map;

typedef struct {
    float *scaled; /* the input times the factors of it */
    uint16_t *low; /* the input in bfloat16 */
    float *h;      /* A x */
} skinny_scratch;

/* Loops of a known few rounds are written out, so that sums stay in registers. */
#define SKINNY_UNROLLED _Pragma("GCC unroll 16")

#define SKINNY_RANK 1024 /* no adapter that is served this way has more */

static int skinny_take(skinny_scratch *s, int64_t rows, int64_t wide) {
    s->scaled = (float *)malloc((size_t)(rows * wide) * sizeof(float));
    s->low = (uint16_t *)malloc((size_t)(rows * wide) * sizeof(uint16_t));
    s->h = (float *)malloc((size_t)(rows * SKINNY_RANK) * sizeof(float));
    if (s->scaled && s->low && s->h) return 1;
    free(s->scaled);
    free(s->low);
    free(s->h);
    return 0;
}

static void skinny_give(skinny_scratch *s) {
    free(s->scaled);
    free(s->low);
    free(s->h);
}

typedef struct {
    const void *weight, *x;
    float *y;
    int64_t in, out, rows, each;
    int32_t dtype;
} skinny_work;

#if TT_WIDTH == 16 && defined(__AVX512BF16__)
#define SKINNY_BF16 1
#else
#define SKINNY_BF16 0
#endif

#if SKINNY_BF16
/* outs x rows sums over products of pairs: each weight is loaded once for all rows of the block. */
TT_INLINE void skinny_pairs(const uint16_t *w, const uint16_t *x, float *y, int64_t in, int64_t out, int outs,
                            int rows) {
    __m512 sums[16];
    SKINNY_UNROLLED for (int i = 0; i < outs * rows; i++) sums[i] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= in; i += 32)
        SKINNY_UNROLLED for (int o = 0; o < outs; o++) {
            __m512bh weight = (__m512bh)_mm512_loadu_si512(w + o * in + i);
            SKINNY_UNROLLED for (int r = 0; r < rows; r++)
                sums[o * rows + r] =
                    _mm512_dpbf16_ps(sums[o * rows + r], weight, (__m512bh)_mm512_loadu_si512(x + r * in + i));
        }
    if (i < in) {
        __mmask32 kept = (__mmask32)((1ull << (in - i)) - 1);
        SKINNY_UNROLLED for (int o = 0; o < outs; o++) {
            __m512bh weight = (__m512bh)_mm512_maskz_loadu_epi16(kept, w + o * in + i);
            SKINNY_UNROLLED for (int r = 0; r < rows; r++)
                sums[o * rows + r] = _mm512_dpbf16_ps(sums[o * rows + r], weight,
                                                      (__m512bh)_mm512_maskz_loadu_epi16(kept, x + r * in + i));
        }
    }
    SKINNY_UNROLLED for (int o = 0; o < outs; o++)
        SKINNY_UNROLLED for (int r = 0; r < rows; r++) y[r * out + o] = vf_sum((vf)sums[o * rows + r]);
}

static void skinny_task_bf16(void *context, int64_t task) {
    const skinny_work *c = (const skinny_work *)context;
    int64_t o = task * c->each, end = o + c->each < c->out ? o + c->each : c->out;
    const uint16_t *w = (const uint16_t *)c->weight, *x = (const uint16_t *)c->x;
    int64_t in = c->in, out = c->out;
    while (o < end) {
        int left = (int)(end - o), outs = c->rows == 1 && left >= 8 ? 8 : left >= 4 && c->rows <= 4 ? 4 : left >= 2 ? 2 : 1;
        for (int64_t r = 0; r < c->rows;) {
            int64_t rest = c->rows - r;
            const uint16_t *from = x + r * in;
            float *to = c->y + r * out + o;
            int rows = rest >= 8 && outs <= 2 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
            switch (outs * 16 + rows) {
                case 8 * 16 + 1: skinny_pairs(w + o * in, from, to, in, out, 8, 1); break;
                case 4 * 16 + 4: skinny_pairs(w + o * in, from, to, in, out, 4, 4); break;
                case 4 * 16 + 2: skinny_pairs(w + o * in, from, to, in, out, 4, 2); break;
                case 4 * 16 + 1: skinny_pairs(w + o * in, from, to, in, out, 4, 1); break;
                case 2 * 16 + 8: skinny_pairs(w + o * in, from, to, in, out, 2, 8); break;
                case 2 * 16 + 4: skinny_pairs(w + o * in, from, to, in, out, 2, 4); break;
                case 2 * 16 + 2: skinny_pairs(w + o * in, from, to, in, out, 2, 2); break;
                case 2 * 16 + 1: skinny_pairs(w + o * in, from, to, in, out, 2, 1); break;
                case 16 + 8: skinny_pairs(w + o * in, from, to, in, out, 1, 8); break;
                case 16 + 4: skinny_pairs(w + o * in, from, to, in, out, 1, 4); break;
                case 16 + 2: skinny_pairs(w + o * in, from, to, in, out, 1, 2); break;
                default: skinny_pairs(w + o * in, from, to, in, out, 1, 1);
            }
            r += rows;
        }
        o += outs;
    }
}
#endif

TT_INLINE void skinny_sums(const char *w, const float *x, float *y, int64_t in, int64_t out, int outs, int rows,
                           int dtype) {
    vf sums[16] = {{0}};
    for (int64_t i = 0; i < in; i += TT_WIDTH)
        SKINNY_UNROLLED for (int o = 0; o < outs; o++) {
            vf weight = load_at(w + o * in * element_size(dtype), i, in, dtype, 0.0f);
            SKINNY_UNROLLED for (int r = 0; r < rows; r++)
                sums[o * rows + r] += weight * load_at(x + r * in, i, in, TT_FLOAT32, 0.0f);
        }
    SKINNY_UNROLLED for (int o = 0; o < outs; o++)
        SKINNY_UNROLLED for (int r = 0; r < rows; r++) y[r * out + o] = vf_sum(sums[o * rows + r]);
}

TT_INLINE void skinny_outs(const skinny_work *c, int64_t task, int dtype) {
    int64_t o = task * c->each, end = o + c->each < c->out ? o + c->each : c->out;
    const float *x = (const float *)c->x;
    while (o < end) {
        const char *w = (const char *)c->weight + o * c->in * element_size(dtype);
        int outs = end - o >= 4 ? 4 : 1;
        for (int64_t r = 0; r < c->rows;) {
            int rows = c->rows - r >= 4 ? 4 : 1;
            const float *from = x + r * c->in;
            float *to = c->y + r * c->out + o;
            switch (outs + rows) {
                case 8: skinny_sums(w, from, to, c->in, c->out, 4, 4, dtype); break;
                case 5:
                    if (outs == 4)
                        skinny_sums(w, from, to, c->in, c->out, 4, 1, dtype);
                    else
                        skinny_sums(w, from, to, c->in, c->out, 1, 4, dtype);
                    break;
                default: skinny_sums(w, from, to, c->in, c->out, 1, 1, dtype);
            }
            r += rows;
        }
        o += outs;
    }
}

static void skinny_task(void *context, int64_t task) {
    const skinny_work *c = (const skinny_work *)context;
    if (c->dtype == TT_FLOAT32)
        skinny_outs(c, task, TT_FLOAT32);
    else
        skinny_outs(c, task, TT_BFLOAT16);
}

/* Rows of x times the transpose of a weight; x is bfloat16 where SKINNY_BF16 and the weight is. */
static void skinny_product(const void *weight, const void *x, float *y, int64_t rows, int64_t in, int64_t out,
                           int32_t dtype) {
#ifdef TT_AMX
    /* For one row as for many: what a row comes to must not depend on how many there are. */
    if (dtype == TT_BFLOAT16 && skinny_amx_takes(in, out) &&
        skinny_amx((const uint16_t *)weight, (const uint16_t *)x, y, rows, in, out))
        return;
#endif
    int64_t each = (rows_per_task(in) + 7) / 8 * 8;
    skinny_work work = {weight, x, y, in, out, rows, each, dtype};
    tt_body body = skinny_task;
#if SKINNY_BF16
    if (dtype == TT_BFLOAT16) body = skinny_task_bf16;
#endif
    tt_parallel((out + each - 1) / each, body, &work);
}

/* y [n] times factors, or plus terms, of one element type. */
TT_INLINE void skinny_each(float *y, const void *by, int64_t n, int dtype, int times) {
    for (int64_t i = 0; i < n; i += TT_WIDTH) {
        vf v = load_at(y, i, n, TT_FLOAT32, 0.0f), w = load_at(by, i, n, dtype, 0.0f);
        store_at(y, i, n, times ? v * w : v + w, TT_FLOAT32);
    }
}

static void skinny_low_rank(const skinny_map *m, const skinny_term *t, const void *x, float *y, int32_t dtype,
                            skinny_scratch *s) {
    int64_t rows = t->end - t->first;
    skinny_product(t->a, x, s->h, rows, m->in, t->rank, dtype);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < t->rank; j++) {
            const char *b = (const char *)t->b + j * m->out * element_size(dtype);
            float h = s->h[r * t->rank + j], *to = y + r * m->out;
            for (int64_t i = 0; i < m->out; i += TT_WIDTH)
                store_at(to, i, m->out,
                         load_at(to, i, m->out, TT_FLOAT32, 0.0f) + h * load_at(b, i, m->out, dtype, 0.0f), TT_FLOAT32);
        }
}

/* x [rows, in] -> y [rows, out], both float32. */
static void skinny(const skinny_map *m, const float *x, float *y, int64_t rows, int32_t dtype, skinny_scratch *s) {
    const float *given = x;
    for (int64_t k = 0; k < m->count; k++)
        if (m->terms[k].of_input && given == x) {
            memcpy(s->scaled, x, (size_t)(rows * m->in) * sizeof(float));
            given = s->scaled;
        }
    for (int64_t k = 0; k < m->count; k++)
        for (int64_t r = m->terms[k].first; m->terms[k].of_input && r < m->terms[k].end; r++)
            skinny_each(s->scaled + r * m->in, m->terms[k].of_input, m->in, TT_FLOAT32, 1);
    const char *input = (const char *)given;
    int64_t size = sizeof(float);
#if SKINNY_BF16
    if (dtype == TT_BFLOAT16) {
        store_row(s->low, given, rows * m->in, TT_BFLOAT16);
        input = (const char *)s->low;
        size = sizeof(uint16_t);
    }
#endif
    skinny_product(m->weight, input, y, rows, m->in, m->out, dtype);
    for (int64_t k = 0; k < m->count; k++) {
        const skinny_term *t = m->terms + k;
        if (t->a) skinny_low_rank(m, t, input + t->first * m->in * size, y + t->first * m->out, dtype, s);
        for (int64_t r = t->first; t->magnitude && r < t->end; r++)
            skinny_each(y + r * m->out, t->magnitude, m->out, TT_FLOAT32, 1);
    }
    for (int64_t r = 0; m->bias && r < rows; r++) skinny_each(y + r * m->out, m->bias, m->out, dtype, 0);
    for (int64_t k = 0; k < m->count; k++) {
        const skinny_term *t = m->terms + k;
        for (int64_t r = t->first; r < t->end; r++) {
            if (t->shift) skinny_each(y + r * m->out, t->shift, m->out, dtype, 0);
            if (t->of_output) skinny_each(y + r * m->out, t->of_output, m->out, TT_FLOAT32, 1);
        }
    }
}

/* x [rows, in] float32 times the transpose of a weight -> y [rows, out] float32. Returns 0, or 1 without memory. */
TT_API int32_t tt_skinny(const skinny_map *m, const float *x, float *y, int64_t rows, int32_t dtype) {
    skinny_scratch scratch = {0};
    if (!skinny_take(&scratch, rows, m->in)) return 1;
    skinny(m, x, y, rows, dtype, &scratch);
    skinny_give(&scratch);
    return 0;
}

#endif
