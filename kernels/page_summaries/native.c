/* Bounds and means of the keys of a page, read once where they lie. */

#include "vectors.h"

#define AHEAD 4096 /* bytes that are fetched before they are needed */

/* Pages of slots of `dim` channels; strides in bytes. */
typedef struct {
    const char *k;
    int64_t heads, pages, slots, dim, outer, head, page, slot;
    int type;
} Pages;

INLINE vf chosen(vi first, vf a, vf b) { return (vf)(((vi)a & first) | ((vi)b & ~first)); }

/* Channels are written in the type of the keys; to bf16 the nearest, ties to even. */
INLINE void put(char *row, int64_t at, vf x, int type) {
    if (type == F32) {
        store((float *)row + at, x);
        return;
    }
    vu bits = (vu)x;
    vu nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    vi number = x == x;
    bits = (nearest & (vu)number) | ((bits | 0x400000u) & ~(vu)number);
    vh half = __builtin_convertvector(bits >> 16, vh);
    memcpy(row + 2 * at, &half, sizeof half);
}

/* C vectors of channels of one page from `from` on; a NaN among them makes both bounds NaN. */
INLINE void bounds_of(int C, int type, const Pages *p, const char *page, int64_t from, char *low, char *high) {
    vf least[8], most[8];
    vi odd[8];
    for (int c = 0; c < C; c++) least[c] = most[c] = load(page, from + c * LANES, type), odd[c] = (vi){0};
    for (int64_t slot = 0; slot < p->slots; slot++) {
        const char *row = page + slot * p->slot;
        fetch(row + from * bytes_of(type) + AHEAD, C * LANES * bytes_of(type));
        for (int c = 0; c < C; c++) {
            vf x = load(row, from + c * LANES, type);
            least[c] = chosen(x < least[c], x, least[c]);
            most[c] = chosen(x > most[c], x, most[c]);
            odd[c] |= x != x;
        }
    }
    for (int c = 0; c < C; c++) {
        put(low, from + c * LANES, (vf)((vi)least[c] | odd[c]), type);
        put(high, from + c * LANES, (vf)((vi)most[c] | odd[c]), type);
    }
}

INLINE void mean_of(int C, int type, const Pages *p, const char *page, int64_t from, char *mean) {
    vf sum[8];
    for (int c = 0; c < C; c++) sum[c] = (vf){0};
    for (int64_t slot = 0; slot < p->slots; slot++) {
        const char *row = page + slot * p->slot;
        fetch(row + from * bytes_of(type) + AHEAD, C * LANES * bytes_of(type));
        for (int c = 0; c < C; c++) sum[c] += load(row, from + c * LANES, type);
    }
    for (int c = 0; c < C; c++) put(mean, from + c * LANES, sum[c] / (float)p->slots, type);
}

INLINE void summary_of(int type, int means, const Pages *p, const char *page, char *first, char *second) {
#define PART(C)                                                    \
    if (means) mean_of(C, type, p, page, from, first);             \
    else bounds_of(C, type, p, page, from, first, second)
    int64_t from = 0;
    for (; from + 8 * LANES <= p->dim; from += 8 * LANES) PART(8);
    for (; from + 4 * LANES <= p->dim; from += 4 * LANES) PART(4);
    for (; from < p->dim; from += LANES) PART(1);
}

#define SUMMARY_OF(NAME, TYPE, MEANS)                                                  \
    static void NAME(const Pages *p, const char *page, char *first, char *second) {    \
        summary_of(TYPE, MEANS, p, page, first, second);                               \
    }
SUMMARY_OF(bounds_f32, F32, 0)
SUMMARY_OF(bounds_bf16, BF16, 0)
SUMMARY_OF(means_f32, F32, 1)
SUMMARY_OF(means_bf16, BF16, 1)

static void all_pages(const Pages *p, int64_t batch, int threads, char *first, char *second,
                      void (*summary)(const Pages *, const char *, char *, char *)) {
    const int64_t bytes = p->dim * bytes_of(p->type);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < batch * p->heads * p->pages; i++) {
        const int64_t head = i / p->pages;
        const char *page = p->k + head / p->heads * p->outer + head % p->heads * p->head + i % p->pages * p->page;
        summary(p, page, first + i * bytes, second + i * bytes);
    }
}

/* low and high [batch * heads * pages][dim] of keys in [batch][heads][pages][slots][dim], all of `type`. */
void kvtier_page_bounds(const char *k, int type, int64_t batch, int64_t heads, int64_t pages, int64_t slots,
                        int64_t dim, int64_t outer, int64_t head, int64_t page, int64_t slot, int threads, char *low,
                        char *high) {
    const Pages p = {k, heads, pages, slots, dim, outer, head, page, slot, type};
    all_pages(&p, batch, threads, low, high, type == BF16 ? bounds_bf16 : bounds_f32);
}

/* The same for the means [batch * heads * pages][dim]. */
void kvtier_page_means(const char *k, int type, int64_t batch, int64_t heads, int64_t pages, int64_t slots,
                       int64_t dim, int64_t outer, int64_t head, int64_t page, int64_t slot, int threads, char *means) {
    const Pages p = {k, heads, pages, slots, dim, outer, head, page, slot, type};
    all_pages(&p, batch, threads, means, means, type == BF16 ? means_bf16 : means_f32);
}
