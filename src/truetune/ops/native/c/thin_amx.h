/* Products with one thin side, a rank, on the tile unit: what a low-rank path costs beside its frozen product.
 *
 * They read much memory for little arithmetic, so each pass over a wide matrix does all that is wanted of it:
 *     down = wide right          [rows][rank]
 *     across = left^T wide       [rank][columns]
 *     wide += left right^T + residual
 * With a dropout mask (dropout.h), wide is multiplied with it in the first two, and left right^T in the third.
 * Sums are formed in float32, and in an order that does not depend on the number of threads.
 */
#ifndef TT_THIN_AMX_H
#define TT_THIN_AMX_H

#include "amx.h"
#include "dropout.h"

#ifdef TT_AMX

#define THIN_RANKS 32 /* of a pass */
#define THIN_UNIT 128 /* rows of a unit of work, a multiple of AMX_BLOCK */

/* What Python hands over; see ops/native/thin.py, which mirrors it. */
typedef struct {
    uint16_t *wide;           /* [rows][columns] */
    const uint16_t *left;     /* [rows][rank], or null */
    const uint16_t *right;    /* [columns][rank], or null */
    const uint16_t *residual; /* [rows][columns], or null */
    uint16_t *down;           /* [rows][rank], its rows down_row apart */
    float *across;            /* [columns][rank] if turned, else [rank][columns] */
    const int64_t *keys;      /* [rows]: of the mask, or null */
    char *scratch;
    int64_t rows, columns, rank, down_row;
    float scale;     /* of across */
    float kept;      /* what the mask multiplies with, where it is not 0 */
    int32_t threshold;
    uint32_t site;
    int32_t turned;
} tt_thin_call;

/* One pass: THIN_RANKS of the ranks at most. */
typedef struct {
    const tt_thin_call *a;
    int64_t first, ranks, padded; /* of the ranks; `padded` to a multiple of 16 */
    int64_t room, depth;          /* columns and rows, to multiples of AMX_BLOCK */
    uint32_t *pairs;              /* right, interleaved along the columns, or along the ranks */
    uint16_t *left;               /* [padded][depth]: left^T */
    float *sums;                  /* [units][padded][room] */
} thin_pass;

static int64_t thin_units(int64_t rows) { return (rows + THIN_UNIT - 1) / THIN_UNIT; }

/* to[index of (row, rank)] = from[row][rank], for the ranks of the pass, where the index is made of these strides. */
TT_INLINE void thin_scatter(const thin_pass *p, uint16_t *to, const uint16_t *from, int64_t rows, int64_t row_pairs,
                            int64_t row_parity, int64_t rank_pairs, int64_t rank_parity) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < p->ranks; k++)
            to[i / 2 * row_pairs + i % 2 * row_parity + k / 2 * rank_pairs + k % 2 * rank_parity] =
                from[i * p->a->rank + p->first + k];
}

/* pairs[column / 2][rank]: a right factor of a sum over the columns. */
static void thin_pair_columns(const thin_pass *p) {
    memset(p->pairs, 0, (size_t)(2 * p->room * p->padded));
    thin_scatter(p, (uint16_t *)p->pairs, p->a->right, p->a->columns, 2 * p->padded, 1, 4, 2);
}

/* pairs[rank / 2][column]: a right factor of a sum over the ranks. */
static void thin_pair_ranks(const thin_pass *p) {
    memset(p->pairs, 0, (size_t)(2 * p->room * THIN_RANKS));
    thin_scatter(p, (uint16_t *)p->pairs, p->a->right, p->a->columns, 4, 2, 2 * p->room, 1);
}

/* left[rank][row]. */
static void thin_turn_left(const thin_pass *p) {
    memset(p->left, 0, (size_t)(2 * p->depth * p->padded));
    thin_scatter(p, p->left, p->a->left, p->a->rows, 2, 1, 2 * p->depth, p->depth);
}

/* The two words of each row that its mask derives from. */
typedef struct {
    uint32_t first[AMX_BLOCK], second[AMX_BLOCK];
} thin_seeds;

static void thin_seed(const tt_thin_call *a, int64_t i, thin_seeds *s) {
    for (int64_t r = 0; a->keys && r < smaller(AMX_BLOCK, a->rows - i); r++)
        dropout_seeds(a->keys[i + r], a->site, &s->first[r], &s->second[r]);
}

/* Which of the columns [j, j + 32) of a row are kept. */
static inline __mmask32 thin_kept(const tt_thin_call *a, const thin_seeds *s, int64_t r, int64_t j) {
    if (!a->keys) return ~0u;
    if (a->threshold > 0xffff) return 0;
    vu pair = (vu)TT_LANES + (uint32_t)(j / 2) + s->first[r];
    return _mm512_cmpge_epu16_mask((__m512i)dropout_hash(pair, s->second[r]), _mm512_set1_epi16((short)a->threshold));
}

/* 32 x 32 of the wide matrix: where it is, or a copy, masked and padded with zeros. The next ones are fetched meanwhile. */
static const uint16_t *thin_block(const tt_thin_call *a, const thin_seeds *s, int64_t i, int64_t j, uint16_t *copy,
                                  int64_t *row) {
    const uint16_t *from = a->wide + i * a->columns + j;
    for (int64_t r = 0; r < AMX_BLOCK && j + 64 < a->columns && i + r < a->rows; r++)
        __builtin_prefetch(from + r * a->columns + 64);
    *row = a->columns;
    if (!a->keys && i + AMX_BLOCK <= a->rows && j + AMX_BLOCK <= a->columns) return from;
    __mmask32 columns = first32(a->columns - j);
    for (int64_t r = 0; r < AMX_BLOCK; r++)
        _mm512_storeu_si512(copy + r * AMX_BLOCK,
                            i + r < a->rows ? _mm512_maskz_loadu_epi16(columns & thin_kept(a, s, r, j),
                                                                       from + r * a->columns)
                                            : _mm512_setzero_si512());
    *row = AMX_BLOCK;
    return copy;
}

/* Tiles 0 to 3 are the sums of down: [rows 0-15, 16-31][ranks 0-15, 16-31]. */
static void thin_down(const thin_pass *p, const uint16_t *block, int64_t row, int64_t j) {
    const uint32_t *right = p->pairs + j / 2 * p->padded;
    _tile_loadd(4, block, 2 * row);
    _tile_loadd(5, block + 16 * row, 2 * row);
    _tile_loadd(6, right, 4 * p->padded);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (p->padded == 16) return;
    _tile_loadd(7, right + 16, 4 * p->padded);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

static void thin_across(const thin_pass *p, const uint32_t *pairs, int64_t i, int64_t j, float *sums, int begun) {
    for (int64_t k = 0; k < p->padded; k += 16) {
        float *to = sums + k * p->room + j;
        _tile_loadd(4, p->left + k * p->depth + i, 2 * p->depth);
        for (int64_t half = 0; half < AMX_BLOCK; half += 16) {
            if (begun)
                _tile_loadd(5, to + half, 4 * p->room);
            else
                _tile_zero(5);
            _tile_loadd(6, pairs + half, 4 * AMX_BLOCK);
            _tile_dpbf16ps(5, 4, 6);
            _tile_stored(5, to + half, 4 * p->room);
        }
    }
}

static void thin_store_down(const thin_pass *p, int64_t i) {
    const tt_thin_call *a = p->a;
    float found[AMX_BLOCK][THIN_RANKS];
    _tile_stored(0, found[0], 4 * THIN_RANKS);
    _tile_stored(2, found[16], 4 * THIN_RANKS);
    if (p->padded > 16) {
        _tile_stored(1, found[0] + 16, 4 * THIN_RANKS);
        _tile_stored(3, found[16] + 16, 4 * THIN_RANKS);
    }
    __asm__ volatile("" ::: "memory"); /* the compiler does not know that tiles were stored there */
    for (int64_t r = 0; r < smaller(AMX_BLOCK, a->rows - i); r++)
        for (int64_t k = 0; k < p->ranks; k += 16) {
            __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(found[r] + k), _mm512_set1_ps(a->kept));
            _mm256_mask_storeu_epi16(a->down + (i + r) * a->down_row + p->first + k, first16(p->ranks - k),
                                     (__m256i)_mm512_cvtneps_pbh(sum));
        }
}

static void thin_unit(void *context, int64_t unit) {
    const thin_pass *p = (const thin_pass *)context;
    const tt_thin_call *a = p->a;
    uint16_t copy[AMX_BLOCK * AMX_BLOCK];
    uint32_t pairs[AMX_BLOCK / 2 * AMX_BLOCK];
    float *sums = p->sums + unit * p->padded * p->room;
    int64_t start = unit * THIN_UNIT, end = smaller(start + THIN_UNIT, a->rows), row;
    thin_seeds seeds;
    amx_open();
    for (int64_t i = start; i < end; i += AMX_BLOCK) {
        thin_seed(a, i, &seeds);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t j = 0; j < a->columns; j += AMX_BLOCK) {
            const uint16_t *block = thin_block(a, &seeds, i, j, copy, &row);
            if (a->left) amx_pair_rows(pairs, block, row, AMX_BLOCK, AMX_BLOCK);
            __asm__ volatile("" ::: "memory"); /* the compiler does not know that tiles are loaded from these */
            if (a->right) thin_down(p, block, row, j);
            if (a->left) thin_across(p, pairs, i, j, sums, i > start);
        }
        if (a->right) thin_store_down(p, i);
    }
    amx_close();
}

/* Adds the units' sums in their order. */
static void thin_collect(const thin_pass *p) {
    const tt_thin_call *a = p->a;
    int64_t units = thin_units(a->rows), apart = p->padded * p->room;
    for (int64_t k = 0; k < p->ranks; k++)
        for (int64_t j = 0; j < a->columns; j += 16) {
            __mmask16 m = first16(a->columns - j);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t u = 0; u < units; u++)
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(p->sums + u * apart + k * p->room + j));
            sum = _mm512_mul_ps(sum, _mm512_set1_ps(a->scale * a->kept));
            if (!a->turned) {
                _mm512_mask_storeu_ps(a->across + (p->first + k) * a->columns + j, m, sum);
                continue;
            }
            float found[16];
            _mm512_storeu_ps(found, sum);
            for (int64_t c = 0; c < smaller(16, a->columns - j); c++)
                a->across[(j + c) * a->rank + p->first + k] = found[c];
        }
}

/* 32 x 32 of wide: += what the tiles 0 to 3 hold, and the residual. */
static void thin_add_block(const tt_thin_call *a, const thin_seeds *s, int64_t i, int64_t j) {
    float found[AMX_BLOCK][AMX_BLOCK];
    _tile_stored(0, found[0], 4 * AMX_BLOCK);
    _tile_stored(1, found[0] + 16, 4 * AMX_BLOCK);
    _tile_stored(2, found[16], 4 * AMX_BLOCK);
    _tile_stored(3, found[16] + 16, 4 * AMX_BLOCK);
    __asm__ volatile("" ::: "memory"); /* as above */
    for (int64_t r = 0; r < smaller(AMX_BLOCK, a->rows - i); r++) {
        __mmask32 kept = thin_kept(a, s, r, j);
        for (int64_t half = 0; half < AMX_BLOCK && j + half < a->columns; half += 16) {
            int64_t at = (i + r) * a->columns + j + half;
            __mmask16 m = first16(a->columns - j - half);
            __m512 sum = amx_wide(_mm256_maskz_loadu_epi16(m, a->wide + at)), low = _mm512_loadu_ps(found[r] + half);
            sum = _mm512_mask3_fmadd_ps(low, _mm512_set1_ps(a->kept), sum, (__mmask16)(kept >> half));
            if (a->residual) sum = _mm512_add_ps(sum, amx_wide(_mm256_maskz_loadu_epi16(m, a->residual + at)));
            _mm256_mask_storeu_epi16(a->wide + at, m, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

static void thin_add_rows(void *context, int64_t unit) {
    const thin_pass *p = (const thin_pass *)context;
    const tt_thin_call *a = p->a;
    uint16_t left[AMX_BLOCK][THIN_RANKS] = {{0}};
    int64_t i = unit * AMX_BLOCK, count = smaller(AMX_BLOCK, a->rows - i);
    for (int64_t r = 0; r < count; r++)
        memcpy(left[r], a->left + (i + r) * a->rank + p->first, (size_t)(2 * p->ranks));
    thin_seeds seeds;
    thin_seed(a, i, &seeds);
    amx_open();
    __asm__ volatile("" ::: "memory"); /* as above */
    for (int64_t j = 0; j < a->columns; j += AMX_BLOCK) {
        for (int64_t r = 0; r < count && j + 64 < a->columns; r++)
            __builtin_prefetch(a->wide + (i + r) * a->columns + j + 64, 1);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(4, left[0], 2 * THIN_RANKS);
        _tile_loadd(5, left[16], 2 * THIN_RANKS);
        _tile_loadd(6, p->pairs + j, 4 * p->room);
        _tile_loadd(7, p->pairs + j + 16, 4 * p->room);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        thin_add_block(a, &seeds, i, j);
    }
    amx_close();
}

static thin_pass thin_start(const tt_thin_call *a, int64_t first) {
    int64_t ranks = smaller(THIN_RANKS, a->rank - first);
    thin_pass p = {.a = a, .first = first, .ranks = ranks, .padded = round_up(ranks, 16),
                   .room = round_up(a->columns, AMX_BLOCK), .depth = round_up(a->rows, AMX_BLOCK)};
    p.sums = (float *)a->scratch;
    p.pairs = (uint32_t *)(p.sums + thin_units(a->rows) * THIN_RANKS * p.room);
    p.left = (uint16_t *)(p.pairs + THIN_RANKS / 2 * p.room);
    return p;
}

/* Bytes of scratch memory that a call needs. */
TT_API int64_t tt_thin_scratch(int64_t rows, int64_t columns) {
    int64_t room = round_up(columns, AMX_BLOCK), depth = round_up(rows, AMX_BLOCK);
    return 4 * THIN_RANKS * room * thin_units(rows) + 2 * THIN_RANKS * room + 2 * THIN_RANKS * depth;
}

/* down = wide right, across = scale left^T wide, whichever has its factor. */
TT_API void tt_thin_products(const tt_thin_call *a) {
    for (int64_t first = 0; first < a->rank; first += THIN_RANKS) {
        thin_pass p = thin_start(a, first);
        if (a->right) thin_pair_columns(&p);
        if (a->left) thin_turn_left(&p);
        tt_parallel(thin_units(a->rows), thin_unit, &p);
        if (a->left) thin_collect(&p);
    }
}

/* wide += left right^T + residual, rounded once for each 32 of the rank. */
TT_API void tt_thin_add(const tt_thin_call *a) {
    tt_thin_call rest = *a;
    for (int64_t first = 0; first < a->rank; first += THIN_RANKS, rest.residual = 0) {
        thin_pass p = thin_start(&rest, first);
        thin_pair_ranks(&p);
        tt_parallel((a->rows + AMX_BLOCK - 1) / AMX_BLOCK, thin_add_rows, &p);
    }
}

/* Whether there is the tile unit, and this process may use it. */
TT_API int32_t tt_thin_tiles(void) { return amx_is_allowed(); }

#else
TT_API int32_t tt_thin_tiles(void) { return 0; }
#endif
#endif
