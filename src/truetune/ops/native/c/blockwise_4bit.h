/* Values as codes of 4 bits, two to a byte, the first in the upper half: one of 16, times the block's scale. */
#ifndef TT_BLOCKWISE_4BIT_H
#define TT_BLOCKWISE_4BIT_H

enum { TT_THRESHOLDS = 15 };

typedef uint64_t vq __attribute__((vector_size(4 * TT_WIDTH)));
typedef uint8_t vb __attribute__((vector_size(TT_WIDTH / 2)));

typedef struct {
    const void *x;
    uint8_t *codes;
    float *absmax;
    const float *thresholds; /* ascending; the rank of a value is how many of them lie below it */
    const uint8_t *order;    /* [256] two ranks -> two codes; NULL where ranks are the codes */
    int64_t n, blocksize;
    int32_t dtype;
} tt_quantize_4bit_args;

/* The ranks of TT_WIDTH values, in pairs. */
TT_INLINE vb packed_ranks(vf x, const float *thresholds) {
    vi rank = {0};
    for (int k = 0; k < TT_THRESHOLDS; k++) rank -= x > thresholds[k];
    vq pairs = (vq)rank; /* the first of two is the lower half */
    return __builtin_convertvector((pairs << 4 | pairs >> 32) & 0xff, vb);
}

TT_INLINE void quantize_4bit_block(tt_quantize_4bit_args c, int64_t block, int dtype) {
    int64_t from = block * c.blocksize, n = at_most(c.blocksize, c.n - from);
    const char *x = (const char *)c.x + from * element_size(dtype);
    uint8_t *codes = c.codes + from / 2;
    float absmax = block_absmax(x, n, dtype), inverse = block_inverse(absmax);
    c.absmax[block] = absmax;
    for (int64_t i = 0; i < n; i += TT_WIDTH) {
        vb bytes = packed_ranks(load_at(x, i, n, dtype, 0.0f) * inverse, c.thresholds);
        memcpy(codes + i / 2, &bytes, n - i < TT_WIDTH ? (size_t)(n - i + 1) / 2 : sizeof bytes);
    }
    if (c.order)
        for (int64_t i = 0; i < (n + 1) / 2; i++) codes[i] = c.order[codes[i]];
}

static void quantize_4bit_task(void *context, int64_t task) {
    const tt_quantize_4bit_args *c = (const tt_quantize_4bit_args *)context;
    int64_t each = blocks_per_task(c->blocksize), last = at_most((task + 1) * each, blocks_of(c->n, c->blocksize));
    for (int64_t block = task * each; block < last; block++)
        if (c->dtype == TT_FLOAT32)
            quantize_4bit_block(*c, block, TT_FLOAT32);
        else
            quantize_4bit_block(*c, block, TT_BFLOAT16);
}

TT_API void tt_quantize_4bit(const void *x, uint8_t *codes, float *absmax, const float *thresholds,
                             const uint8_t *order, int64_t n, int64_t blocksize, int32_t dtype) {
    tt_quantize_4bit_args c = {x, codes, absmax, thresholds, order, n, blocksize, dtype};
    tt_parallel(blocks_of(blocks_of(n, blocksize), blocks_per_task(blocksize)), quantize_4bit_task, &c);
}

typedef struct {
    const uint8_t *codes;
    const float *absmax;          /* the scales; NULL where they are codes themselves: */
    const uint8_t *nested_codes;  /* scale = map[code] * nested_absmax[block / 256] + offset */
    const float *nested_absmax, *offset, *map;
    const float *values; /* [16] */
    void *out;
    int64_t start, stop, blocksize; /* values start, ..., stop - 1 are wanted */
    int32_t dtype;
} tt_dequantize_4bit_args;

/* A block has 16 different products at most: they are formed and rounded once, then looked up.
 * decode_<dtype>: n values from the start of a byte on; gives how many were done, all but less than a vector. */
#if TT_WIDTH == 16
TT_INLINE int64_t decode_float32(const uint8_t *codes, const float *values, float scale, float *out, int64_t n) {
    __m512 table = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(scale));
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) { /* of an index, the lowest four bits count */
        __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(codes + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_slli_epi64(byte, 32), _mm512_srli_epi64(byte, 4));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, table));
    }
    return i;
}
#elif TT_WIDTH == 8
TT_INLINE int64_t decode_float32(const uint8_t *codes, const float *values, float scale, float *out, int64_t n) {
    __m256 low = _mm256_mul_ps(_mm256_loadu_ps(values), _mm256_set1_ps(scale));
    __m256 high = _mm256_mul_ps(_mm256_loadu_ps(values + 8), _mm256_set1_ps(scale));
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) { /* of an index, the lowest three bits count */
        int32_t four;
        memcpy(&four, codes + i / 2, sizeof four);
        __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        __m256i index = _mm256_or_si256(_mm256_slli_epi64(byte, 32), _mm256_srli_epi64(byte, 4));
        __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        __m256 found = _mm256_permutevar8x32_ps(low, index);
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(found, _mm256_permutevar8x32_ps(high, index), upper));
    }
    return i;
}
#else
TT_INLINE int64_t decode_float32(const uint8_t *codes, const float *values, float scale, float *out, int64_t n) {
    float table[16];
    for (int k = 0; k < 16; k++) table[k] = values[k] * scale;
    for (int64_t i = 0; i < n / 2; i++) {
        out[2 * i] = table[codes[i] >> 4];
        out[2 * i + 1] = table[codes[i] & 15];
    }
    return n / 2 * 2;
}
#endif

/* As bf16_round, also of subnormal values, which AVX512_BF16 would take for 0. */
TT_INLINE void bf16_table(const float *values, float scale, uint16_t table[16]) {
    for (int k = 0; k < 16; k += TT_WIDTH) {
        vf product = vf_load(values + k) * scale;
        vu rounded = (vu)product + 0x7fffu + (((vu)product >> 16) & 1u);
        vh h = vu_narrowed((vu)vf_select(product != product, vf_set(NAN), (vf)rounded) >> 16);
        memcpy(table + k, &h, sizeof h);
    }
}

#if TT_WIDTH == 16
/* The table twice, side by side: of an index of five bits, the upper one does not count. */
TT_INLINE __m512i bf16_tables(const float *values, float scale) {
#if defined(__AVX512BF16__)
    if (scale > 1e-30f && scale < 1e38f) { /* products are 0 or normal, and finite */
        __m512 product = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(scale));
        return (__m512i)_mm512_cvtne2ps_pbh(product, product);
    }
#endif
    uint16_t once[16];
    bf16_table(values, scale, once);
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)once));
}
#endif

#if TT_WIDTH == 16
TT_INLINE int64_t decode_bfloat16(const uint8_t *codes, const float *values, float scale, uint16_t *out, int64_t n) {
    __m512i table = bf16_tables(values, scale);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_slli_epi32(byte, 16), _mm512_srli_epi32(byte, 4));
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, table));
    }
    return i;
}
#elif TT_WIDTH == 8
TT_INLINE int64_t decode_bfloat16(const uint8_t *codes, const float *values, float scale, uint16_t *out, int64_t n) {
    uint16_t table[16];
    bf16_table(values, scale, table);
    __m128i first = _mm_loadu_si128((const __m128i *)table), second = _mm_loadu_si128((const __m128i *)(table + 8));
    __m128i mask = _mm_set1_epi16(0xff); /* lookups are of bytes: the lower ones of the table, then the upper ones */
    __m128i halves[2] = {_mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask)),
                         _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8))};
    __m256i lower = _mm256_broadcastsi128_si256(halves[0]), upper = _mm256_broadcastsi128_si256(halves[1]);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m256i index = _mm256_or_si256(_mm256_slli_epi16(byte, 8), _mm256_srli_epi16(byte, 4));
        index = _mm256_and_si256(index, _mm256_set1_epi8(15));
        __m256i low = _mm256_shuffle_epi8(lower, index), high = _mm256_shuffle_epi8(upper, index);
        __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256((__m256i *)(out + i + 16), _mm256_permute2x128_si256(a, b, 0x31));
    }
    return i;
}
#else
TT_INLINE int64_t decode_bfloat16(const uint8_t *codes, const float *values, float scale, uint16_t *out, int64_t n) {
    uint16_t table[16];
    bf16_table(values, scale, table);
    for (int64_t i = 0; i < n / 2; i++) {
        out[2 * i] = table[codes[i] >> 4];
        out[2 * i + 1] = table[codes[i] & 15];
    }
    return n / 2 * 2;
}
#endif

#if TT_WIDTH == 16
/* Whole blocks of a multiple of 64 values, where one instruction (VBMI) finds the indices: to each byte it gives any
 * eight bits that follow each other in eight bytes of codes. Those above an index do not count. */
#define TT_AHEAD 16384 /* bytes: a line of the result is asked for before it is written */
#define TT_VBMI __attribute__((target("avx512vbmi"))) static inline

TT_VBMI void decode_whole_float32(const uint8_t *codes, const float *values, float scale, float *out, int64_t n) {
    __m512 table = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(scale));
    const __m512i from = _mm512_set_epi64(56LL << 32 | 60, 48LL << 32 | 52, 40LL << 32 | 44, 32LL << 32 | 36,
                                          24LL << 32 | 28, 16LL << 32 | 20, 8LL << 32 | 12, 0LL << 32 | 4);
    for (int64_t i = 0; i < n; i += 64)
        for (int64_t k = i; k < i + 64; k += 16) {
            __m512i all = _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)(codes + k / 2)));
            __builtin_prefetch((const char *)(out + k) + TT_AHEAD, 1, 2);
            _mm512_storeu_ps(out + k, _mm512_permutexvar_ps(_mm512_multishift_epi64_epi8(from, all), table));
        }
}

TT_VBMI void decode_whole_bfloat16(const uint8_t *codes, const float *values, float scale, uint16_t *out, int64_t n) {
    __m512i table = bf16_tables(values, scale);
    const __m512i from = _mm512_broadcast_i64x4(
        _mm256_set_epi64x(0x38003c00300034, 0x28002c00200024, 0x18001c00100014, 0x08000c00000004));
    for (int64_t i = 0; i < n; i += 64)
        for (int64_t k = i; k < i + 64; k += 32) {
            const __m128i *at = (const __m128i *)(codes + k / 2);
            __m512i all = _mm512_broadcastq_epi64(_mm_loadl_epi64(at));
            all = _mm512_mask_broadcastq_epi64(all, 0xf0, _mm_loadl_epi64((const __m128i *)(codes + k / 2 + 8)));
            __m512i index = _mm512_multishift_epi64_epi8(from, all);
            __builtin_prefetch((const char *)(out + k) + TT_AHEAD, 1, 2);
            _mm512_storeu_si512(out + k, _mm512_permutexvar_epi16(index, table));
        }
}
#endif

/* Value i of all, into element `to` of the result. */
static void decode_one(const tt_dequantize_4bit_args *c, float scale, int64_t i, int64_t to) {
    uint8_t byte = c->codes[i / 2];
    float value = c->values[i % 2 ? byte & 15 : byte >> 4] * scale;
    if (c->dtype == TT_FLOAT32)
        ((float *)c->out)[to] = value;
    else
        ((uint16_t *)c->out)[to] = bf16_round(value);
}

static void dequantize_4bit_block(const tt_dequantize_4bit_args *c, int64_t block, float scale) {
    int64_t i = block * c->blocksize, stop = at_most(i + c->blocksize, c->stop);
    if (i < c->start) i = c->start;
    if (i % 2) {
        decode_one(c, scale, i, i - c->start);
        i++;
    }
    const uint8_t *codes = c->codes + i / 2;
    if (c->dtype == TT_FLOAT32)
        i += decode_float32(codes, c->values, scale, (float *)c->out + (i - c->start), stop - i);
    else
        i += decode_bfloat16(codes, c->values, scale, (uint16_t *)c->out + (i - c->start), stop - i);
    for (; i < stop; i++) decode_one(c, scale, i, i - c->start);
}

#if TT_WIDTH == 16
/* Gives how many of these blocks were done: all that are wanted whole. The first one starts at c->start or later. */
TT_VBMI int64_t decode_whole(const tt_dequantize_4bit_args *c, int64_t first, int64_t blocks, const float *scales) {
    int64_t each = c->blocksize, whole = at_most(blocks, c->stop / each - first), to = first * each - c->start;
    const uint8_t *codes = c->codes + first * each / 2;
    for (int64_t i = 0; i < whole; i++, codes += each / 2, to += each)
        if (c->dtype == TT_FLOAT32)
            decode_whole_float32(codes, c->values, scales[i], (float *)c->out + to, each);
        else
            decode_whole_bfloat16(codes, c->values, scales[i], (uint16_t *)c->out + to, each);
    return whole > 0 ? whole : 0;
}
#endif

static void dequantize_4bit_task(void *context, int64_t task) {
    const tt_dequantize_4bit_args *c = (const tt_dequantize_4bit_args *)context;
    int64_t each = blocks_per_task(c->blocksize), first = c->start / c->blocksize + task * each;
    int64_t blocks = at_most(each, blocks_of(c->stop, c->blocksize) - first);
    float decoded[TT_MOST_SCALES];
    const float *scales = c->absmax + first;
    if (!c->absmax) {
        for (int64_t i = 0; i < blocks; i++)
            decoded[i] = c->map[c->nested_codes[first + i]] * c->nested_absmax[(first + i) / TT_NESTED];
        add_to_all(decoded, blocks, *c->offset);
        scales = decoded;
    }
    int64_t i = 0;
#if TT_WIDTH == 16
    if (first * c->blocksize >= c->start && c->blocksize % 64 == 0 && __builtin_cpu_supports("avx512vbmi"))
        i = decode_whole(c, first, blocks, scales);
#endif
    for (; i < blocks; i++) dequantize_4bit_block(c, first + i, scales[i]);
}

TT_API void tt_dequantize_4bit(const uint8_t *codes, const float *absmax, const uint8_t *nested_codes,
                               const float *nested_absmax, const float *offset, const float *map, const float *values,
                               void *out, int64_t start, int64_t stop, int64_t blocksize, int32_t dtype) {
    tt_dequantize_4bit_args c = {codes, absmax, nested_codes, nested_absmax, offset, map, values, out,
                                 start, stop, blocksize, dtype};
    int64_t blocks = blocks_of(stop, blocksize) - start / blocksize;
    tt_parallel(blocks_of(blocks, blocks_per_task(blocksize)), dequantize_4bit_task, &c);
}

#endif
