/* Attention over the pages of each KV head that rank best by their boxes, and over its newest keys, without a pause in
   between: whoever scores the last pages of a head chooses, and who finds nothing to score attends. */

#include <sched.h>

#include "gather_attention/attend.h"
#include "page_scores/boxes.h"
#include "top_pages/choose.h"

#define SPINS 4096     /* looks at a head that others score, before the CPU is lent */
#define CHOSEN (-1)    /* parts to score of a head whose pages are chosen */

typedef struct {
    Boxes boxes;
    Call chosen, newest;
    int64_t pages, count, all_heads, parts, tasks; /* parts: to score, of a head; tasks: to attend, of a head */
    const int64_t *held;                           /* frames of all pages [heads][pages] */
    int64_t *best, *frames, *left;                 /* chosen pages, their frames; parts of each head not scored yet */
    float *scores, *states;
} Work;

/* The pages of a head, and where they lie, once all are scored. */
static void settle(const Work *work, int64_t head) {
    const int64_t *held = work->held + head * work->pages;
    int64_t *best = work->best + head * work->count, *frames = work->frames + head * work->count;
    choose(work->scores + head * work->pages, work->pages, work->count, best);
    for (int64_t i = 0; i < work->count; i++) frames[i] = held[best[i]];
    __atomic_store_n(work->left + head, CHOSEN, __ATOMIC_RELEASE);
}

static void score_task(const Work *work, int64_t task) {
    const int64_t head = task / work->parts, each = (work->pages + work->parts - 1) / work->parts;
    const int64_t start = task % work->parts * each, stop = start + each < work->pages ? start + each : work->pages;
    score_boxes(&work->boxes, head, start, stop, work->scores + head * work->pages);
    if (__atomic_sub_fetch(work->left + head, 1, __ATOMIC_ACQ_REL) == 0) settle(work, head);
}

/* The next task with keys, as in gather_attention; its head may have to be waited for. All its parts are under way. */
static int64_t next_task(const Work *work, int64_t *claimed, int64_t task, int *outside, Walk *walk) {
    const Shape *shape = &work->chosen.shape;
    for (;; task = claim(claimed) - work->all_heads * work->parts) {
        if (task >= work->all_heads * work->tasks) {
            walk->at = walk->stop = 0;
            return task;
        }
        const int64_t head = task / work->tasks, split = task % work->tasks;
        for (int spins = 0; __atomic_load_n(work->left + head, __ATOMIC_ACQUIRE) != CHOSEN; spins++)
            if (spins >= SPINS) sched_yield();
        if (split < work->chosen.splits) *walk = walk_of(&work->chosen, head * work->chosen.splits + split, outside);
        else *walk = walk_of(&work->newest, head, outside);
        begin(shape, state_at(shape, work->states, task));
        if (walk->at < walk->stop) return task;
    }
}

static void work_on(const Work *work, int64_t *claimed, int *outside) {
    const int64_t scored = work->all_heads * work->parts, attended = work->all_heads * work->tasks;
    const Shape *shape = &work->chosen.shape;
    int64_t task;
    while ((task = claim(claimed)) < scored) score_task(work, task);
    Blocks blocks = {.now = blocks.blocks, .next = blocks.blocks + 1};
    Walk walk, coming;
    task = next_task(work, claimed, task - scored, outside, &walk);
    next_of(&walk, blocks.now);
    while (task < attended) {
        const int64_t after = next_task(work, claimed, claim(claimed) - scored, outside, &coming);
        attend_task(&work->chosen, task / work->tasks, &walk, &coming, &blocks, state_at(shape, work->states, task));
        task = after, walk = coming;
    }
}

/* Boxes as in page_scores, pages and keys as in gather_attention, `frames` [batch * heads][pages] those of all pages, of
   which `count` are attended, and `newest` keys of each head besides, maybe none. `best` has room for `count` pages of
   every head, `places` for one number more, and `room` for its scores and rows * (dv + 17) floats of `splits` + 1 parts.
   0; 1 for a frame out of range. */
int kvtier_attend_ranked(const char *q, int q_type, const char *low, const char *high, const char *k, const char *v,
                         const char *newest_k, const char *newest_v, int type, const int64_t *frames, int64_t arena,
                         int64_t batch, int64_t heads, int64_t rows, int64_t dk, int64_t dv, int64_t pages,
                         int64_t count, int64_t slots, int64_t newest, const int64_t *strides, int reduce, float scale,
                         float softcap, int64_t parts, int64_t splits, int threads, int64_t *best, int64_t *places,
                         float *room, float *out, float *lse) {
    const int64_t *low_at = strides, *high_at = low_at + 3, *k_at = high_at + 3, *v_at = k_at + 2;
    const int64_t *new_k = v_at + 2, *new_v = new_k + 3, all_heads = batch * heads;
    int64_t *held = places, *left = places + all_heads * count;
    float *scores = room, *states = room + all_heads * pages;
    const Shape shape = {rows, dk, dv, scale, softcap};
    const Work work = {
        {q, low, high, q_type, type, reduce, heads, rows, dk, low_at[0], low_at[1], low_at[2], high_at[0], high_at[1],
         high_at[2]},
        {shape, q, k, v, q_type, type, held, 0, arena, heads, count * slots, slots, splits, k_at[0], 0, k_at[1],
         v_at[0], 0, v_at[1]},
        {shape, q, newest_k, newest_v, q_type, type, 0, 0, 0, heads, newest, 1, 1, new_k[0], new_k[1], new_k[2],
         new_v[0], new_v[1], new_v[2]},
        pages, count, all_heads, parts, splits + 1, frames, best, held, left, scores, states};
    int64_t claimed = 0;
    int outside = 0;
    for (int64_t head = 0; head < all_heads; head++) left[head] = parts;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        work_on(&work, &claimed, &outside);
#pragma omp barrier
#pragma omp for
        for (int64_t head = 0; head < all_heads; head++)
            finish(&shape, states, head, splits + 1, out + head * rows * dv, lse + head * rows);
    }
    return outside;
}
