/* Vectors of 16 floats: loads that widen bf16, a transposing sum, and exp. GCC and clang lower them to what the CPU has. */

#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __AVX512BF16__
#define PAIRED 1
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef int16_t vs __attribute__((vector_size(32)));

/* PAIRS: bf16 that is multiplied by bf16, two channels at once, where the CPU can. */
enum { F32 = 0, BF16 = 1, PAIRS = 2 };

INLINE int64_t bytes_of(int type) { return type == F32 ? 4 : 2; }

/* 16 channels from channel `at` on. A bf16 is the upper half of an fp32: widening is exact. */
INLINE vf load(const char *row, int64_t at, int type) {
    if (type == BF16) {
        vh half;
        memcpy(&half, row + 2 * at, sizeof half);
#ifdef __AVX512F__
        /* GCC 12 makes five instructions of what is one. */
        return (vf)((vu)_mm512_cvtepu16_epi32((__m256i)half) << 16);
#else
        return (vf)(__builtin_convertvector(half, vu) << 16);
#endif
    }
    vf full;
    memcpy(&full, row + 4 * at, sizeof full);
    return full;
}

/* Brings a line into the L2 cache, ahead of its use. One between two products takes no time; a row of them waits for
   memory, as a core has only some two dozen on their way. */
INLINE void fetch_line(const char *at) { __builtin_prefetch(at, 0, 2); }

INLINE void fetch(const char *row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) fetch_line(row + at);
}

/* `sum` and the products of row and query from channels `at` and `of` on: of 16 channels; of two for a sum in PAIRS.
   The query is fp32, or in PAIRS bf16. There products are exact, and a number below 2^-126 counts as 0. */
INLINE vf plus_products(vf sum, const char *row, int64_t at, const char *query, int64_t of, int type) {
#ifdef PAIRED
    if (type == PAIRS) {
        __m512bh a, b;
        memcpy(&a, row + 2 * at, sizeof a);
        memcpy(&b, query + 2 * of, sizeof b);
        return (vf)_mm512_dpbf16_ps((__m512)sum, a, b);
    }
#endif
    return sum + load(row, at, type) * load(query, of, F32);
}

/* Whether any lane of a comparison holds. */
INLINE int any(vi mask) {
    uint64_t words[8], all = 0;
    memcpy(words, &mask, sizeof words);
    for (int i = 0; i < 8; i++) all |= words[i];
    return all != 0;
}

INLINE void store(float *into, vf x) { memcpy(into, &x, sizeof x); }

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf larger(vf a, vf b) {
    vi first = a > b;
    return (vf)(((vi)a & first) | ((vi)b & ~first));
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* Three steps of a transposing sum: each joins two vectors and halves what is left to add within them. */
#define PAIRS(a, b)                                                                          \
    (SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +               \
     SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31))
#define FOURS(a, b)                                                                          \
    (SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +               \
     SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#define EIGHTS(a, b)                                                                         \
    (SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +               \
     SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))

/* The sums of 16 vectors, in their order. */
INLINE vf sums_of(const vf x[LANES]) {
    vf four[4];
    for (int i = 0; i < 4; i++) {
        const vf *y = x + 4 * i;
        vf a = PAIRS(y[0], y[1]), b = PAIRS(y[2], y[3]);
        four[i] = FOURS(a, b);
    }
    vf low = EIGHTS(four[0], four[1]), high = EIGHTS(four[2], four[3]);
    return EIGHTS(low, high);
}

/* exp(x) for x <= 0 to about an ulp, 0 below the least normal number; NaN stays NaN. */
INLINE vf exp_of(vf x) {
    const vf least = splat(-87.3f);
    vi under = x < least;
    vf t = x * 1.44269504088896341f, magic = splat(12582912.0f);
    t = (vf)((vi)t & ~under);
    vf n = (t + magic) - magic;
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vf two = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return (vf)((vi)(p * two) & ~under);
}

/* The same down to the least subnormal number, to some 1e-5 there: for what is ranked, not only summed. */
INLINE vf small_exp_of(vf x) {
    const vi small = x < splat(-87.0f);
    vf e = exp_of(x);
    if (any(small)) {
        vf scaled = exp_of(x + 44.3614195558364998f) * 0x1p-64f; /* 64 ln 2 */
        e = (vf)(((vi)scaled & small) | ((vi)e & ~small));
    }
    return e;
}

/* softcap * tanh(x / softcap), by exp of what is not positive. */
INLINE vf capped(vf x, float softcap) {
    vi negative = x < 0.0f;
    vf size = (vf)((vi)x & 0x7fffffff);
    vf e = exp_of(size * (-2.0f / softcap));
    vf t = softcap * ((1.0f - e) / (1.0f + e));
    return (vf)((vi)t | (negative & (vi)splat(-0.0f)));
}
