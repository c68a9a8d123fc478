/* Block-wise quantisation: runs of values, each run with the largest of its magnitudes as its scale.
 *
 * A block is the unit of work, so the number of threads can't change a bit of any result. Products are rounded before
 * anything is added to them: a contracted multiply-add would give other bits than plain torch.
 */
#ifndef TT_BLOCKWISE_H
#define TT_BLOCKWISE_H

#include "rows.h"

#define TT_BLOCKS_TASK 32768 /* values: some microseconds of decoding */
#define TT_MOST_SCALES 1024  /* blocks of a task: of the smallest, 32 values */
#define TT_NESTED 256        /* scales per scale of scales */

static int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

static int64_t blocks_per_task(int64_t blocksize) { return TT_BLOCKS_TASK / at_most(blocksize, TT_BLOCKS_TASK); }

static int64_t blocks_of(int64_t n, int64_t blocksize) { return (n + blocksize - 1) / blocksize; }

/* The largest magnitude of n values; NaN if any of them is not finite. */
TT_INLINE float block_absmax(const void *x, int64_t n, int dtype) {
    vf largest = {0}, poison = {0};
    for (int64_t i = 0; i < n; i += TT_WIDTH) {
        vf v = load_at(x, i, n, dtype, 0.0f);
        largest = vf_max(largest, (vf)((vi)v & 0x7fffffff));
        poison += v * 0.0f; /* a comparison would lose a NaN */
    }
    return vf_largest(largest) + vf_sum(poison);
}

/* What a block is multiplied by; the bound keeps it finite. */
static inline float block_inverse(float absmax) { return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f); }

/* Apart, so that no compiler can contract it with the products that it is added to. */
static __attribute__((noinline)) void add_to_all(float *values, int64_t n, float addend) {
    for (int64_t i = 0; i < n; i++) values[i] += addend;
}

#include "blockwise_4bit.h"
#include "blockwise_8bit.h"

#endif
