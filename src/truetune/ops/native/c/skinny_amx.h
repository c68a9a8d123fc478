/* A few rows times a large bfloat16 weight on the tile unit: the weight is the left factor, read as it lies in memory,
 * and the rows, at most 16 at a time, are the right one. */
#ifndef TT_SKINNY_AMX_H
#define TT_SKINNY_AMX_H

#include "amx.h"

#ifdef TT_AMX

#define SKINNY_ROWS 16
#define SKINNY_OUTS 64 /* of a unit of work: four tiles of sums */

typedef struct {
    const uint16_t *weight; /* [out][in] */
    const uint32_t *pairs;  /* [in / 2][SKINNY_ROWS] */
    float *y;               /* [rows][out] */
    int64_t in, out, rows;
} skinny_tiles;

static int skinny_amx_takes(int64_t in, int64_t out) { return in % 32 == 0 && out % 16 == 0 && amx_is_allowed(); }

/* pairs[i / 2][row] of x [rows][in]; rows that are not there are zero. */
static void skinny_pair(uint32_t *pairs, const uint16_t *x, int64_t rows, int64_t in) {
    const uint32_t *from = (const uint32_t *)x;
    memset(pairs, 0, (size_t)(in / 2 * SKINNY_ROWS) * sizeof(uint32_t));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < in / 2; i++) pairs[i * SKINNY_ROWS + r] = from[r * (in / 2) + i];
}

static void skinny_amx_task(void *context, int64_t task) {
    const skinny_tiles *c = (const skinny_tiles *)context;
    int64_t from = task * SKINNY_OUTS, in = c->in;
    int64_t left = c->out - from;
    const uint16_t *w = c->weight + from * in;
    float sums[SKINNY_OUTS * SKINNY_ROWS];
    amx_open();
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (left >= SKINNY_OUTS) {
        left = SKINNY_OUTS;
        for (int64_t i = 0; i < in; i += 32) {
            _tile_loadd(7, c->pairs + i / 2 * SKINNY_ROWS, 4 * SKINNY_ROWS);
            _tile_loadd(4, w + i, 2 * in);
            _tile_loadd(5, w + 16 * in + i, 2 * in);
            _tile_loadd(6, w + 32 * in + i, 2 * in);
            _tile_dpbf16ps(0, 4, 7);
            _tile_loadd(4, w + 48 * in + i, 2 * in);
            _tile_dpbf16ps(1, 5, 7);
            _tile_dpbf16ps(2, 6, 7);
            _tile_dpbf16ps(3, 4, 7);
        }
    } else {
        for (int64_t i = 0; i < in; i += 32) {
            _tile_loadd(7, c->pairs + i / 2 * SKINNY_ROWS, 4 * SKINNY_ROWS);
            _tile_loadd(4, w + i, 2 * in);
            _tile_dpbf16ps(0, 4, 7);
            if (left > 16) {
                _tile_loadd(5, w + 16 * in + i, 2 * in);
                _tile_dpbf16ps(1, 5, 7);
            }
            if (left > 32) {
                _tile_loadd(6, w + 32 * in + i, 2 * in);
                _tile_dpbf16ps(2, 6, 7);
            }
        }
    }
    _tile_stored(0, sums, 4 * SKINNY_ROWS);
    _tile_stored(1, sums + 16 * SKINNY_ROWS, 4 * SKINNY_ROWS);
    _tile_stored(2, sums + 32 * SKINNY_ROWS, 4 * SKINNY_ROWS);
    _tile_stored(3, sums + 48 * SKINNY_ROWS, 4 * SKINNY_ROWS);
    __asm__ volatile("" ::: "memory");
    amx_close();
    for (int64_t r = 0; r < c->rows; r++)
        for (int64_t o = 0; o < left; o++) c->y[r * c->out + from + o] = sums[o * SKINNY_ROWS + r];
}

/* Returns 0 where there is no memory for the pairs. */
static int skinny_amx(const uint16_t *weight, const uint16_t *x, float *y, int64_t rows, int64_t in, int64_t out) {
    uint32_t *pairs = (uint32_t *)aligned_alloc(64, (size_t)(in / 2 * SKINNY_ROWS) * sizeof(uint32_t));
    if (!pairs) return 0;
    for (int64_t r = 0; r < rows; r += SKINNY_ROWS) {
        int64_t now = rows - r < SKINNY_ROWS ? rows - r : SKINNY_ROWS;
        skinny_tiles work = {weight, pairs, y + r * out, in, out, now};
        skinny_pair(pairs, x + r * in, now, in);
        tt_parallel((out + SKINNY_OUTS - 1) / SKINNY_OUTS, skinny_amx_task, &work);
    }
    free(pairs);
    return 1;
}

#endif
#endif
