/* Dropout whose mask is a function of counters: (key of the row, site, column). */
#ifndef TT_DROPOUT_H
#define TT_DROPOUT_H

#include "rows.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the two 16-bit lanes of a hash are read in memory order"
#endif

typedef struct {
    const void *x;
    void *out;
    const int64_t *keys;
    int64_t rows, n;
    int32_t dtype, threshold;
    uint32_t site;
    float scale;
} tt_dropout_args;

/* lowbias32 by C. Wellons ("Prospecting for hash functions", 2018): every output bit depends on all input bits. */
static uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* A row enters as two words, one before and one amid the mixing: 64 bits, so that rows do not repeat each other. */
static inline void dropout_seeds(int64_t key, uint32_t site, uint32_t *first, uint32_t *second) {
    uint32_t low = (uint32_t)key, high = (uint32_t)((uint64_t)key >> 32);
    *first = mixed(mixed(mixed(site) + low) + high);
    *second = mixed(mixed(mixed(~site) + high) + low);
}

/* Of pairs of columns, with their row's first word added. */
static inline vu dropout_hash(vu pair, uint32_t second) {
    vu hash = (pair ^ (pair >> 16)) * 0x7feb352du + second;
    hash = (hash ^ (hash >> 15)) * 0x846ca68bu;
    return hash ^ (hash >> 16);
}

/* Element (row, column) is kept where its lane, 16 bits of the hash of (row, column / 2), reaches the threshold. */
TT_INLINE void dropout_row(tt_dropout_args c, int64_t row, int dtype) {
    const void *x = at_row(c.x, row, c.n, dtype);
    void *y = at_row(c.out, row, c.n, dtype);
    uint32_t first, second;
    dropout_seeds(c.keys[row], c.site, &first, &second);
    vu pair = (vu)TT_LANES + first;
    for (int64_t i = 0; i < c.n; i += 2 * TT_WIDTH, pair += TT_WIDTH) {
        vu hash = dropout_hash(pair, second);
        uint16_t lanes[2 * TT_WIDTH];
        memcpy(lanes, &hash, sizeof lanes);
        for (int64_t j = i; j < i + 2 * TT_WIDTH && j < c.n; j += TT_WIDTH) {
            vh lane;
            memcpy(&lane, lanes + (j - i), sizeof lane);
            vi kept = __builtin_convertvector(lane, vi) >= c.threshold;
            vf factor = vf_select(kept, vf_set(c.scale), vf_set(0.0f));
            store_at(y, j, c.n, load_at(x, j, c.n, dtype, 0.0f) * factor, dtype);
        }
    }
}

static void dropout_task(void *context, int64_t task) {
    const tt_dropout_args *c = (const tt_dropout_args *)context;
    TT_EACH_ROW(c, task, row) {
        if (c->dtype == TT_FLOAT32)
            dropout_row(*c, row, TT_FLOAT32);
        else
            dropout_row(*c, row, TT_BFLOAT16);
    }
}

TT_API void tt_dropout(const void *x, const int64_t *keys, void *out, int64_t rows, int64_t n, int32_t dtype,
                       int32_t threshold, uint32_t site, float scale) {
    tt_dropout_args c = {x, out, keys, rows, n, dtype, threshold, site, scale};
    tt_parallel(tasks_of(rows, n), dropout_task, &c);
}

#endif
