/* Attention of few queries over many keys, read once where they lie: an online softmax over blocks of keys. */

#include <math.h>

#include "vectors.h"

#define BLOCK 128     /* keys whose weights are made at once */
#define MOST_ROWS 16  /* queries of a KV head */
#define MOST_DIM 256  /* channels */

/* Keys and values of one KV head: a run, or the pages that `frames` names. Strides in bytes. */
typedef struct {
    const char *k, *v;
    const int64_t *frames;
    int64_t slots, k_frame, v_frame, k_slot, v_slot;
} Keys;

/* Of every query: the greatest logit so far, sums of weights relative to it [rows][LANES], and of weighted values
   [rows][dv]; and where the logits of the block that is attended to are asked for, rows `length` apart, or 0. */
typedef struct {
    float *greatest, *total, *out, *logits;
    int64_t length;
} State;

/* Where keys and values lie, and which keys of the head they are, from `at` on. */
typedef struct {
    int64_t at;
    int count;
    const char *k[BLOCK], *v[BLOCK];
} Block;

static const Block NO_KEYS;

enum { FRAME = 1, LENGTH = 2 };

typedef struct {
    int64_t rows, dk, dv;
    float scale, softcap; /* no softcap: 0 */
} Shape;

INLINE void find(const Keys *keys, int64_t at, Block *block) {
    int64_t page = at / keys->slots, slot = at % keys->slots, row = keys->frames ? slot : at;
    for (int j = 0; j < block->count; page++, row = slot = 0) {
        const char *k = keys->k, *v = keys->v;
        int64_t here = block->count - j;
        if (keys->frames) {
            k += keys->frames[page] * keys->k_frame, v += keys->frames[page] * keys->v_frame;
            here = keys->slots - slot < here ? keys->slots - slot : here;
        }
        for (int64_t i = 0; i < here; i++) {
            block->k[j + i] = k + (row + i) * keys->k_slot;
            block->v[j + i] = v + (row + i) * keys->v_slot;
        }
        j += (int)here;
    }
}

/* Logits [R][BLOCK] of R queries; 16 / R keys at a time, so that 16 sums fill a vector. */
INLINE void logits_of(int R, int type, const char *q, const Shape *shape, const Block *block, const Block *next,
                      float *into) {
    const int tile = LANES / R, count = block->count;
    const int64_t dk = shape->dk, step = type == PAIRS ? 2 * LANES : LANES;
    for (int j = 0; j < count; j += tile) {
        const char *coming[LANES];
        vf sum[LANES];
        for (int i = 0; i < LANES; i++) sum[i] = (vf){0};
        const char *row[LANES];
        for (int i = 0; i < tile; i++) {
            row[i] = block->k[j + i < count ? j + i : count - 1];
            coming[i] = j + i < next->count ? next->k[j + i] : row[i];
        }
        for (int64_t d = 0; d < dk; d += step)
            for (int i = 0; i < tile; i++) {
                fetch_line(coming[i] + d * bytes_of(type));
                for (int r = 0; r < R; r++)
                    sum[r * tile + i] = plus_products(sum[r * tile + i], row[i], d, q, r * dk + d, type);
            }
        vf sums = sums_of(sum) * shape->scale;
        for (int r = 0; r < R; r++) memcpy(into + r * BLOCK + j, (const float *)&sums + r * tile, tile * sizeof(float));
    }
}

/* Logits of `rows` queries to weights, in place, and as they are to whoever asks; what is behind the last key in its vector gets none. Only a logit
   above all before makes the state shrink to it: most blocks have none. */
static __attribute__((noinline)) void weigh(int64_t rows, const Shape *shape, int count, float *weights, State state) {
    const int vectors = (count + LANES - 1) / LANES;
    for (int64_t r = 0; r < rows; r++) {
        float *row = weights + r * BLOCK, *o = state.out + r * shape->dv, peak = state.greatest[r];
        vf most = splat(-INFINITY), sum = load((const char *)state.total, r * LANES, F32);
        if (shape->softcap > 0.0f)
            for (int i = 0; i < vectors; i++)
                store(row + i * LANES, capped(load((const char *)row, i * LANES, F32), shape->softcap));
        if (state.logits) memcpy(state.logits + r * state.length, row, count * sizeof(float));
        for (int j = count; j < vectors * LANES; j++) row[j] = -INFINITY;
        for (int i = 0; i < vectors; i++) most = larger(load((const char *)row, i * LANES, F32), most);
        if (any(most > peak)) {
            for (int i = 0; i < LANES; i++) peak = most[i] > peak ? most[i] : peak;
            const float shrink = expf(state.greatest[r] - peak);
            for (int64_t d = 0; d < shape->dv; d += LANES) store(o + d, load((const char *)o, d, F32) * shrink);
            sum *= shrink;
            state.greatest[r] = peak;
        }
        for (int i = 0; i < vectors; i++) {
            vf weight = exp_of(load((const char *)row, i * LANES, F32) - peak);
            store(row + i * LANES, weight);
            sum += weight;
        }
        store(state.total + r * LANES, sum);
    }
}

/* Weights [R][BLOCK] times values: C vectors of channels from `from` on stay in registers. */
INLINE void weighted(int R, int C, int type, int64_t from, const Shape *shape, const Block *block, const Block *next,
                     const float *weights, float *out) {
    vf sum[16];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r * C + c] = load((const char *)(out + r * shape->dv), from + c * LANES, F32);
    for (int j = 0; j < block->count; j++) {
        if (j < next->count) fetch(next->v[j] + from * bytes_of(type), C * LANES * bytes_of(type));
        for (int c = 0; c < C; c++) {
            vf value = load(block->v[j], from + c * LANES, type);
            for (int r = 0; r < R; r++) sum[r * C + c] += value * weights[r * BLOCK + j];
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * shape->dv + from + c * LANES, sum[r * C + c]);
}

INLINE void step(int R, int type, const char *q, const Shape *shape, const Block *block, const Block *next,
                 State state) {
    float weights[4 * BLOCK];
    const int held = type == PAIRS ? BF16 : type;
    logits_of(R, type, q, shape, block, next, weights);
    weigh(R, shape, block->count, weights, state);
    int64_t d = 0;
    for (; d + 4 * LANES <= shape->dv; d += 4 * LANES) weighted(R, 4, held, d, shape, block, next, weights, state.out);
    for (; d < shape->dv; d += LANES) weighted(R, 1, held, d, shape, block, next, weights, state.out);
}

/* All queries over one block; the first of them fetch the next one. */
INLINE void over_block(int type, const char *q, const Shape *shape, const Block *block, const Block *next,
                       State state) {
    const int64_t query_bytes = shape->dk * (type == PAIRS ? 2 : 4);
    for (int64_t left = shape->rows, done; left > 0; left -= done) {
        if (left >= 4) {
            step(4, type, q, shape, block, next, state);
            done = 4;
        } else if (left >= 2) {
            step(2, type, q, shape, block, next, state);
            done = 2;
        } else {
            step(1, type, q, shape, block, next, state);
            done = 1;
        }
        q += done * query_bytes, next = &NO_KEYS;
        state.greatest += done, state.total += done * LANES, state.out += done * shape->dv;
        if (state.logits) state.logits += done * state.length;
    }
}

typedef void Over(const char *q, const Shape *shape, const Block *block, const Block *next, State state);

static void over_f32(const char *q, const Shape *shape, const Block *block, const Block *next, State state) {
    over_block(F32, q, shape, block, next, state);
}

static void over_bf16(const char *q, const Shape *shape, const Block *block, const Block *next, State state) {
    over_block(BF16, q, shape, block, next, state);
}

#ifdef PAIRED
static void over_pairs(const char *q, const Shape *shape, const Block *block, const Block *next, State state) {
    over_block(PAIRS, q, shape, block, next, state);
}
#endif

INLINE int64_t state_floats(const Shape *shape) { return shape->rows * (shape->dv + LANES + 1); }

INLINE State state_at(const Shape *shape, float *states, int64_t task) {
    float *start = states + task * state_floats(shape);
    return (State){start, start + shape->rows, start + shape->rows * (1 + LANES), 0, 0};
}

/* Logits to shares of all attention, in place. */
static void share(float *logits, int64_t length, float lse) {
    int64_t j = 0;
    for (; j + LANES <= length; j += LANES) store(logits + j, small_exp_of(load((const char *)logits, j, F32) - lse));
    float rest[LANES] = {0};
    memcpy(rest, logits + j, (length - j) * sizeof(float));
    store(rest, small_exp_of(load((const char *)rest, 0, F32) - lse));
    memcpy(logits + j, rest, (length - j) * sizeof(float));
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
            for (int i = 0; i < LANES; i++) total += share * state.total[r * LANES + i];
            for (int64_t d = 0; d < shape->dv; d++) o[d] += share * state.out[r * shape->dv + d];
        }
        for (int64_t d = 0; total > 0 && d < shape->dv; d++) o[d] /= total;
        lse[r] = total > 0 ? peak + logf(total) : -INFINITY;
    }
}

/* What is asked, and the strides in bytes; see `kvtier_attend`. */
typedef struct {
    Shape shape;
    const char *q, *k, *v;
    int q_type, type;
    const int64_t *frames, *lengths;
    int64_t arena, heads, length, slots, splits;
    int64_t k_outer, k_head, k_slot, v_outer, v_head, v_slot;
    float *weights; /* or none */
} Call;

/* Keys of one task that are still to come. */
typedef struct {
    Keys keys;
    int64_t at, stop;
} Walk;

/* The keys of a task; none, and a note in `outside`, where a length or a frame is impossible. */
static Walk walk_of(const Call *call, int64_t task, int *outside) {
    Walk walk = {{call->k, call->v, 0, call->slots, call->k_outer, call->v_outer, call->k_slot, call->v_slot}, 0, 0};
    const int64_t head = task / call->splits, split = task % call->splits, pages = call->length / call->slots;
    const int64_t each = (pages + call->splits - 1) / call->splits * call->slots;
    const int64_t held = call->lengths ? call->lengths[head] : call->length;
    int wrong = held < 0 || held > call->length ? LENGTH : 0;
    walk.at = split * each, walk.stop = held < walk.at + each ? held : walk.at + each;
    if (call->frames) {
        walk.keys.frames = call->frames + head * pages;
        for (int64_t page = walk.at / call->slots; !wrong && page * call->slots < walk.stop; page++)
            if (walk.keys.frames[page] < 0 || walk.keys.frames[page] >= call->arena) wrong = FRAME;
    } else {
        walk.keys.k += head / call->heads * call->k_outer + head % call->heads * call->k_head;
        walk.keys.v += head / call->heads * call->v_outer + head % call->heads * call->v_head;
    }
    if (wrong) {
        walk.stop = walk.at;
#pragma omp atomic write
        *outside = wrong;
    }
    return walk;
}

/* The next block, and how many keys it has: none at the end. */
INLINE int next_of(Walk *walk, Block *block) {
    const int64_t left = walk->stop - walk->at;
    block->count = left < 0 ? 0 : left < BLOCK ? (int)left : BLOCK, block->at = walk->at;
    if (block->count) find(&walk->keys, walk->at, block);
    walk->at += block->count;
    return block->count;
}

/* How a call's keys are attended to; with fp32 queries from bf16 keys, too, no product is rounded. */
static Over *over_for(const Call *call, int *widen) {
    *widen = 1;
    if (call->type == F32) return over_f32;
#ifdef PAIRED
    if (call->q_type == BF16 && call->shape.dk % (2 * LANES) == 0) {
        *widen = 0;
        return over_pairs;
    }
#endif
    return over_bf16;
}

/* What a thread works on: a block, and the one that is fetched meanwhile, be it of the next task. */
typedef struct {
    Block blocks[2], *now, *next;
} Blocks;

/* A number that no other thread gets. */
INLINE int64_t claim(int64_t *claimed) { return __atomic_fetch_add(claimed, 1, __ATOMIC_RELAXED); }

/* No key seen yet. */
static void begin(const Shape *shape, State state) {
    for (int64_t r = 0; r < shape->rows; r++) state.greatest[r] = -INFINITY;
    memset(state.total, 0, shape->rows * LANES * sizeof(float));
    memset(state.out, 0, shape->rows * shape->dv * sizeof(float));
}

/* Attention of a head to the keys of one walk, the first block of which was fetched; that of the walk after it is. */
static void attend_task(const Call *call, int64_t head, Walk *walk, Walk *after, Blocks *blocks, State state) {
    const Shape *shape = &call->shape;
    const int64_t numbers = shape->rows * shape->dk;
    int widen, last = 0;
    Over *over = over_for(call, &widen);
    const char *q = call->q + head * numbers * bytes_of(call->q_type);
    float query[MOST_ROWS * MOST_DIM];
    state.length = call->length;
    for (int64_t i = 0; widen && i < numbers; i += LANES) store(query + i, load(q, i, call->q_type));
    while (!last) {
        last = !next_of(walk, blocks->next);
        if (last) next_of(after, blocks->next);
        if (call->weights) state.logits = call->weights + head * shape->rows * call->length + blocks->now->at;
        over(widen ? (const char *)query : q, shape, blocks->now, blocks->next, state);
        Block *done = blocks->now;
        blocks->now = blocks->next, blocks->next = done;
    }
}
