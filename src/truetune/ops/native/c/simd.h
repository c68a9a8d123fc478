/* Vectors of floats as wide as the machine this file is compiled for: AVX-512, AVX2, NEON, or four plain floats.
 *
 * The vector extensions that GCC and Clang share serve every instruction set; where a compiler does not find the one
 * instruction that does it all, x86 has a second version of a function.
 * Elements in memory are float32 or bfloat16 (the upper half of a float32); arithmetic is always float32.
 */
#ifndef TT_SIMD_H
#define TT_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define TT_WIDTH 16
#elif defined(__AVX2__)
#define TT_WIDTH 8
#else
#define TT_WIDTH 4
#endif

typedef float vf __attribute__((vector_size(4 * TT_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * TT_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * TT_WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * TT_WIDTH)));

enum { TT_FLOAT32 = 0, TT_BFLOAT16 = 1 };

static inline vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }

static inline vf vf_set(float x) { return (vf){0} + x; }

/* 16-bit lanes as 32-bit ones, and back where the upper half is 0. */
#if TT_WIDTH == 16
static inline vu vu_widened(vh h) { return (vu)_mm512_cvtepu16_epi32((__m256i)h); }
static inline vh vu_narrowed(vu u) { return (vh)_mm512_cvtepi32_epi16((__m512i)u); }
#elif TT_WIDTH == 8
static inline vu vu_widened(vh h) { return (vu)_mm256_cvtepu16_epi32((__m128i)h); }
static inline vh vu_narrowed(vu u) {
    return (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)u), _mm256_extracti128_si256((__m256i)u, 1));
}
#else
static inline vu vu_widened(vh h) { return __builtin_convertvector(h, vu); }
static inline vh vu_narrowed(vu u) { return __builtin_convertvector(u, vh); }
#endif

static inline vf vf_select(vi where, vf a, vf b) { return (vf)((where & (vi)a) | (~where & (vi)b)); }

static inline vf vf_from_bf16(const uint16_t *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(vu_widened(h) << 16);
}

/* Rounds to the nearest, ties to even, as torch does; a NaN stays one. AVX512_BF16 takes subnormal values for 0. */
static inline void vf_to_bf16(uint16_t *p, vf v) {
#if TT_WIDTH == 16 && defined(__AVX512BF16__)
    vh h = (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    vu rounded = (vu)v + 0x7fffu + (((vu)v >> 16) & 1u);
    vh h = vu_narrowed((vu)vf_select(v != v, vf_set(NAN), (vf)rounded) >> 16);
#endif
    memcpy(p, &h, sizeof h);
}

static inline float bf16_value(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint16_t bf16_round(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0u;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(__clang__)
#define vf_shuffle(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define vf_shuffle(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* TT_LANES: the number of each lane. vf_swap: lane i gets what lane i ^ n had. vf_zip: lanes of a and b in turn. */
#if TT_WIDTH == 16
#define TT_LANES ((vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#define vf_swap(v, n)                                                                                           \
    vf_shuffle(v, v, 0 ^ n, 1 ^ n, 2 ^ n, 3 ^ n, 4 ^ n, 5 ^ n, 6 ^ n, 7 ^ n, 8 ^ n, 9 ^ n, 10 ^ n, 11 ^ n, 12 ^ n, \
               13 ^ n, 14 ^ n, 15 ^ n)
#define vf_zip_low(a, b) vf_shuffle(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define vf_zip_high(a, b) vf_shuffle(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif TT_WIDTH == 8
#define TT_LANES ((vi){0, 1, 2, 3, 4, 5, 6, 7})
#define vf_swap(v, n) vf_shuffle(v, v, 0 ^ n, 1 ^ n, 2 ^ n, 3 ^ n, 4 ^ n, 5 ^ n, 6 ^ n, 7 ^ n)
#define vf_zip_low(a, b) vf_shuffle(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define vf_zip_high(a, b) vf_shuffle(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define TT_LANES ((vi){0, 1, 2, 3})
#define vf_swap(v, n) vf_shuffle(v, v, 0 ^ n, 1 ^ n, 2 ^ n, 3 ^ n)
#define vf_zip_low(a, b) vf_shuffle(a, b, 0, 4, 1, 5)
#define vf_zip_high(a, b) vf_shuffle(a, b, 2, 6, 3, 7)
#endif

/* The lanes of v added up, in a tree. */
static inline float vf_sum(vf v) {
#if TT_WIDTH >= 16
    v += vf_swap(v, 8);
#endif
#if TT_WIDTH >= 8
    v += vf_swap(v, 4);
#endif
    v += vf_swap(v, 2);
    v += vf_swap(v, 1);
    return v[0];
}

/* a > b ? a : b, and a < b ? a : b: where either is a NaN, the second argument. */
static inline vf vf_max(vf a, vf b) {
#if TT_WIDTH == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif TT_WIDTH == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vi greater = a > b;
    return (vf)((greater & (vi)a) | (~greater & (vi)b));
#endif
}

static inline vf vf_min(vf a, vf b) {
#if TT_WIDTH == 16
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif TT_WIDTH == 8
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    vi less = a < b;
    return (vf)((less & (vi)a) | (~less & (vi)b));
#endif
}

/* The larger of unsigned lanes, and whether one of them is `least` or more. */
static inline vu vu_max(vu a, vu b) {
#if TT_WIDTH == 16
    return (vu)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif TT_WIDTH == 8
    return (vu)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
    vu greater = (vu)(a > b);
    return (greater & a) | (~greater & b);
#endif
}

static inline int vu_reaches(vu a, uint32_t least) {
    vu limit = (vu){0} + least;
#if TT_WIDTH == 16
    return _mm512_cmpge_epu32_mask((__m512i)a, (__m512i)limit) != 0;
#elif TT_WIDTH == 8
    return _mm256_movemask_epi8(_mm256_cmpeq_epi32((__m256i)vu_max(a, limit), (__m256i)a)) != 0;
#else
    vu found = (vu)(a >= limit);
    return (found[0] | found[1] | found[2] | found[3]) != 0;
#endif
}

/* The largest lane; a NaN may be lost. */
static inline float vf_largest(vf v) {
#if TT_WIDTH >= 16
    v = vf_max(v, vf_swap(v, 8));
#endif
#if TT_WIDTH >= 8
    v = vf_max(v, vf_swap(v, 4));
#endif
    v = vf_max(v, vf_swap(v, 2));
    v = vf_max(v, vf_swap(v, 1));
    return v[0];
}

/* e^r - 1 for x = k ln 2 + r, |r| <= ln(2) / 2, with k whole; to within 1 unit in the last place of e^r. */
static inline vf vf_reduced(vf x, vf *k) {
    const vf magic = vf_set(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    *k = (x * 1.44269504088896341f + magic) - magic;
    vf r = x - *k * 0.693359375f;
    r = r + *k * 2.12194440e-4f; /* ln 2 in two parts (Cody and Waite) */
    vf p = vf_set(1.3814540075e-3f); /* of (e^r - 1 - r) / r^2, fitted: 3e-9 of e^r */
    p = p * r + 8.3687451078e-3f;
    p = p * r + 4.1668390786e-2f;
    p = p * r + 1.6666520399e-1f;
    p = p * r + 4.9999993432e-1f;
    return (p * r + 1.0f) * r;
}

/* a 2^k, for a and the result normal. */
static inline vf vf_scaled(vf a, vf k) {
#if TT_WIDTH == 16
    return (vf)_mm512_scalef_ps((__m512)a, (__m512)k);
#else
    return a * (vf)((__builtin_convertvector(k, vi) + 127) << 23);
#endif
}

/* e^x to within 1 unit in the last place; 0 below -87, e^87 above 87 (its reciprocal is still normal), NaN of NaN. */
static inline vf vf_exp(vf x) {
    vf k, less_one = vf_reduced(vf_min(vf_set(87.0f), vf_max(vf_set(-87.0f), x)), &k);
#if TT_WIDTH == 16
    __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(kept, (__m512)(less_one + 1.0f), (__m512)k);
#else
    vi tiny = x < -87.0f;
    return (vf)(~tiny & (vi)vf_scaled(less_one + 1.0f, k));
#endif
}

/* 1 / x to within 1 unit in the last place, for x and 1 / x normal. */
static inline vf vf_reciprocal(vf x) {
#if TT_WIDTH == 16
    vf y = (vf)_mm512_rcp14_ps((__m512)x); /* 14 bits; a Newton step doubles them */
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

/* tanh to within 3 units in the last place: (e^2x - 1) / (e^2x + 1), with e^2x - 1 formed where nothing cancels. */
static inline vf vf_tanh(vf x) {
    vf k, less_one = vf_reduced(vf_min(vf_set(18.0f), vf_max(vf_set(-18.0f), x + x)), &k);
    vf power = vf_scaled(vf_set(1.0f), k);
    vf d = power * less_one + (power - 1.0f);
    return d * vf_reciprocal(d + 2.0f);
}

/* Rows of a TT_WIDTH x TT_WIDTH block become its columns: log2(TT_WIDTH) rounds of perfect shuffles. */
static inline void vf_transpose(vf rows[TT_WIDTH]) {
    for (int round = 1; round < TT_WIDTH; round *= 2) {
        vf shuffled[TT_WIDTH];
        for (int i = 0; i < TT_WIDTH / 2; i++) {
            shuffled[2 * i] = vf_zip_low(rows[i], rows[i + TT_WIDTH / 2]);
            shuffled[2 * i + 1] = vf_zip_high(rows[i], rows[i + TT_WIDTH / 2]);
        }
        memcpy(rows, shuffled, sizeof shuffled);
    }
}

/* n values of either element type into float32, and back. */
static inline void load_row(float *to, const void *from, int64_t n, int dtype) {
    if (dtype == TT_FLOAT32) {
        memcpy(to, from, (size_t)n * sizeof(float));
        return;
    }
    const uint16_t *h = (const uint16_t *)from;
    int64_t i = 0;
    for (; i + TT_WIDTH <= n; i += TT_WIDTH) vf_store(to + i, vf_from_bf16(h + i));
    for (; i < n; i++) to[i] = bf16_value(h[i]);
}

static inline void store_row(void *to, const float *from, int64_t n, int dtype) {
    if (dtype == TT_FLOAT32) {
        memcpy(to, from, (size_t)n * sizeof(float));
        return;
    }
    uint16_t *h = (uint16_t *)to;
    int64_t i = 0;
    for (; i + TT_WIDTH <= n; i += TT_WIDTH) vf_to_bf16(h + i, vf_load(from + i));
    for (; i < n; i++) h[i] = bf16_round(from[i]);
}

static inline int64_t element_size(int dtype) { return dtype == TT_FLOAT32 ? 4 : 2; }

#endif
