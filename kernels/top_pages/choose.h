/* The best pages of a row without a sort: the least score among them is found bit by bit, then pages come in order. */

#include "vectors.h"

/* Scores as numbers that compare alike; NaN above all. */
INLINE vi ranks_of(const float *scores) {
    vf x = load((const char *)scores, 0, F32);
    vi bits = (vi)x, nan = x != x;
    bits ^= (bits >> 31) & 0x7fffffff;
    return (bits & ~nan) | (nan & 0x7fffffff);
}

INLINE int32_t rank_of(float score) {
    int32_t bits;
    memcpy(&bits, &score, sizeof bits);
    return score != score ? 0x7fffffff : bits ^ ((bits >> 31) & 0x7fffffff);
}

/* How many of a row rank at least so high. */
static int64_t reaching(const float *scores, int64_t pages, int32_t rank) {
    vi found = {0};
    int64_t at = 0, total = 0;
    for (; at + LANES <= pages; at += LANES) found -= ranks_of(scores + at) >= rank;
    for (int i = 0; i < LANES; i++) total += found[i];
    for (; at < pages; at++) total += rank_of(scores[at]) >= rank;
    return total;
}

/* The pages of one row, `count` of them with 0 < count < pages. */
static void choose(const float *scores, int64_t pages, int64_t count, int64_t *into) {
    /* The greatest rank that `count` pages reach: all reach the least one, and each bit is kept if enough still do. */
    uint32_t least = 0x80000000u;
    int64_t enough = pages;
    for (int bit = 31; bit >= 0 && enough > count; bit--) {
        const uint32_t higher = bit == 31 ? 0 : least | (uint32_t)1 << bit;
        const int64_t found = reaching(scores, pages, (int32_t)higher);
        if (found >= count) least = higher, enough = found;
    }
    /* More than enough reach it when several have the least score: the later of those are left out. */
    int64_t spare = enough, taken = 0;
    if (enough > count) spare = least == 0x7fffffff ? count : count - reaching(scores, pages, (int32_t)least + 1);
    for (int64_t page = 0; taken < count; page++) {
        const int32_t rank = rank_of(scores[page]);
        const int equal = rank == (int32_t)least;
        into[taken] = page;
        taken += rank > (int32_t)least || (equal && spare > 0);
        spare -= equal;
    }
}
