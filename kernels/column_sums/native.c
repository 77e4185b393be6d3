/* Column sums in one pass: products of queries and keys stay in registers until they are weights, and are summed.

   Of many queries, lanes are queries: 32 of them meet 12 keys at a time. Of few, lanes are channels. */

#include <math.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vectors.h"

#define BLOCK 96     /* keys of a task */
#define TILE 12      /* keys that meet a panel of queries at once */
#define MOST_DIM 256 /* channels */
#define FEW 6        /* queries of a head for which lanes are channels */
#define AHEAD 16     /* keys that are fetched before they are needed */
#define NEVER INT32_MAX

enum { BOTH_BF16 = 2 }; /* a third kind of operand: two bf16 in 32 bits, multiplied by two as they are */

/* Strides in bytes, those of lse and q_pos in elements. */
typedef struct {
    const char *q, *k;
    const float *lse;
    const int64_t *q_pos, *k_pos; /* or neither */
    int q_type, k_type;
    int64_t k_heads, window, heads, group, queries, length, dim; /* no window: 0 */
    int64_t q_outer, q_head, q_slot, k_outer, k_head, k_slot, lse_head, q_pos_outer;
    float scale, softcap; /* no softcap: 0 */
} Problem;

/* Queries [lanes] of one head: channels [dim][lanes], lse and positions [lanes], and the range of the positions. */
typedef struct {
    float *channels, *lse;
    int32_t *places, *range;
} Panel;

/* Keys of one KV head from one on: a block, row by row, and all that follow; their positions and the range of them. */
typedef struct {
    const char *rows;
    int64_t stride, left;
    int count;
    int32_t places[BLOCK], low, high;
} Keys;

INLINE void fetch_key(const Keys *keys, int64_t at, int64_t bytes) {
    if (at < keys->left) fetch(keys->rows + at * keys->stride, bytes);
}

/* Positions are compared in 32 bit, and that of a query is below NEVER. */
INLINE int32_t place_of(int64_t position, int32_t most) { return position < most ? (int32_t)position : most; }

INLINE int lanes_of(int64_t queries) { return queries <= LANES ? LANES : 2 * LANES; }

INLINE int64_t panel_floats(int64_t dim, int lanes) { return (dim + 2) * lanes + LANES; }

INLINE Panel panel_at(float *panels, int64_t index, int64_t dim, int lanes) {
    float *start = panels + index * panel_floats(dim, lanes);
    int32_t *places = (int32_t *)(start + (dim + 1) * lanes);
    return (Panel){start, start + dim * lanes, places, places + lanes};
}

INLINE const char *query_at(const Problem *p, int64_t head, int64_t query) {
    const int64_t all = p->heads * p->group;
    return p->q + head / all * p->q_outer + head % all * p->q_head + query * p->q_slot;
}

/* A query that sees no key has the lse -inf; against +inf all its weights are 0. */
INLINE float lse_at(const Problem *p, int64_t head, int64_t query) {
    float lse = p->lse[head * p->lse_head + query];
    return lse == -INFINITY ? INFINITY : lse;
}

INLINE int32_t query_place(const Problem *p, int64_t head, int64_t query) {
    return p->q_pos ? place_of(p->q_pos[head / (p->heads * p->group) * p->q_pos_outer + query], NEVER - 1) : 0;
}

/* Lanes without a query see no key. */
static void pack(const Problem *p, int64_t head, int64_t first, int lanes, int pairs, Panel panel) {
    const int64_t count = p->queries - first < lanes ? p->queries - first : lanes;
    panel.range[0] = NEVER, panel.range[1] = INT32_MIN;
    for (int i = 0; i < lanes; i++) {
        const int64_t query = first + (i < count ? i : 0);
        const char *row = query_at(p, head, query);
        panel.lse[i] = lse_at(p, head, query);
        panel.places[i] = i < count ? query_place(p, head, query) : -1;
        if (panel.places[i] < panel.range[0]) panel.range[0] = panel.places[i];
        if (panel.places[i] > panel.range[1]) panel.range[1] = panel.places[i];
        for (int64_t d = 0; pairs && d < p->dim / 2; d++) memcpy(panel.channels + d * lanes + i, row + 4 * d, 4);
        for (int64_t d = 0; !pairs && d < p->dim; d += LANES) {
            vf x = load(row, d, p->q_type);
            for (int c = 0; c < LANES; c++) panel.channels[(d + c) * lanes + i] = x[c];
        }
    }
}

INLINE vf weights_of(vf products, const Problem *p, vf lse) {
    vf x = products * p->scale;
    if (p->softcap > 0.0f) x = capped(x, p->softcap);
    return small_exp_of(x - lse);
}

/* Which queries at `places` see keys at `at`. */
INLINE vi seen(vi places, vi at, int64_t window) {
    vi all = at <= places;
    return window ? all & (at > places - (int32_t)window) : all;
}

/* Weights of V vectors of queries for TILE keys, added to one vector of sums for each key. */
INLINE void tile_of(int V, int type, int masked, const Problem *p, Panel panel, const Keys *keys, int at, vf *sums) {
    const char *row[TILE];
    vf sum[2 * TILE];
    for (int j = 0; j < TILE; j++)
        row[j] = keys->rows + (at + j < keys->count ? at + j : keys->count - 1) * keys->stride;
    for (int j = 0; j < TILE; j++) fetch_key(keys, at + j + TILE, p->dim * (type == BOTH_BF16 ? 2 : 4));
    for (int i = 0; i < V * TILE; i++) sum[i] = (vf){0};
    const int64_t words = type == BOTH_BF16 ? p->dim / 2 : p->dim;
    for (int64_t d = 0; d < words; d++) {
        vf query[2];
        for (int v = 0; v < V; v++) memcpy(&query[v], panel.channels + (d * V + v) * LANES, sizeof(vf));
        for (int j = 0; j < TILE; j++) {
            float key;
            memcpy(&key, row[j] + 4 * d, sizeof key);
            for (int v = 0; v < V; v++) {
#if defined(__AVX512BF16__)
                if (type == BOTH_BF16) {
                    __m512bh two = (__m512bh)_mm512_set1_ps(key);
                    sum[j * V + v] = (vf)_mm512_dpbf16_ps((__m512)sum[j * V + v], (__m512bh)query[v], two);
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
            vf weight = weights_of(sum[j * V + v], p, lse);
            if (masked) weight = (vf)((vi)weight & seen(places, keys->places[at + j] - (vi){0}, p->window));
            sums[at + j] += weight;
        }
    }
}

/* All panels of a head meet a block of keys: those that see none of it are skipped, those that see all need no mask. */
INLINE void panels_over(int V, int type, const Problem *p, float *panels, int64_t first, int64_t count,
                        const Keys *keys, vf *sums) {
    for (int64_t i = first; i < first + count; i++) {
        Panel panel = panel_at(panels, i, p->dim, V * LANES);
        const int64_t low = panel.range[0], high = panel.range[1];
        if (keys->low > high || (p->window && keys->high <= low - p->window)) continue;
        if (keys->high <= low && (!p->window || keys->low > high - p->window))
            for (int at = 0; at < keys->count; at += TILE) tile_of(V, type, 0, p, panel, keys, at, sums);
        else
            for (int at = 0; at < keys->count; at += TILE) tile_of(V, type, 1, p, panel, keys, at, sums);
    }
}

#define PANELS_OVER(NAME, V, TYPE)                                                                                 \
    static void NAME(const Problem *p, float *panels, int64_t first, int64_t count, const Keys *keys, vf *sums) {  \
        panels_over(V, TYPE, p, panels, first, count, keys, sums);                                                 \
    }
PANELS_OVER(f32_by_16, 1, F32)
PANELS_OVER(f32_by_32, 2, F32)
PANELS_OVER(pairs_by_16, 1, BOTH_BF16)
PANELS_OVER(pairs_by_32, 2, BOTH_BF16)

/* R queries, channels [R][dim], and 16 / R keys at a time: the 16 products fill a vector, query by query. */
INLINE void rows_over(int R, int type, const Problem *p, const float *q, const float *lse, const int32_t *places,
                      const Keys *keys, float *const *sums) {
    const int tile = LANES / R;
    float totals[LANES];
    vi from, at_keys;
    for (int i = 0; i < LANES; i++) totals[i] = lse[i / tile], from[i] = places[i / tile];
    for (int at = 0; at < keys->count; at += tile) {
        const char *row[LANES];
        vf sum[LANES];
        for (int i = 0; i < tile; i++) {
            row[i] = keys->rows + (at + i < keys->count ? at + i : keys->count - 1) * keys->stride;
            fetch_key(keys, at + i + AHEAD, p->dim * bytes_of(type));
        }
        for (int i = 0; i < LANES; i++) sum[i] = (vf){0}, at_keys[i] = keys->places[at + i % tile];
        for (int64_t d = 0; d < p->dim; d += LANES) {
            vf query[4];
            for (int r = 0; r < R; r++) memcpy(&query[r], q + r * p->dim + d, sizeof(vf));
            for (int i = 0; i < tile; i++) {
                vf key = load(row[i], d, type);
                for (int r = 0; r < R; r++) sum[r * tile + i] += key * query[r];
            }
        }
        vf weight = weights_of(sums_of(sum), p, load((const char *)totals, 0, F32));
        float weights[LANES];
        store(weights, (vf)((vi)weight & seen(from, at_keys, p->window)));
        for (int r = 0; r < R; r++)
            for (int i = 0; i < tile && at + i < keys->count; i++) sums[r][at + i] += weights[r * tile + i];
    }
}

#define ROWS_OVER(NAME, R, TYPE)                                                                                  \
    static void NAME(const Problem *p, const float *q, const float *lse, const int32_t *places, const Keys *keys, \
                     float *const *sums) {                                                                        \
        rows_over(R, TYPE, p, q, lse, places, keys, sums);                                                        \
    }
ROWS_OVER(f32_of_1, 1, F32)
ROWS_OVER(f32_of_2, 2, F32)
ROWS_OVER(f32_of_4, 4, F32)
ROWS_OVER(bf16_of_1, 1, BF16)
ROWS_OVER(bf16_of_2, 2, BF16)
ROWS_OVER(bf16_of_4, 4, BF16)

static void find(const Problem *p, int64_t head, int64_t start, Keys *keys) {
    const int64_t b = head / p->heads, h = head % p->heads, left = p->length - start;
    const int64_t *positions = p->k_pos ? p->k_pos + (b * p->k_heads + (p->k_heads > 1 ? h : 0)) * p->length + start : 0;
    keys->rows = p->k + b * p->k_outer + h * p->k_head + start * p->k_slot;
    keys->stride = p->k_slot, keys->left = left, keys->count = left < BLOCK ? (int)left : BLOCK;
    keys->low = NEVER, keys->high = INT32_MIN;
    for (int j = 0; j < keys->count; j++) {
        const int32_t at = keys->places[j] = positions ? place_of(positions[j], NEVER) : 0;
        if (at < keys->low) keys->low = at;
        if (at > keys->high) keys->high = at;
    }
    for (int j = keys->count; j < BLOCK; j++) keys->places[j] = NEVER;
}

/* A block of keys and the queries of one KV head, in panels. */
static void over_many(const Problem *p, int64_t head, int64_t start, int pairs, float *panels, float *sums) {
    const int lanes = lanes_of(p->queries);
    const int64_t each = (p->queries + lanes - 1) / lanes;
    float wide[BLOCK * MOST_DIM];
    Keys keys;
    find(p, head, start, &keys);
    if (p->k_type == BF16 && !pairs) {
        for (int j = 0; j < keys.count; j++)
            for (int64_t d = 0; d < p->dim; d += LANES)
                store(wide + j * p->dim + d, load(keys.rows + j * keys.stride, d, BF16));
        keys.rows = (const char *)wide, keys.stride = p->dim * 4;
    }
    for (int64_t row = head * p->group; row < (head + 1) * p->group; row++) {
        vf added[BLOCK] = {0};
        if (pairs) (lanes == LANES ? pairs_by_16 : pairs_by_32)(p, panels, row * each, each, &keys, added);
        else (lanes == LANES ? f32_by_16 : f32_by_32)(p, panels, row * each, each, &keys, added);
        for (int j = 0; j < keys.count; j += LANES) {
            vf total = sums_of(added + j);
            for (int i = 0; i < LANES && j + i < keys.count; i++) sums[row * p->length + start + j + i] += total[i];
        }
    }
}

/* A block of keys and the queries of one KV head, four at a time. */
static void over_few(const Problem *p, int64_t head, int64_t start, float *sums) {
    float q[4 * MOST_DIM], lse[4], *into[4];
    int32_t places[4];
    Keys keys;
    find(p, head, start, &keys);
    const int64_t rows = p->group * p->queries;
    for (int64_t first = 0, taken; first < rows; first += taken) {
        taken = rows - first >= 4 ? 4 : rows - first >= 2 ? 2 : 1;
        for (int64_t r = 0; r < taken; r++) {
            const int64_t row = head * p->group + (first + r) / p->queries, query = (first + r) % p->queries;
            for (int64_t d = 0; d < p->dim; d += LANES)
                store(q + r * p->dim + d, load(query_at(p, row, query), d, p->q_type));
            lse[r] = lse_at(p, row, query), places[r] = query_place(p, row, query);
            into[r] = sums + row * p->length + start;
        }
        if (p->k_type == BF16)
            (taken == 4 ? bf16_of_4 : taken == 2 ? bf16_of_2 : bf16_of_1)(p, q, lse, places, &keys, into);
        else (taken == 4 ? f32_of_4 : taken == 2 ? f32_of_2 : f32_of_1)(p, q, lse, places, &keys, into);
    }
}

/* Room that the queries of one head take when they are laid out. */
int64_t kvtier_panel_floats(int64_t queries, int64_t dim) {
    const int lanes = lanes_of(queries);
    return queries <= FEW ? 0 : (queries + lanes - 1) / lanes * panel_floats(dim, lanes);
}

/* Adds to sums [batch * heads * group][keys] what the queries of a KV head's group give to each of its keys: q and lse
   of [batch][heads * group][queries], q_pos [batch][queries] and k_pos [batch][k_heads][keys], or neither. `panels` has
   kvtier_panel_floats for every query head. */
void kvtier_column_sums(const char *q, int q_type, const float *lse, const char *k, int k_type, const int64_t *q_pos,
                        const int64_t *k_pos, int64_t k_heads, int64_t window, int64_t batch, int64_t heads,
                        int64_t group, int64_t queries, int64_t length, int64_t dim, int64_t q_outer, int64_t q_head,
                        int64_t q_slot, int64_t k_outer, int64_t k_head, int64_t k_slot, int64_t lse_head,
                        int64_t q_pos_outer, float scale, float softcap, int threads, float *panels, float *sums) {
    const Problem p = {q,      k,      lse,    q_pos,   k_pos,   q_type,   k_type,      k_heads,
                       window, heads,  group,  queries, length,  dim,      q_outer,     q_head,
                       q_slot, k_outer, k_head, k_slot, lse_head, q_pos_outer, scale,   softcap};
#if defined(__AVX512BF16__)
    const int pairs = q_type == BF16 && k_type == BF16;
#else
    const int pairs = 0;
#endif
    const int few = queries <= FEW, lanes = lanes_of(queries);
    const int64_t each = (queries + lanes - 1) / lanes, blocks = (length + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (!few) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < batch * heads * group * each; i++)
                pack(&p, i / each, i % each * lanes, lanes, pairs, panel_at(panels, i, dim, lanes));
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < batch * heads * blocks; task++) {
            if (few) over_few(&p, task / blocks, task % blocks * BLOCK, sums);
            else over_many(&p, task / blocks, task % blocks * BLOCK, pairs, panels, sums);
        }
    }
}
