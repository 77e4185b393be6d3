/* Box bounds of pages, each bound read once: relu(q) . kmax + min(q, 0) . kmin, reduced over the queries of a KV head. */

#include <math.h>

#include "vectors.h"

#define MOST_FLOATS 4096 /* queries of a KV head times channels */
#define AHEAD 16         /* pages that are fetched before they are needed */

enum { MEAN = 0, MAX = 1, SUM = 2 };

/* Bounds of one KV head; strides in bytes. */
typedef struct {
    const char *low, *high;
    int64_t low_page, high_page, dim;
} Bounds;

/* Bounds [R][16 / R] of R queries for 16 / R pages from `page` on; pages past the last repeat it. */
INLINE vf tile_of(int R, int type, const char *above, const char *below, const Bounds *bounds, int64_t page,
                  int64_t stop) {
    const int tile = LANES / R, step = type == PAIRS ? 2 * LANES : LANES;
    const int64_t dim = bounds->dim;
    const char *low[LANES], *high[LANES], *next_low[LANES], *next_high[LANES];
    vf sum[LANES];
    for (int i = 0; i < LANES; i++) sum[i] = (vf){0};
    for (int i = 0; i < tile; i++) {
        int64_t at = page + i < stop ? page + i : stop - 1;
        low[i] = bounds->low + at * bounds->low_page, high[i] = bounds->high + at * bounds->high_page;
        const int64_t ahead = page + i + AHEAD < stop ? AHEAD : 0;
        next_low[i] = low[i] + ahead * bounds->low_page, next_high[i] = high[i] + ahead * bounds->high_page;
    }
    for (int64_t d = 0; d < dim; d += step)
        for (int i = 0; i < tile; i++) {
            fetch_line(next_low[i] + d * bytes_of(type));
            fetch_line(next_high[i] + d * bytes_of(type));
            for (int r = 0; r < R; r++) {
                vf *made = &sum[r * tile + i];
                *made = plus_products(*made, high[i], d, above, r * dim + d, type);
                *made = plus_products(*made, low[i], d, below, r * dim + d, type);
            }
        }
    return sums_of(sum);
}

/* Bounds of two queries as one, lane by lane; one that is NaN shows. */
INLINE vf joined(int reduce, vf a, vf b) {
    if (reduce != MAX) return a + b;
    const vi first = (a > b) | (a != a);
    return (vf)(((vi)a & first) | ((vi)b & ~first));
}

/* Bounds [R][16 / R] of all R queries as one, in the first 16 / R lanes. */
INLINE vf over_queries(int R, int reduce, vf x) {
    if (R >= 2) x = joined(reduce, x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    if (R >= 4) x = joined(reduce, x, SHUFFLE(x, x, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3));
    return x;
}

INLINE void score(int R, int type, const char *above, const char *below, const Bounds *bounds, int64_t rows,
                  int reduce, int64_t start, int64_t stop, float *scores) {
    const int64_t tile = LANES / R, query_bytes = bounds->dim * (type == PAIRS ? 2 : 4);
    for (int64_t page = start; page < stop; page += tile) {
        vf all = tile_of(R, type, above, below, bounds, page, stop);
        for (int64_t r = R; r < rows; r += R)
            all = joined(reduce, all, tile_of(R, type, above + r * query_bytes, below + r * query_bytes, bounds, page, stop));
        all = over_queries(R, reduce, all);
        if (reduce == MEAN) all /= (float)rows;
        memcpy(scores + page, &all, (stop - page < tile ? stop - page : tile) * sizeof(float));
    }
}

/* relu(q) and min(q, 0) of so many numbers: as they are for PAIRS, or in fp32. */
static void halves(const char *q, int q_type, int type, int64_t numbers, char *above, char *below) {
    for (int64_t i = 0; i < numbers; i += LANES) {
        if (type == PAIRS) {
            vh x, positive;
            memcpy(&x, q + 2 * i, sizeof x);
            positive = (vh)((vs)x > 0);
            x &= positive;
            memcpy(above + 2 * i, &x, sizeof x);
            memcpy(&x, q + 2 * i, sizeof x);
            x &= ~positive;
            memcpy(below + 2 * i, &x, sizeof x);
        } else {
            vf x = load(q, i, q_type);
            vi positive = x > 0.0f;
            store((float *)above + i, (vf)((vi)x & positive));
            store((float *)below + i, (vf)((vi)x & ~positive));
        }
    }
}

/* Bounds of all KV heads, and queries q [batch * heads][rows][dim] of `q_type`; strides in bytes. */
typedef struct {
    const char *q, *low, *high;
    int q_type, type, reduce;
    int64_t heads, rows, dim, low_outer, low_head, low_page, high_outer, high_head, high_page;
} Boxes;

/* Scores of the pages `start` to `stop` of one head. */
static void score_boxes(const Boxes *boxes, int64_t head, int64_t start, int64_t stop, float *scores) {
    const int64_t b = head / boxes->heads, h = head % boxes->heads, rows = boxes->rows, dim = boxes->dim;
    int type = boxes->type;
#ifdef PAIRED
    if (type == BF16 && boxes->q_type == BF16 && dim % (2 * LANES) == 0) type = PAIRS;
#endif
    float above[MOST_FLOATS], below[MOST_FLOATS];
    halves(boxes->q + head * rows * dim * bytes_of(boxes->q_type), boxes->q_type, type, rows * dim, (char *)above,
           (char *)below);
    const Bounds bounds = {boxes->low + b * boxes->low_outer + h * boxes->low_head,
                           boxes->high + b * boxes->high_outer + h * boxes->high_head, boxes->low_page,
                           boxes->high_page, dim};
#define SCORE(R, T) \
    score(R, T, (const char *)above, (const char *)below, &bounds, rows, boxes->reduce, start, stop, scores)
#define SCORES(T)                        \
    if (rows % 4 == 0) SCORE(4, T);      \
    else if (rows % 2 == 0) SCORE(2, T); \
    else SCORE(1, T)
    if (type == F32) {
        SCORES(F32);
#ifdef PAIRED
    } else if (type == PAIRS) {
        SCORES(PAIRS);
#endif
    } else {
        SCORES(BF16);
    }
}
