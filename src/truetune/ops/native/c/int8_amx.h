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

/* A piece of the sum, for all rows of a unit. */
typedef struct {
    int64_t first, steps; /* of the depth */
    char *right, *to;     /* panels; sums */
    char *beside, *apart; /* panels of what was chosen; its sums, for one row of blocks */
    float *factors;       /* of the unit's columns */
} int8_piece;

TT_INLINE void int8_across(const int8_sum *s, int64_t row, int64_t panels, int64_t first, int64_t steps, int add,
                           const char *right, char *to, const int codes) {
    int64_t part = int8_steps_of(s) * INT8_STEP, block = part * s->parts;
    const char *left = s->left + row / INT8_SIDE * block + first * INT8_STEP, *next = left + block;
    for (int64_t j = 0; j < panels; j++, right += steps * INT8_STEP, to += INT8_RESULTS, next += steps * 256)
        int8_results(to, left, part, s->parts, right, steps, add, next, codes);
}

static void int8_run(const int8_product *c, int8_area u, int8_piece p) {
    int64_t panels = int8_count(u.columns, INT8_SIDE), across = panels * INT8_RESULTS;
    int64_t all = int8_steps_of(&c->sum), beside = int8_steps_of(&c->chosen);
    int last = p.first + p.steps == all;
    for (int64_t i = 0; i < u.rows; i += INT8_SIDE) {
        char *to = p.to + (p.steps < all ? i / INT8_SIDE * across : 0); /* one piece: no sum waits for another */
        if (c->sum.kind == INT8_ALL)
            int8_across(&c->sum, u.row + i, panels, p.first, p.steps, p.first > 0, p.right, to, 1);
        else
            int8_across(&c->sum, u.row + i, panels, p.first, p.steps, p.first > 0, p.right, to, 0);
        if (!last) continue;
        if (beside) int8_across(&c->chosen, u.row + i, panels, 0, beside, 0, p.beside, p.apart, 0);
        int8_area row = {u.row + i, smaller(INT8_SIDE, u.rows - i), u.column, u.columns};
        int8_finish(c, row, to, beside ? p.apart : 0, p.factors);
    }
}

static void int8_unit(const int8_product *c, int8_area u, int8_piece p) {
    int64_t step = int8_step_of(&c->sum), all = int8_steps_of(&c->sum), beside = int8_steps_of(&c->chosen);
    int64_t most = int8_count(all, int8_count(all, INT8_STEPS));
    for (int64_t j = 0; j < c->width; j++)
        p.factors[j] = c->right_scale && j < u.columns ? c->right_scale[u.column + j] * (1.0f / 127.0f) : 0.0f;
    int8_pack(c, &c->chosen, u, 0, c->chosen.depth, p.beside, beside * INT8_STEP);
    for (p.first = 0; p.first < all; p.first += most) {
        p.steps = smaller(most, all - p.first);
        int64_t from = p.first * step, depth = smaller(p.steps * step, c->sum.depth - from);
        int8_pack(c, &c->sum, u, from, depth, p.right, p.steps * INT8_STEP);
        int8_run(c, u, p);
    }
}

/* Scratch of a worker, in this order: panels, the columns' factors, sums, panels and sums of what was chosen. */
static int64_t int8_bytes(const int8_product *c, int64_t offsets[4]) {
    int64_t rows = int8_steps_of(&c->sum) <= INT8_STEPS ? INT8_SIDE : c->height, beside = int8_steps_of(&c->chosen);
    offsets[0] = c->width * 64 * INT8_STEPS;
    offsets[1] = offsets[0] + c->width * 4;
    offsets[2] = offsets[1] + c->width * 4 * rows;
    offsets[3] = offsets[2] + c->width * 64 * beside;
    return offsets[3] + (beside ? c->width * 4 * INT8_SIDE : 0);
}

static void int8_work(void *context, int64_t worker) {
    int8_product *c = (int8_product *)context;
    int64_t across = int8_count(c->columns, c->width), units = across * int8_count(c->rows, c->height), offsets[4];
    char *at = c->scratch + worker * int8_bytes(c, offsets);
    int8_piece p = {.right = at, .factors = (float *)(at + offsets[0]), .to = at + offsets[1],
                    .beside = at + offsets[2], .apart = at + offsets[3]};
    amx_open();
    for (;;) {
        int64_t unit = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED);
        if (unit >= units) break;
        int64_t row = unit / across * c->height, column = unit % across * c->width;
        int8_area u = {row, smaller(c->height, c->rows - row), column, smaller(c->width, c->columns - column)};
        int8_unit(c, u, p);
    }
    amx_close();
}

/* Units of about one size, so many that each worker has as many; returns the bytes of scratch for all workers. */
static int64_t int8_plan(int8_product *c, int64_t workers) {
    int64_t across = round_up(int8_count(c->columns, INT8_WIDTH), workers), down = int8_count(c->rows, INT8_HEIGHT);
    int64_t offsets[4];
    c->width = round_up(int8_count(c->columns, across), INT8_SIDE);
    c->height = round_up(int8_count(c->rows, down), INT8_SIDE);
    return workers * int8_bytes(c, offsets);
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
