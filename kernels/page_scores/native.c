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

INLINE void fetch(const char *row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

/* Bounds [R][16 / R] of R queries for 16 / R pages from `page` on; pages past the last repeat it. */
INLINE void tile_of(int R, int type, const float *above, const float *below, const Bounds *bounds, int64_t page,
                    int64_t stop, float *into) {
    const int tile = LANES / R;
    const int64_t dim = bounds->dim, bytes = dim * bytes_of(type);
    const char *low[LANES], *high[LANES];
    vf sum[LANES];
    for (int i = 0; i < LANES; i++) sum[i] = (vf){0};
    for (int i = 0; i < tile; i++) {
        int64_t at = page + i < stop ? page + i : stop - 1;
        low[i] = bounds->low + at * bounds->low_page, high[i] = bounds->high + at * bounds->high_page;
        if (page + i + AHEAD < stop) {
            fetch(low[i] + AHEAD * bounds->low_page, bytes);
            fetch(high[i] + AHEAD * bounds->high_page, bytes);
        }
    }
    for (int64_t d = 0; d < dim; d += LANES) {
        vf positive[4], negative[4];
        for (int r = 0; r < R; r++) {
            memcpy(&positive[r], above + r * dim + d, sizeof(vf));
            memcpy(&negative[r], below + r * dim + d, sizeof(vf));
        }
        for (int i = 0; i < tile; i++) {
            vf least = load(low[i], d, type), greatest = load(high[i], d, type);
            for (int r = 0; r < R; r++) sum[r * tile + i] += greatest * positive[r] + least * negative[r];
        }
    }
    store(into, sums_of(sum));
}

INLINE void score(int R, int type, const float *above, const float *below, const Bounds *bounds, int64_t rows,
                  int reduce, int64_t start, int64_t stop, float *scores) {
    const int tile = LANES / R;
    float made[LANES];
    for (int64_t page = start; page < stop; page += tile) {
        float reduced[LANES];
        for (int i = 0; i < tile; i++) reduced[i] = reduce == MAX ? -INFINITY : 0.0f;
        for (int64_t r = 0; r < rows; r += R) {
            tile_of(R, type, above + r * bounds->dim, below + r * bounds->dim, bounds, page, stop, made);
            for (int k = 0; k < R; k++)
                for (int i = 0; i < tile; i++) {
                    float bound = made[k * tile + i];
                    /* Not `>`: a bound that is NaN must show. */
                    if (reduce != MAX) reduced[i] += bound;
                    else if (!(bound <= reduced[i])) reduced[i] = bound;
                }
        }
        for (int i = 0; i < tile && page + i < stop; i++)
            scores[page + i] = reduce == MEAN ? reduced[i] / (float)rows : reduced[i];
    }
}

/* Queries q [batch * heads][rows][dim] of `q_type`, bounds of `type`, scores [batch * heads][pages]. Strides in bytes. */
void kvtier_box_scores(const char *q, int q_type, const char *low, const char *high, int type, int64_t batch,
                       int64_t heads, int64_t pages, int64_t rows, int64_t dim, int64_t low_outer, int64_t low_head,
                       int64_t low_page, int64_t high_outer, int64_t high_head, int64_t high_page, int reduce,
                       int64_t splits, int threads, float *scores) {
    const int64_t tasks = batch * heads * splits, each = (pages + splits - 1) / splits;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t head = task / splits, b = head / heads, h = head % heads;
        const int64_t start = task % splits * each, stop = start + each < pages ? start + each : pages;
        float above[MOST_FLOATS], below[MOST_FLOATS];
        for (int64_t i = 0; i < rows * dim; i += LANES) {
            vf x = load(q + head * rows * dim * bytes_of(q_type), i, q_type);
            vi positive = x > 0.0f;
            store(above + i, (vf)((vi)x & positive));
            store(below + i, (vf)((vi)x & ~positive));
        }
        const Bounds bounds = {low + b * low_outer + h * low_head, high + b * high_outer + h * high_head, low_page,
                               high_page, dim};
        float *into = scores + head * pages;
#define SCORE(R, T) score(R, T, above, below, &bounds, rows, reduce, start, stop, into)
        if (type == BF16) {
            if (rows % 4 == 0) SCORE(4, BF16);
            else if (rows % 2 == 0) SCORE(2, BF16);
            else SCORE(1, BF16);
        } else {
            if (rows % 4 == 0) SCORE(4, F32);
            else if (rows % 2 == 0) SCORE(2, F32);
            else SCORE(1, F32);
        }
    }
}
