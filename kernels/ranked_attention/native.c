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
    int64_t pages, count, all_heads, parts;
    const int64_t *held;           /* frames of all pages [heads][pages] */
    int64_t *best, *frames, *left; /* pages that are chosen, their frames; parts of each head that are not scored yet */
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

/* What is attended by one thread without a pause: a part of the pages of a head, or its newest keys. */
typedef struct {
    int64_t head;
    State state;
    Walk walk;
} Task;

/* The next task that has keys and that no other thread gets; whether there is one. Chosen pages come first: the next
   block is fetched key by key beside the one at hand, and newest keys are few. */
static int next_task(const Work *work, int64_t *claimed, int64_t number, int *outside, Task *task) {
    const int64_t splits = work->chosen.splits, paged = work->all_heads * splits, scored = work->all_heads * work->parts;
    const Shape *shape = &work->chosen.shape;
    for (number -= scored; number < paged + work->all_heads; number = claim(claimed) - scored) {
        const int newest = number >= paged;
        const int64_t head = newest ? number - paged : number / splits;
        /* Its last part is being scored: all parts were claimed before any task. */
        for (int spins = 0; __atomic_load_n(work->left + head, __ATOMIC_ACQUIRE) != CHOSEN; spins++)
            if (spins >= SPINS) sched_yield();
        const int64_t split = newest ? splits : number % splits;
        task->head = head, task->state = state_at(shape, work->states, head * (splits + 1) + split);
        task->walk = walk_of(newest ? &work->newest : &work->chosen, newest ? head : number, outside);
        begin(shape, task->state);
        if (task->walk.at < task->walk.stop) return 1;
    }
    task->walk.at = task->walk.stop = 0;
    return 0;
}

static void work_on(const Work *work, int64_t *claimed, int *outside) {
    Blocks blocks = {.now = blocks.blocks, .next = blocks.blocks + 1};
    Task task, coming;
    int64_t number;
    while ((number = claim(claimed)) < work->all_heads * work->parts) score_task(work, number);
    int more = next_task(work, claimed, number, outside, &task);
    next_of(&task.walk, blocks.now);
    while (more) {
        more = next_task(work, claimed, claim(claimed), outside, &coming);
        attend_task(&work->chosen, task.head, &task.walk, &coming.walk, &blocks, task.state);
        task = coming;
    }
}

/* Boxes as in page_scores, pages and keys as in gather_attention, `frames` [batch * heads][pages] those of all pages, of
   which `count` are attended, and `newest` keys of each head besides, maybe none. `strides` in
   bytes: batch, head and row of bounds and newest keys and values, frame and slot of pages. `best` has room for `count` pages of
   every head, `places` for one number more, and `room` for its scores and rows * (dv + 17) floats of `splits` + 1 parts.
   0; 1 for a frame out of range. */
int kvtier_attend_ranked(const char *q, int q_type, const char *low, const char *high, const char *k, const char *v,
                         const char *newest_k, const char *newest_v, int type, const int64_t *frames, int64_t arena,
                         int64_t batch, int64_t heads, int64_t rows, int64_t dk, int64_t dv, int64_t pages,
                         int64_t count, int64_t slots, int64_t newest, const int64_t *strides, int reduce, float scale,
                         float softcap, int64_t parts, int64_t splits, int threads, int64_t *best, int64_t *places,
                         float *room, float *out, float *lse) {
    const int64_t *low_at = strides, *high_at = low_at + 3, *new_k = high_at + 3, *new_v = new_k + 3;
    const int64_t *k_at = new_v + 3, *v_at = k_at + 2, all_heads = batch * heads;
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
        pages, count, all_heads, parts, frames, best, held, left, scores, states};
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
