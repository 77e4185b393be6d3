/* Box bounds of pages. */

#include "page_scores/boxes.h"

/* Queries q [batch * heads][rows][dim] of `q_type`, bounds of `type`, scores [batch * heads][pages]. Strides in bytes. */
void kvtier_box_scores(const char *q, int q_type, const char *low, const char *high, int type, int64_t batch,
                       int64_t heads, int64_t pages, int64_t rows, int64_t dim, int64_t low_outer, int64_t low_head,
                       int64_t low_page, int64_t high_outer, int64_t high_head, int64_t high_page, int reduce,
                       int64_t splits, int threads, float *scores) {
    const Boxes boxes = {q, low, high, q_type, type, reduce, heads, rows, dim, low_outer, low_head, low_page,
                         high_outer, high_head, high_page};
    const int64_t tasks = batch * heads * splits, each = (pages + splits - 1) / splits;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t start = task % splits * each, stop = start + each < pages ? start + each : pages;
        score_boxes(&boxes, task / splits, start, stop, scores + task / splits * pages);
    }
}
