/* The best pages of every row. */

#include "top_pages/choose.h"

/* Scores [rows][pages]; the best `count` pages of each row, ascending. */
void kvtier_top_pages(const float *scores, int64_t rows, int64_t pages, int64_t count, int threads, int64_t *into) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) choose(scores + row * pages, pages, count, into + row * count);
}
