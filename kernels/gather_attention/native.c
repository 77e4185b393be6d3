/* Attention of few queries over many keys, read once where they lie: an online softmax over blocks of keys. */

#include <math.h>

#include "vectors.h"

#define BLOCK 64      /* keys whose weights are made at once */
#define MOST_ROWS 16  /* queries of a KV head */
#define MOST_DIM 256  /* channels */

/* Keys and values of one KV head: a run, or the pages that `frames` names. Strides in bytes. */
typedef struct {
    const char *k, *v;
    const int64_t *frames;
    int64_t slots, k_frame, v_frame, k_slot, v_slot;
} Keys;

/* Of every query: the greatest logit so far, the sum of weights relative to it, and of weighted values [rows][dv]. */
typedef struct {
    float *greatest, *total, *out;
} State;

typedef struct {
    const char *k[BLOCK], *v[BLOCK];
} Block;

typedef struct {
    int64_t rows, dk, dv;
    float scale, softcap; /* no softcap: 0 */
} Shape;

INLINE void find(const Keys *keys, int64_t at, int count, Block *block) {
    if (!keys->frames) {
        for (int j = 0; j < count; j++) {
            block->k[j] = keys->k + (at + j) * keys->k_slot;
            block->v[j] = keys->v + (at + j) * keys->v_slot;
        }
        return;
    }
    int64_t page = at / keys->slots, slot = at % keys->slots;
    for (int j = 0; j < count; j++) {
        block->k[j] = keys->k + keys->frames[page] * keys->k_frame + slot * keys->k_slot;
        block->v[j] = keys->v + keys->frames[page] * keys->v_frame + slot * keys->v_slot;
        if (++slot == keys->slots) slot = 0, page++;
    }
}

INLINE void fetch(const char *row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

/* Logits [R][BLOCK] of R queries; 16 / R keys at a time, so that 16 sums fill a vector. */
INLINE void logits_of(int R, int type, const float *q, const Shape *shape, const Block *block, const Block *next,
                      int count, int coming, float *into) {
    const int tile = LANES / R;
    const int64_t dk = shape->dk, bytes = dk * bytes_of(type);
    for (int j = 0; j < count; j += tile) {
        vf sum[LANES];
        for (int i = 0; i < LANES; i++) sum[i] = (vf){0};
        const char *row[LANES];
        for (int i = 0; i < tile; i++) {
            row[i] = block->k[j + i < count ? j + i : count - 1];
            if (next && j + i < coming) fetch(next->k[j + i], bytes);
        }
        for (int64_t d = 0; d < dk; d += LANES) {
            vf query[4];
            for (int r = 0; r < R; r++) memcpy(&query[r], q + r * dk + d, sizeof(vf));
            for (int i = 0; i < tile; i++) {
                vf key = load(row[i], d, type);
                for (int r = 0; r < R; r++) sum[r * tile + i] += key * query[r];
            }
        }
        vf sums = sums_of(sum) * shape->scale;
        for (int r = 0; r < R; r++) memcpy(into + r * BLOCK + j, (const float *)&sums + r * tile, tile * sizeof(float));
    }
}

/* Logits to weights, in place; the state is scaled down to the new greatest logit. */
INLINE void weigh(int R, const Shape *shape, int count, float *weights, float *greatest, float *total, float *out) {
    for (int r = 0; r < R; r++) {
        float *row = weights + r * BLOCK;
        vf most = splat(-INFINITY);
        for (int j = count; j < BLOCK; j++) row[j] = -INFINITY;
        for (int j = 0; j < BLOCK; j += LANES) {
            vf x = load((const char *)row, j, F32);
            if (shape->softcap > 0.0f) {
                x = capped(x, shape->softcap);
                store(row + j, x);
                for (int i = count > j ? count : j; i < j + LANES; i++) row[i] = -INFINITY;
                x = load((const char *)row, j, F32);
            }
            most = larger(x, most);
        }
        float peak = greatest[r];
        for (int i = 0; i < LANES; i++) peak = most[i] > peak ? most[i] : peak;
        vf sum = {0};
        for (int j = 0; j < BLOCK; j += LANES) {
            vf weight = exp_of(load((const char *)row, j, F32) - peak);
            store(row + j, weight);
            sum += weight;
        }
        float added = 0.0f, shrink = greatest[r] == -INFINITY ? 0.0f : expf(greatest[r] - peak);
        for (int i = 0; i < LANES; i++) added += sum[i];
        total[r] = total[r] * shrink + added;
        if (peak > greatest[r]) {
            greatest[r] = peak;
            float *o = out + r * shape->dv;
            for (int64_t d = 0; d < shape->dv; d += LANES) store(o + d, load((const char *)o, d, F32) * shrink);
        }
    }
}

/* Weights [R][BLOCK] times values: C vectors of channels from `from` on stay in registers. */
INLINE void weighted(int R, int C, int type, int64_t from, const Shape *shape, const Block *block, const Block *next,
                     int count, int coming, const float *weights, float *out) {
    vf sum[16];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r * C + c] = load((const char *)(out + r * shape->dv), from + c * LANES, F32);
    for (int j = 0; j < count; j++) {
        if (next && j < coming) fetch(next->v[j] + from * bytes_of(type), C * LANES * bytes_of(type));
        for (int c = 0; c < C; c++) {
            vf value = load(block->v[j], from + c * LANES, type);
            for (int r = 0; r < R; r++) sum[r * C + c] += value * weights[r * BLOCK + j];
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * shape->dv + from + c * LANES, sum[r * C + c]);
}

INLINE void step(int R, int type, const float *q, const Shape *shape, const Block *block, const Block *next, int count,
                 int coming, float *greatest, float *total, float *out) {
    float weights[4 * BLOCK];
    logits_of(R, type, q, shape, block, next, count, coming, weights);
    weigh(R, shape, count, weights, greatest, total, out);
    int64_t d = 0;
    for (; d + 4 * LANES <= shape->dv; d += 4 * LANES)
        weighted(R, 4, type, d, shape, block, next, count, coming, weights, out);
    for (; d < shape->dv; d += LANES) weighted(R, 1, type, d, shape, block, next, count, coming, weights, out);
}

INLINE void attend_typed(int type, const float *q, const Shape *shape, const Keys *keys, int64_t start, int64_t stop,
                         State *state) {
    Block blocks[2];
    int which = 0, count = stop - start < BLOCK ? (int)(stop - start) : BLOCK;
    find(keys, start, count, &blocks[0]);
    for (int64_t at = start; at < stop;) {
        int64_t after = at + count;
        int coming = stop - after < BLOCK ? (int)(stop - after) : BLOCK;
        Block *block = &blocks[which], *next = coming ? &blocks[1 - which] : 0;
        if (next) find(keys, after, coming, next);
        for (int64_t r = 0; r < shape->rows;) {
            const Block *ahead = r ? 0 : next;
            const float *query = q + r * shape->dk;
            float *greatest = state->greatest + r, *total = state->total + r, *out = state->out + r * shape->dv;
            int64_t left = shape->rows - r;
            if (left >= 4) {
                step(4, type, query, shape, block, ahead, count, coming, greatest, total, out);
                r += 4;
            } else if (left >= 2) {
                step(2, type, query, shape, block, ahead, count, coming, greatest, total, out);
                r += 2;
            } else {
                step(1, type, query, shape, block, ahead, count, coming, greatest, total, out);
                r += 1;
            }
        }
        at = after, count = coming, which = 1 - which;
    }
}

static void attend_f32(const float *q, const Shape *shape, const Keys *keys, int64_t start, int64_t stop,
                       State *state) {
    attend_typed(F32, q, shape, keys, start, stop, state);
}

static void attend_bf16(const float *q, const Shape *shape, const Keys *keys, int64_t start, int64_t stop,
                        State *state) {
    attend_typed(BF16, q, shape, keys, start, stop, state);
}

INLINE int64_t state_floats(const Shape *shape) { return shape->rows * (shape->dv + 2); }

INLINE State state_at(const Shape *shape, float *states, int64_t task) {
    float *start = states + task * state_floats(shape);
    return (State){start, start + shape->rows, start + 2 * shape->rows};
}

/* The splits of one head as one answer. */
static void finish(const Shape *shape, float *states, int64_t head, int64_t splits, float *out, float *lse) {
    for (int64_t r = 0; r < shape->rows; r++) {
        float peak = -INFINITY, total = 0.0f, *o = out + r * shape->dv;
        for (int64_t s = 0; s < splits; s++) {
            float greatest = state_at(shape, states, head * splits + s).greatest[r];
            peak = greatest > peak ? greatest : peak;
        }
        memset(o, 0, shape->dv * sizeof(float));
        for (int64_t s = 0; s < splits; s++) {
            State state = state_at(shape, states, head * splits + s);
            float share = state.greatest[r] == -INFINITY ? 0.0f : expf(state.greatest[r] - peak);
            total += share * state.total[r];
            for (int64_t d = 0; d < shape->dv; d++) o[d] += share * state.out[r * shape->dv + d];
        }
        for (int64_t d = 0; total > 0 && d < shape->dv; d++) o[d] /= total;
        lse[r] = total > 0 ? peak + logf(total) : -INFINITY;
    }
}

/* Queries q [batch * heads][rows][dk] of `q_type`; out [batch * heads][rows][dv] and lse [batch * heads][rows]. Strides
   are bytes. A run has no frames and slots of one key; pages are `length` / `slots` frames of a head, each below
   `arena`. With `lengths` a head has the first so many of its keys, and only the frames of those are looked at.
   `states` has room for rows * (dv + 2) floats of every split of every head. 0; 1 for a frame out of range; 2 for a
   length. */
int kvtier_attend(const char *q, int q_type, const char *k, const char *v, int type, const int64_t *frames,
                  const int64_t *lengths, int64_t arena, int64_t batch, int64_t heads, int64_t length, int64_t slots, int64_t rows, int64_t dk,
                  int64_t dv, int64_t k_outer, int64_t k_head, int64_t k_slot, int64_t v_outer, int64_t v_head,
                  int64_t v_slot, float scale, float softcap, int64_t splits, int threads, float *states, float *out,
                  float *lse) {
    const Shape shape = {rows, dk, dv, scale, softcap};
    const int64_t pages = length / slots, tasks = batch * heads * splits, each = (pages + splits - 1) / splits * slots;
    for (int64_t head = 0; head < batch * heads; head++) {
        const int64_t held = lengths ? lengths[head] : length;
        if (held < 0 || held > length) return 2;
        for (int64_t page = 0; frames && page * slots < held; page++)
            if (frames[head * pages + page] < 0 || frames[head * pages + page] >= arena) return 1;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t head = task / splits, split = task % splits;
        State state = state_at(&shape, states, task);
        float query[MOST_ROWS * MOST_DIM];
        for (int64_t i = 0; i < rows * dk; i += LANES)
            store(query + i, load(q + head * rows * dk * bytes_of(q_type), i, q_type));
        for (int64_t r = 0; r < rows; r++) state.greatest[r] = -INFINITY, state.total[r] = 0.0f;
        memset(state.out, 0, rows * dv * sizeof(float));
        Keys keys = {k, v, 0, slots, k_outer, v_outer, k_slot, v_slot};
        if (frames) {
            keys.frames = frames + head * pages;
        } else {
            keys.k += head / heads * k_outer + head % heads * k_head;
            keys.v += head / heads * v_outer + head % heads * v_head;
        }
        const int64_t held = lengths ? lengths[head] : length;
        const int64_t start = split * each, stop = start + each < held ? start + each : held;
        if (start < stop) (type == BF16 ? attend_bf16 : attend_f32)(query, &shape, &keys, start, stop, &state);
    }
    for (int64_t head = 0; head < batch * heads; head++)
        finish(&shape, states, head, splits, out + head * rows * dv, lse + head * rows);
    return 0;
}
