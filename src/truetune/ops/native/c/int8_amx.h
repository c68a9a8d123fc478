/* Products with int8 codes on the tile unit (AMX), without a dense copy of the weight.
 *
 * A unit of work is some columns of the result. It packs a piece of their codes into the thread's cache, runs all rows
 * past it, 32 x 32 results at a time, and goes on to the next piece of the depth; sums in between stay in its cache.
 */
#ifndef TT_INT8_AMX_H
#define TT_INT8_AMX_H

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <cpuid.h>

#include "int8_tiles.h"

#define INT8_STEPS 18   /* of a piece at most: 36 KiB of a left block, which stay in the first cache */
#define INT8_WIDTH 320  /* columns of a unit at most: 360 KiB of a piece */
#define INT8_HEIGHT 768 /* rows of a unit at most: 960 KiB of sums beside them in the second cache */

static int64_t int8_step_of(const int8_sum *s) { return s->kind == INT8_ALL ? 64 : 32; }
static int64_t int8_steps_of(const int8_sum *s) { return int8_count(s->depth, int8_step_of(s)); }

static void int8_pack(const int8_product *c, const int8_sum *s, int8_area u, int64_t from, int64_t depth, char *right,
                      int64_t apart) {
    if (s->kind == INT8_TURNED) {
        int8_pack_columns(right, apart, c->codes + from * c->in + u.column, c->in, depth, u.columns);
        return;
    }
    for (int64_t j = 0; j < u.columns; j += INT8_SIDE, right += apart) {
        const int8_t *codes = c->codes + (u.column + j) * c->in;
        int64_t rows = smaller(INT8_SIDE, u.columns - j);
        if (s->kind == INT8_ALL)
            int8_pack_rows(right, codes + from, c->in, rows, depth);
        else
            int8_pack_chosen(right, codes, c->in, rows, s->chosen + from, depth);
    }
}

/* One piece of a sum for all rows of a unit, which is finished if there are factors and this is the last. */
typedef struct {
    int64_t first, steps; /* of the depth */
    int last;
    char *right, *to;
    const char *chosen;
    const float *factors;
} int8_piece;

TT_INLINE void int8_run(const int8_product *c, const int8_sum *s, int8_area u, int8_piece p, const int codes) {
    int64_t panels = int8_count(u.columns, INT8_SIDE), part = int8_steps_of(s) * INT8_STEP;
    int64_t block = part * s->parts, across = panels * INT8_RESULTS;
    int whole = p.last && p.first == 0; /* then no sum has to wait for another piece */
    for (int64_t i = 0; i < u.rows; i += INT8_SIDE) {
        const char *left = s->left + (u.row + i) / INT8_SIDE * block + p.first * INT8_STEP;
        char *to = p.to + (whole ? 0 : i / INT8_SIDE * across);
        for (int64_t j = 0; j < panels; j++)
            int8_results(to + j * INT8_RESULTS, left, part, s->parts, p.right + j * p.steps * INT8_STEP, p.steps,
                         p.first > 0, left + block + j * p.steps * 256, codes);
        int8_area row = {u.row + i, smaller(INT8_SIDE, u.rows - i), u.column, u.columns};
        if (p.last) int8_finish(c, row, to, p.chosen ? p.chosen + i / INT8_SIDE * across : 0, p.factors);
    }
}

static void int8_add_up(const int8_product *c, const int8_sum *s, int8_area u, int8_piece p, int finish) {
    int64_t step = int8_step_of(s), all = int8_steps_of(s);
    int64_t most = int8_count(all, int8_count(all, INT8_STEPS));
    for (p.first = 0; p.first < all; p.first += most) {
        p.steps = smaller(most, all - p.first);
        p.last = finish && p.first + p.steps == all;
        int64_t from = p.first * step, depth = smaller(p.steps * step, s->depth - from);
        int8_pack(c, s, u, from, depth, p.right, p.steps * INT8_STEP);
        if (s->kind == INT8_ALL)
            int8_run(c, s, u, p, 1);
        else
            int8_run(c, s, u, p, 0);
    }
}

/* Scratch of a unit: panels, the columns' factors, sums, and sums of what was chosen. */
static int64_t int8_panel_bytes(const int8_product *c) { return c->width * 64 * INT8_STEPS; }
static int64_t int8_sum_bytes(const int8_product *c, const int8_sum *s, int finish) {
    return c->width * 4 * (finish && int8_steps_of(s) <= INT8_STEPS ? INT8_SIDE : c->height);
}

static void int8_work(void *context, int64_t worker) {
    int8_product *c = (int8_product *)context;
    int64_t across = int8_count(c->columns, c->width), units = across * int8_count(c->rows, c->height);
    char *right = c->scratch + worker * c->bytes;
    float *factors = (float *)(right + int8_panel_bytes(c));
    char *to = (char *)(factors + c->width), *chosen = to + int8_sum_bytes(c, &c->sum, 1);
    amx_open();
    for (;;) {
        int64_t unit = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED);
        if (unit >= units) break;
        int64_t row = unit / across * c->height, column = unit % across * c->width;
        int8_area u = {row, smaller(c->height, c->rows - row), column, smaller(c->width, c->columns - column)};
        for (int64_t j = 0; j < c->width; j++)
            factors[j] = c->right_scale && j < u.columns ? c->right_scale[column + j] * (1.0f / 127.0f) : 0.0f;
        int8_piece p = {.right = right, .to = chosen};
        if (c->chosen.depth) int8_add_up(c, &c->chosen, u, p, 0);
        p = (int8_piece){.right = right, .to = to, .chosen = c->chosen.depth ? chosen : 0, .factors = factors};
        int8_add_up(c, &c->sum, u, p, 1);
    }
    amx_close();
}

/* Units of about one size, so many that each worker has as many; returns the bytes of scratch for all workers. */
static int64_t int8_plan(int8_product *c, int64_t workers) {
    int64_t across = round_up(int8_count(c->columns, INT8_WIDTH), workers), down = int8_count(c->rows, INT8_HEIGHT);
    c->width = round_up(int8_count(c->columns, across), INT8_SIDE);
    c->height = round_up(int8_count(c->rows, down), INT8_SIDE);
    c->bytes = int8_panel_bytes(c) + 4 * c->width + int8_sum_bytes(c, &c->sum, 1);
    if (c->chosen.depth) c->bytes += int8_sum_bytes(c, &c->chosen, 0);
    return workers * c->bytes;
}

/* Whether there is the tile unit, and this process may use it for codes. */
TT_API int32_t tt_int8_tiles(void) {
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 25 & 1u && amx_is_allowed();
}

TT_API void tt_int8_lay(const void *values, const float *scale, char *blocks, int64_t rows, int64_t depth,
                        int32_t dtype) {
    tt_int8_lay_args c = {values, scale, blocks, rows, depth, dtype};
    tt_parallel(int8_count(rows, INT8_SIDE), int8_lay_task, &c);
}

/* What Python hands over; see ops/native/int8.py, which mirrors it. */
typedef struct {
    const char *left;          /* blocks of codes [rows][in], as tt_int8_quantize makes them, or of [rows][out] */
    const char *values;        /* blocks [rows][outliers], as tt_int8_lay makes them */
    const int8_t *codes;       /* [out][in] */
    const int64_t *outliers;   /* columns of the codes */
    const float *left_scale, *right_scale, *bias; /* null, all three, for the product with the codes turned */
    void *result;              /* [rows][out], or [rows][in] */
    char *scratch;
    int64_t rows, in, out, outlier_count;
    int32_t dtype, add, workers;
} tt_int8_call;

/* Computes the product. Without scratch it only answers how many bytes of it there have to be. */
TT_API int64_t tt_int8_product(const tt_int8_call *a) {
    int32_t turned = a->left_scale == 0, parts = int8_parts(a->dtype);
    int8_product c = {
        .sum = {a->left, turned ? a->out : a->in, 0, turned ? INT8_TURNED : INT8_ALL, turned ? parts : 1},
        .chosen = {a->values, a->outlier_count, a->outliers, INT8_CHOSEN, parts},
        .codes = a->codes, .in = a->in, .rows = a->rows, .columns = turned ? a->in : a->out,
        .left_scale = a->left_scale, .right_scale = a->right_scale, .bias = a->bias,
        .out = a->result, .dtype = a->dtype, .add = a->add, .scratch = a->scratch,
    };
    int64_t bytes = int8_plan(&c, a->workers);
    if (c.scratch) tt_parallel(a->workers, int8_work, &c);
    return bytes;
}

#else
TT_API int32_t tt_int8_tiles(void) { return 0; }
#endif
#endif
