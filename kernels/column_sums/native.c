/* Column sums in one pass: products of a tile of queries with a few keys stay in registers until they are weights. */

#include <math.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vectors.h"

#define BLOCK 96     /* keys of a task */
#define TILE 12      /* keys whose products are held at once, for each vector of queries */
#define MOST_DIM 256 /* channels */
#define NEVER INT32_MAX

enum { PAIRS_OF_BF16 = 2 }; /* a third kind of operand: two channels in 32 bits, multiplied as they are */

typedef struct {
    int64_t queries, group, dim, window; /* no window: 0 */
    float scale, softcap;                /* no softcap: 0 */
} Shape;

/* Queries [V * 16] of one head: channels [dim][V * 16], lse and positions [V * 16], and the range of the positions. */
typedef struct {
    float *channels, *lse;
    int32_t *places, *range;
} Panel;

/* Keys of one KV head from one on: row by row, where they are, and the range of where. */
typedef struct {
    const char *rows;
    int64_t stride;
    int count;
    int32_t places[BLOCK], low, high;
} Keys;

/* Positions are compared in 32 bit; that of a query stays below NEVER. */
INLINE int32_t place_of(int64_t position, int32_t most) { return position < most ? (int32_t)position : most; }

INLINE int64_t panel_floats(int64_t dim, int lanes) { return (dim + 2) * lanes + LANES; }

INLINE Panel panel_at(float *panels, int64_t index, int64_t dim, int lanes) {
    float *start = panels + index * panel_floats(dim, lanes);
    int32_t *places = (int32_t *)(start + (dim + 1) * lanes);
    return (Panel){start, start + dim * lanes, places, places + lanes};
}

/* A query that sees no key has the lse -inf; against +inf all its weights are 0. Lanes without a query see no key. */
static void pack(const char *q, int q_type, int type, int64_t slot, const float *lse, const int64_t *positions,
                 int64_t dim, int lanes, int count, Panel panel) {
    panel.range[0] = NEVER, panel.range[1] = INT32_MIN;
    for (int i = 0; i < lanes; i++) {
        const int64_t at = i < count ? i : 0;
        panel.lse[i] = i < count && lse[at] != -INFINITY ? lse[at] : INFINITY;
        panel.places[i] = i < count ? (positions ? place_of(positions[at], NEVER - 1) : 0) : INT32_MIN;
        if (panel.places[i] < panel.range[0]) panel.range[0] = panel.places[i];
        if (panel.places[i] > panel.range[1]) panel.range[1] = panel.places[i];
        const char *row = q + at * slot;
        if (type == PAIRS_OF_BF16) {
            for (int64_t d = 0; d < dim / 2; d++) memcpy(panel.channels + d * lanes + i, row + 4 * d, 4);
            continue;
        }
        for (int64_t d = 0; d < dim; d += LANES) {
            vf x = load(row, d, q_type);
            for (int c = 0; c < LANES; c++) panel.channels[(d + c) * lanes + i] = x[c];
        }
    }
}

INLINE vf weights_of(vf products, const Shape *shape, vf lse) {
    vf x = products * shape->scale;
    if (shape->softcap > 0.0f) x = capped(x, shape->softcap);
    return exp_of(x - lse);
}

INLINE vi seen(vi places, int32_t place, int64_t window) {
    vi all = place <= places;
    return window ? all & (place > places - (int32_t)window) : all;
}

/* Weights of V vectors of queries for TILE keys, added to one vector of sums for each key. */
INLINE void tile_of(int V, int type, int masked, const Shape *shape, Panel panel, const Keys *keys, int at, vf *sums) {
    const int lanes = V * LANES;
    const char *row[TILE];
    vf sum[2 * TILE];
    for (int j = 0; j < TILE; j++)
        row[j] = keys->rows + (at + j < keys->count ? at + j : keys->count - 1) * keys->stride;
    for (int i = 0; i < V * TILE; i++) sum[i] = (vf){0};
    const int64_t steps = type == PAIRS_OF_BF16 ? shape->dim / 2 : shape->dim;
    for (int64_t d = 0; d < steps; d++) {
        vf query[2];
        for (int v = 0; v < V; v++) memcpy(&query[v], panel.channels + d * lanes + v * LANES, sizeof(vf));
        for (int j = 0; j < TILE; j++) {
            float key;
            memcpy(&key, row[j] + 4 * d, sizeof key);
            for (int v = 0; v < V; v++) {
#if defined(__AVX512BF16__)
                if (type == PAIRS_OF_BF16) {
                    sum[j * V + v] = (vf)_mm512_dpbf16_ps((__m512)sum[j * V + v], (__m512bh)(__m512)query[v],
                                                          (__m512bh)_mm512_set1_ps(key));
                    continue;
                }
#endif
                sum[j * V + v] += query[v] * key;
            }
        }
    }
    for (int v = 0; v < V; v++) {
        vf lse = load((const char *)panel.lse, v * LANES, F32);
        vi places;
        memcpy(&places, panel.places + v * LANES, sizeof places);
        for (int j = 0; j < TILE; j++) {
            vf weight = weights_of(sum[j * V + v], shape, lse);
            if (masked) weight = (vf)((vi)weight & seen(places, keys->places[at + j], shape->window));
            sums[at + j] += weight;
        }
    }
}

INLINE void panels_over(int V, int type, const Shape *shape, float *panels, int64_t first, int64_t count,
                        const Keys *keys, vf *sums) {
    for (int64_t i = first; i < first + count; i++) {
        Panel panel = panel_at(panels, i, shape->dim, V * LANES);
        const int32_t low = panel.range[0], high = panel.range[1];
        const int64_t window = shape->window ? shape->window : (int64_t)1 << 40;
        if (keys->low > high || keys->high <= low - window) continue;
        if (keys->high <= low && keys->low > high - window)
            for (int at = 0; at < keys->count; at += TILE) tile_of(V, type, 0, shape, panel, keys, at, sums);
        else
            for (int at = 0; at < keys->count; at += TILE) tile_of(V, type, 1, shape, panel, keys, at, sums);
    }
}

#define PANELS_OVER(NAME, V, TYPE)                                                                              \
    static void NAME(const Shape *shape, float *panels, int64_t first, int64_t count, const Keys *keys, vf *sums) { \
        panels_over(V, TYPE, shape, panels, first, count, keys, sums);                                          \
    }
PANELS_OVER(f32_by_16, 1, F32)
PANELS_OVER(f32_by_32, 2, F32)
PANELS_OVER(pairs_by_16, 1, PAIRS_OF_BF16)
PANELS_OVER(pairs_by_32, 2, PAIRS_OF_BF16)

INLINE void place(Keys *keys, const int64_t *positions) {
    keys->low = NEVER, keys->high = INT32_MIN;
    for (int j = 0; j < BLOCK; j++) {
        const int32_t at = j < keys->count ? (positions ? place_of(positions[j], NEVER) : 0) : NEVER;
        keys->places[j] = at;
        if (j < keys->count && at < keys->low) keys->low = at;
        if (j < keys->count && at > keys->high) keys->high = at;
    }
}

/* Whether two bf16 can be multiplied without widening them. */
int kvtier_multiplies_pairs(void) {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

int64_t kvtier_panel_floats(int64_t queries, int64_t dim) {
    const int lanes = queries <= LANES ? LANES : 2 * LANES;
    return (queries + lanes - 1) / lanes * panel_floats(dim, lanes);
}

/* Adds to sums [batch * heads * group][keys] what queries q [batch * heads * group][queries][dim] give to each key of
   their KV head. Strides in bytes; lse [batch * heads * group][queries]; q_pos [batch][queries] and k_pos
   [batch][k_heads][keys], or neither. `panels` has room for kvtier_panel_floats of every query head. */
void kvtier_column_sums(const char *q, int q_type, const float *lse, const char *k, int k_type, const int64_t *q_pos,
                        const int64_t *k_pos, int64_t k_heads, int64_t window, int64_t batch, int64_t heads,
                        int64_t group, int64_t queries, int64_t length, int64_t dim, int64_t q_outer, int64_t q_head,
                        int64_t q_slot, int64_t k_outer, int64_t k_head, int64_t k_slot, int64_t lse_head, int64_t q_pos_outer, float scale, float softcap,
                        int threads, float *panels, float *sums) {
    const Shape shape = {queries, group, dim, window, scale, softcap};
    const int V = queries <= LANES ? 1 : 2, lanes = V * LANES;
    const int type = q_type == BF16 && k_type == BF16 && kvtier_multiplies_pairs() ? PAIRS_OF_BF16 : F32;
    const int64_t each = (queries + lanes - 1) / lanes, blocks = (length + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * heads * group * each; i++) {
            const int64_t head = i / each, first = i % each * lanes, b = head / (heads * group);
            pack(q + b * q_outer + head % (heads * group) * q_head + first * q_slot, q_type, type, q_slot,
                 lse + head * lse_head + first, q_pos ? q_pos + b * q_pos_outer + first : 0, dim, lanes,
                 queries - first < lanes ? (int)(queries - first) : lanes, panel_at(panels, i, dim, lanes));
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < batch * heads * blocks; task++) {
            const int64_t head = task / blocks, start = task % blocks * BLOCK, b = head / heads, h = head % heads;
            const int64_t left = length - start;
            float wide[BLOCK * MOST_DIM];
            vf added[BLOCK];
            Keys keys = {k + b * k_outer + h * k_head + start * k_slot, k_slot, left < BLOCK ? (int)left : BLOCK};
            place(&keys, k_pos ? k_pos + (b * k_heads + (k_heads > 1 ? h : 0)) * length + start : 0);
            if (k_type == BF16 && type == F32) {
                for (int j = 0; j < keys.count; j++)
                    for (int64_t d = 0; d < dim; d += LANES)
                        store(wide + j * dim + d, load(keys.rows + j * k_slot, d, BF16));
                keys.rows = (const char *)wide, keys.stride = dim * 4;
            }
            for (int64_t g = 0; g < group; g++) {
                memset(added, 0, sizeof added);
                const int64_t row = head * group + g;
                if (type == F32) (V == 1 ? f32_by_16 : f32_by_32)(&shape, panels, row * each, each, &keys, added);
                else (V == 1 ? pairs_by_16 : pairs_by_32)(&shape, panels, row * each, each, &keys, added);
                for (int j = 0; j < keys.count; j += LANES) {
                    float total[LANES];
                    store(total, sums_of(added + j));
                    for (int i = 0; i < LANES && j + i < keys.count; i++) sums[row * length + start + j + i] += total[i];
                }
            }
        }
    }
}
