/* Values as codes of 8 bits: the nearest of 256 sorted ones, times the largest magnitude of the block. */
#ifndef TT_BLOCKWISE_8BIT_H
#define TT_BLOCKWISE_8BIT_H

/* How to find the nearest: its code is how many thresholds lie below. `base` tells how many lie below every float whose
 * upper 16 bits are the same; as a rule at most one more lies among those. */
typedef struct {
    const uint8_t *base;     /* [65536] */
    const float *thresholds; /* [256], ascending; the last is infinite */
    int32_t steps;           /* how many thresholds lie among such floats at most */
} tt_search;

TT_INLINE uint8_t nearest_code(tt_search search, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t code = search.base[bits >> 16];
    code += x > search.thresholds[code];
    if (search.steps > 1)
        while (x > search.thresholds[code]) code++;
    return (uint8_t)code;
}

typedef struct {
    const void *x;
    uint8_t *codes;
    float *absmax;
    tt_search search;
    int64_t n, blocksize;
    int32_t dtype;
} tt_quantize_8bit_args;

TT_INLINE void quantize_8bit_block(tt_quantize_8bit_args c, int64_t block, int dtype) {
    int64_t from = block * c.blocksize, n = at_most(c.blocksize, c.n - from);
    const char *x = (const char *)c.x + from * element_size(dtype);
    float absmax = block_absmax(x, n, dtype), inverse = block_inverse(absmax);
    c.absmax[block] = absmax;
    for (int64_t i = 0; i < n; i += TT_WIDTH) {
        float lanes[TT_WIDTH];
        uint8_t codes[TT_WIDTH];
        vf_store(lanes, load_at(x, i, n, dtype, 0.0f) * inverse);
        for (int k = 0; k < TT_WIDTH; k++) codes[k] = nearest_code(c.search, lanes[k]);
        memcpy(c.codes + from + i, codes, n - i < TT_WIDTH ? (size_t)(n - i) : sizeof codes);
    }
}

static void quantize_8bit_task(void *context, int64_t task) {
    const tt_quantize_8bit_args *c = (const tt_quantize_8bit_args *)context;
    int64_t each = blocks_per_task(c->blocksize), last = at_most((task + 1) * each, blocks_of(c->n, c->blocksize));
    for (int64_t block = task * each; block < last; block++)
        if (c->dtype == TT_FLOAT32)
            quantize_8bit_block(*c, block, TT_FLOAT32);
        else
            quantize_8bit_block(*c, block, TT_BFLOAT16);
}

TT_API void tt_quantize_8bit(const void *x, uint8_t *codes, float *absmax, const uint8_t *base, const float *thresholds,
                             int32_t steps, int64_t n, int64_t blocksize, int32_t dtype) {
    tt_quantize_8bit_args c = {x, codes, absmax, {base, thresholds, steps}, n, blocksize, dtype};
    tt_parallel(blocks_of(blocks_of(n, blocksize), blocks_per_task(blocksize)), quantize_8bit_task, &c);
}

typedef struct {
    const uint8_t *codes;
    const float *absmax, *values;
    void *out;
    int64_t n, blocksize;
    int32_t dtype;
} tt_dequantize_8bit_args;

static void dequantize_8bit_task(void *context, int64_t task) {
    const tt_dequantize_8bit_args *c = (const tt_dequantize_8bit_args *)context;
    int64_t last = at_most((task + 1) * TT_BLOCKS_TASK, c->n);
    for (int64_t i = task * TT_BLOCKS_TASK, to; i < last; i = to) {
        int64_t block = i / c->blocksize;
        float scale = c->absmax[block];
        to = at_most((block + 1) * c->blocksize, last);
        if (c->dtype == TT_FLOAT32)
            for (int64_t j = i; j < to; j++) ((float *)c->out)[j] = c->values[c->codes[j]] * scale;
        else /* one by one: AVX512_BF16 would take subnormal values for 0 */
            for (int64_t j = i; j < to; j++) ((uint16_t *)c->out)[j] = bf16_round(c->values[c->codes[j]] * scale);
    }
}

TT_API void tt_dequantize_8bit(const uint8_t *codes, const float *absmax, const float *values, void *out, int64_t n,
                               int64_t blocksize, int32_t dtype) {
    tt_dequantize_8bit_args c = {codes, absmax, values, out, n, blocksize, dtype};
    tt_parallel(blocks_of(n, TT_BLOCKS_TASK), dequantize_8bit_task, &c);
}

#endif
