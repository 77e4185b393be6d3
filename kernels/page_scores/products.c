/* Products of queries with what sums a page up: its landmark, or the cells of its bit planes, unpacked in registers. */

#include <math.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "vectors.h"

#define MOST_FLOATS 4096 /* queries of a KV head times channels */
#define AHEAD 16         /* landmarks that are fetched before they are needed */

enum { MEAN = 0, MAX = 1, SUM = 2 };

/* Landmarks, or bounds and planes, of one KV head; strides in bytes. */
typedef struct {
    const char *low, *high, *planes;
    int64_t low_page, high_page, planes_page, plane, slot, slots, dim;
    int bits;
} Pages;

/* Products [R][16 / R] of R queries with 16 / R landmarks from `page` on; those past the last repeat it. */
INLINE vf landmarks_of(int R, int type, const float *q, const Pages *pages, int64_t page, int64_t stop) {
    const int tile = LANES / R;
    const char *row[LANES];
    vf sum[LANES];
    for (int i = 0; i < LANES; i++) sum[i] = (vf){0};
    for (int i = 0; i < tile; i++) {
        row[i] = pages->low + (page + i < stop ? page + i : stop - 1) * pages->low_page;
        if (page + i + AHEAD < stop) fetch(row[i] + AHEAD * pages->low_page, pages->dim * bytes_of(type));
    }
    for (int64_t d = 0; d < pages->dim; d += LANES) {
        vf query[4];
        for (int r = 0; r < R; r++) memcpy(&query[r], q + r * pages->dim + d, sizeof(vf));
        for (int i = 0; i < tile; i++) {
            vf x = load(row[i], d, type);
            for (int r = 0; r < R; r++) sum[r * tile + i] += x * query[r];
        }
    }
    return sums_of(sum);
}

/* Channels in the order of the bits of two bytes of a plane, lowest first: the highest bit of a byte is its first. */
INLINE vf turned(vf x) { return SHUFFLE(x, x, 7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8); }

/* Codes of 16 channels, in that order, from two bytes of each plane. */
INLINE vf codes_at(const char *planes, int64_t plane, int bits) {
    vf code = {0};
    for (int i = 0; i < bits; i++) {
        const uint8_t *two = (const uint8_t *)planes + i * plane;
        const uint16_t word = (uint16_t)(two[0] | two[1] << 8);
        const vf value = splat((float)(1 << (bits - 1 - i)));
#if defined(__AVX512F__)
        code = (vf)_mm512_mask_add_ps((__m512)code, word, (__m512)code, (__m512)value);
#else
        const vi bit = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                        1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
        code += (vf)((vi)value & ((bit & word) != 0));
#endif
    }
    return code;
}

/* Bounds [R] of R queries for one page: what is the same for all slots once, and the best product of the codes. */
INLINE void planes_of(int R, int type, int bits, const float *q, const Pages *pages, int64_t page, float *bounds) {
    const int tile = LANES / R;
    const int64_t dim = pages->dim;
    const char *low = pages->low + page * pages->low_page, *high = pages->high + page * pages->high_page;
    const float step = ldexpf(1.0f, -bits);
    float steps[MOST_FLOATS];
    vf sum[LANES], best = splat(-INFINITY);
    for (int i = 0; i < LANES; i++) sum[i] = (vf){0};
    for (int64_t d = 0; d < dim; d += LANES) {
        vf least = load(low, d, type), width = (load(high, d, type) - least) * step, half = width * 0.5f;
        for (int r = 0; r < R; r++) {
            vf query = load((const char *)q, r * dim + d, F32), size = (vf)((vi)query & 0x7fffffff);
            store(steps + r * dim + d, turned(query * width));
            sum[r] += query * (least + half) + size * half;
        }
    }
    const vf base = sums_of(sum);
    for (int64_t slot = 0; slot < pages->slots; slot += tile) {
        const char *row[LANES];
        for (int i = 0; i < LANES; i++) sum[i] = (vf){0};
        for (int i = 0; i < tile; i++) {
            const int64_t at = slot + i < pages->slots ? slot + i : pages->slots - 1;
            row[i] = pages->planes + page * pages->planes_page + at * pages->slot;
        }
        for (int64_t d = 0; d < dim; d += LANES) {
            vf width[4];
            for (int r = 0; r < R; r++) memcpy(&width[r], steps + r * dim + d, sizeof(vf));
            for (int i = 0; i < tile; i++) {
                vf code = codes_at(row[i] + d / 8, pages->plane, bits);
                for (int r = 0; r < R; r++) sum[r * tile + i] += code * width[r];
            }
        }
        best = larger(sums_of(sum), best);
    }
    for (int r = 0; r < R; r++) {
        float most = best[r * tile];
        for (int i = 1; i < tile; i++) most = best[r * tile + i] > most ? best[r * tile + i] : most;
        bounds[r] = base[r] + most;
    }
}

/* Not `>`: a score that is NaN must show. */
INLINE float joined(int reduce, float all, float one) {
    return reduce != MAX ? all + one : one <= all ? all : one;
}

INLINE float finished(int reduce, float all, int64_t rows) { return reduce == MEAN ? all / (float)rows : all; }

INLINE void score_landmarks(int R, int type, const float *q, const Pages *pages, int64_t rows, int reduce,
                            int64_t start, int64_t stop, float *scores) {
    const int tile = LANES / R;
    for (int64_t page = start; page < stop; page += tile) {
        float all[LANES];
        for (int i = 0; i < tile; i++) all[i] = reduce == MAX ? -INFINITY : 0.0f;
        for (int64_t r = 0; r < rows; r += R) {
            vf made = landmarks_of(R, type, q + r * pages->dim, pages, page, stop);
            for (int k = 0; k < LANES; k++) all[k % tile] = joined(reduce, all[k % tile], made[k]);
        }
        for (int i = 0; i < tile && page + i < stop; i++) scores[page + i] = finished(reduce, all[i], rows);
    }
}

INLINE void score_planes(int R, int type, int bits, const float *q, const Pages *pages, int64_t rows, int reduce,
                         int64_t start, int64_t stop, float *scores) {
    for (int64_t page = start; page < stop; page++) {
        float all = reduce == MAX ? -INFINITY : 0.0f, made[4];
        for (int64_t r = 0; r < rows; r += R) {
            planes_of(R, type, bits, q + r * pages->dim, pages, page, made);
            for (int k = 0; k < R; k++) all = joined(reduce, all, made[k]);
        }
        scores[page] = finished(reduce, all, rows);
    }
}

/* A range of the pages of one KV head, for queries [rows][dim]. */
typedef struct {
    const float *q;
    Pages pages;
    int64_t rows, start, stop;
    int reduce;
    float *scores;
} Share;

#define SCORE(CALL, R, ...) CALL(R, __VA_ARGS__, s->q, &s->pages, s->rows, s->reduce, s->start, s->stop, s->scores)
#define ROWS(CALL, ...)                                       \
    if (s->rows % 4 == 0) SCORE(CALL, 4, __VA_ARGS__);        \
    else if (s->rows % 2 == 0) SCORE(CALL, 2, __VA_ARGS__);   \
    else SCORE(CALL, 1, __VA_ARGS__)

static void landmarks_f32(const Share *s) { ROWS(score_landmarks, F32); }
static void landmarks_bf16(const Share *s) { ROWS(score_landmarks, BF16); }
static void planes_f32(const Share *s) { ROWS(score_planes, F32, s->pages.bits); }
static void planes_bf16(const Share *s) { ROWS(score_planes, BF16, s->pages.bits); }
static void one_plane_f32(const Share *s) { ROWS(score_planes, F32, 1); }
static void one_plane_bf16(const Share *s) { ROWS(score_planes, BF16, 1); }
static void two_planes_f32(const Share *s) { ROWS(score_planes, F32, 2); }
static void two_planes_bf16(const Share *s) { ROWS(score_planes, BF16, 2); }
static void four_planes_f32(const Share *s) { ROWS(score_planes, F32, 4); }
static void four_planes_bf16(const Share *s) { ROWS(score_planes, BF16, 4); }

/* Queries of every KV head, as fp32, and its pages in `splits`. */
static void over_heads(const char *q, int q_type, const Pages *first, const int64_t outer[3], const int64_t head[3],
                       int64_t batch, int64_t heads, int64_t count, int64_t rows, int reduce, int64_t splits,
                       int threads, float *scores, void (*score)(const Share *)) {
    const int64_t each = (count + splits - 1) / splits, floats = rows * first->dim;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t task = 0; task < batch * heads * splits; task++) {
        const int64_t i = task / splits, b = i / heads, h = i % heads, start = task % splits * each;
        float queries[MOST_FLOATS];
        for (int64_t at = 0; at < floats; at += LANES)
            store(queries + at, load(q + i * floats * bytes_of(q_type), at, q_type));
        Pages pages = *first;
        pages.low += b * outer[0] + h * head[0];
        pages.high += b * outer[1] + h * head[1];
        pages.planes += b * outer[2] + h * head[2];
        const Share share = {queries, pages, rows, start, start + each < count ? start + each : count, reduce,
                             scores + i * count};
        score(&share);
    }
}

/* Queries q [batch * heads][rows][dim] of `q_type`, landmarks of `type`, scores [batch * heads][pages]. Strides in
   bytes. */
void kvtier_landmark_scores(const char *q, int q_type, const char *landmarks, int type, int64_t batch, int64_t heads,
                            int64_t count, int64_t rows, int64_t dim, int64_t outer, int64_t head, int64_t page,
                            int reduce, int64_t splits, int threads, float *scores) {
    const Pages pages = {landmarks, landmarks, landmarks, page, 0, 0, 0, 0, 0, dim, 0};
    const int64_t outers[3] = {outer, 0, 0}, steps[3] = {head, 0, 0};
    over_heads(q, q_type, &pages, outers, steps, batch, heads, count, rows, reduce, splits, threads, scores,
               type == BF16 ? landmarks_bf16 : landmarks_f32);
}

/* The same for bounds of `type` and the first `bits` planes of their pages: [pages][plane][slot][dim / 8] bytes. */
void kvtier_plane_scores(const char *q, int q_type, const char *low, const char *high, int type, const char *planes,
                         int bits, int64_t slots, int64_t batch, int64_t heads, int64_t count, int64_t rows,
                         int64_t dim, int64_t low_outer, int64_t low_head, int64_t low_page, int64_t high_outer,
                         int64_t high_head, int64_t high_page, int64_t planes_outer, int64_t planes_head,
                         int64_t planes_page, int64_t plane, int64_t slot, int reduce, int64_t splits, int threads,
                         float *scores) {
    const Pages pages = {low, high, planes, low_page, high_page, planes_page, plane, slot, slots, dim, bits};
    const int64_t outers[3] = {low_outer, high_outer, planes_outer}, steps[3] = {low_head, high_head, planes_head};
    over_heads(q, q_type, &pages, outers, steps, batch, heads, count, rows, reduce, splits, threads, scores,
               bits == 1   ? (type == BF16 ? one_plane_bf16 : one_plane_f32)
               : bits == 2 ? (type == BF16 ? two_planes_bf16 : two_planes_f32)
               : bits == 4 ? (type == BF16 ? four_planes_bf16 : four_planes_f32)
                           : (type == BF16 ? planes_bf16 : planes_f32));
}
