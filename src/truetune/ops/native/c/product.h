/* Small matrix products out of cache, blocked over registers, and their use along a causal band.
 *
 * One routine serves all five products of attention: the left factor is read one value at a time and may be transposed
 * by its strides, the right one in whole vectors. TT_ROWS x TT_PANEL sums stay in registers.
 */
#ifndef TT_PRODUCT_H
#define TT_PRODUCT_H

#include "simd.h"

#if TT_WIDTH == 16 || defined(__aarch64__)
#define TT_VECTORS 4 /* of 32 registers: 16 sums, 4 vectors of the right factor, one value of the left */
#else
#define TT_VECTORS 2
#endif
#define TT_ROWS 4
#define TT_PANEL (TT_VECTORS * TT_WIDTH)

static inline int64_t round_down(int64_t n, int64_t step) { return n / step * step; }
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* A left factor: element (i, p) is at[i * row + p * step]. */
typedef struct {
    const float *at;
    int64_t row, step;
} left_factor;

/* to[TT_ROWS][vectors] = or += left [TT_ROWS][depth] right [depth][vectors]; `vectors` is a constant at every call.
 * What is there is added last: sums of short sums lose fewer bits than one long sum. */
static inline __attribute__((always_inline)) void product_of(const int vectors, int64_t depth, left_factor left,
                                                             const float *right, int64_t right_row, float *to,
                                                             int64_t to_row, int add) {
    vf sum[TT_ROWS][TT_VECTORS];
    for (int i = 0; i < TT_ROWS; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = vf_set(0.0f);
    for (int64_t p = 0; p < depth; p++) {
        vf row[TT_VECTORS];
        for (int j = 0; j < vectors; j++) row[j] = vf_load(right + p * right_row + j * TT_WIDTH);
        for (int i = 0; i < TT_ROWS; i++) {
            vf value = vf_set(left.at[i * left.row + p * left.step]);
            for (int j = 0; j < vectors; j++) sum[i][j] += value * row[j];
        }
    }
    for (int i = 0; i < TT_ROWS; i++)
        for (int j = 0; j < vectors; j++) {
            float *at = to + i * to_row + j * TT_WIDTH;
            vf_store(at, add ? vf_load(at) + sum[i][j] : sum[i][j]);
        }
}

/* The same for `columns` up to TT_PANEL, a multiple of TT_WIDTH. */
static void product(int64_t columns, int64_t depth, left_factor left, const float *right, int64_t right_row, float *to,
                    int64_t to_row, int add) {
    switch (columns / TT_WIDTH) {
    case 1: product_of(1, depth, left, right, right_row, to, to_row, add); break;
    case 2: product_of(2, depth, left, right, right_row, to, to_row, add); break;
#if TT_VECTORS == 4
    case 3: product_of(3, depth, left, right, right_row, to, to_row, add); break;
    case 4: product_of(4, depth, left, right, right_row, to, to_row, add); break;
#endif
    }
}

/* A tile of the scores: queries [query, query_end) by keys [key, key_end), both counted from the segment's start or
 * from a common later point. Query i sees keys (i - window, i]. query is a multiple of TT_ROWS, key of TT_PANEL. */
typedef struct {
    int64_t query, query_end, key, key_end, window;
} band;

typedef struct {
    int64_t from, to;
} span;

/* The keys of the tile that count for queries [i, i + TT_ROWS): all that one of them sees, and so many before (their
 * scores become zero) that a block of TT_ROWS keys is either whole or not needed at all. */
static inline span keys_of(band b, int64_t i) {
    return (span){larger(b.key, i - b.window + 2 - TT_ROWS), smaller(b.key_end, i + TT_ROWS)};
}

/* The queries of the tile that see one of the keys [j, j + TT_ROWS). */
static inline span queries_of(band b, int64_t j) {
    return (span){larger(b.query, j), smaller(b.query_end, j + TT_ROWS - 1 + b.window)};
}

/* Where the scores of queries [i, i + TT_ROWS) are stored: their keys in whole vectors. */
static inline span columns_of(band b, int64_t i) {
    span keys = keys_of(b, i);
    return (span){round_down(keys.from, TT_WIDTH), round_up(keys.to, TT_WIDTH)};
}

/* Lanes of the keys [j, j + TT_WIDTH) that query i sees. */
static inline vi seen_lanes(band b, int64_t i, int64_t j) {
    vi ago = (int32_t)(i - j) - TT_LANES;
    return (ago >= 0) & (ago < (int32_t)b.window);
}

/* Whether each of the queries [i, i + TT_ROWS) sees all of the keys [j, j + TT_WIDTH). */
static inline int is_whole(band b, int64_t i, int64_t j) {
    return j + TT_WIDTH <= i + 1 && j > i + TT_ROWS - 1 - b.window;
}

/* scores[query][key] = rows[query] . columns[key], for the keys that count.
 * rows: [tile][dim]; panels: for each TT_PANEL keys, [dim][TT_PANEL]; scores: [tile][row]. */
static void band_scores(band b, int64_t dim, const float *rows, const float *panels, float *scores, int64_t row) {
    for (int64_t c = b.key; c < b.key_end; c += TT_PANEL)
        for (int64_t i = b.query; i < b.query_end; i += TT_ROWS) {
            span seen = columns_of(b, i);
            int64_t from = larger(seen.from, c), to = smaller(seen.to, c + TT_PANEL);
            if (from >= to) continue;
            left_factor left = {rows + (i - b.query) * dim, dim, 1};
            product(to - from, dim, left, panels + c * dim + from - c, TT_PANEL,
                    scores + (i - b.query) * row + from - b.key, row, 0);
        }
}

/* to[query] += sum over keys of weights[query][key] values[key]. weights: [tile][row]; values, to: [..][dim]. */
static void band_gather(band b, int64_t dim, const float *weights, int64_t row, const float *values, float *to) {
    for (int64_t c = 0; c < dim; c += TT_PANEL)
        for (int64_t i = b.query; i < b.query_end; i += TT_ROWS) {
            span keys = keys_of(b, i);
            if (keys.from >= keys.to) continue;
            left_factor left = {weights + (i - b.query) * row + keys.from - b.key, row, 1};
            product(smaller(TT_PANEL, dim - c), keys.to - keys.from, left, values + keys.from * dim + c, dim,
                    to + (i - b.query) * dim + c, dim, 1);
        }
}

/* to[key] += sum over queries of weights[query][key] rows[query]. weights: [tile][row]; rows: [tile][dim]. */
static void band_scatter(band b, int64_t dim, const float *weights, int64_t row, const float *rows, float *to) {
    for (int64_t c = 0; c < dim; c += TT_PANEL)
        for (int64_t j = b.key; j < b.key_end; j += TT_ROWS) {
            span queries = queries_of(b, j);
            if (queries.from >= queries.to) continue;
            int64_t first = queries.from - b.query;
            left_factor left = {weights + first * row + j - b.key, 1, row};
            product(smaller(TT_PANEL, dim - c), queries.to - queries.from, left, rows + first * dim + c, dim,
                    to + j * dim + c, dim, 1);
        }
}

#endif
