/* Attention of few queries over a run of keys, or over pages. */

#include "gather_attention/attend.h"

/* The next task that has keys and that no other thread gets; those without are answered on the way. */
static int64_t next_task(const Call *call, int64_t tasks, int64_t *claimed, float *states, int *outside, Walk *walk) {
    for (;;) {
        const int64_t task = claim(claimed);
        if (task >= tasks) {
            walk->at = walk->stop = 0;
            return tasks;
        }
        *walk = walk_of(call, task, outside);
        begin(&call->shape, state_at(&call->shape, states, task));
        if (walk->at < walk->stop) return task;
    }
}

/* Queries q [batch * heads][rows][dk] of `q_type`; out [batch * heads][rows][dv] and lse [batch * heads][rows]. Strides
   are bytes. A run has no frames and slots of one key; pages are `length` / `slots` frames of a head, each below
   `arena`. With `lengths` a head has the first so many of its keys, and only the frames of those are looked at.
   `states` has room for rows * (dv + 17) floats of every split of every head. With `weights` [batch * heads][rows]
   [length], the share of each key in the attention of each query is written there; not with lengths. 0; 1 for a frame
   out of range; 2 for a length. */
int kvtier_attend(const char *q, int q_type, const char *k, const char *v, int type, const int64_t *frames,
                  const int64_t *lengths, int64_t arena, int64_t batch, int64_t heads, int64_t length, int64_t slots,
                  int64_t rows, int64_t dk, int64_t dv, int64_t k_outer, int64_t k_head, int64_t k_slot, int64_t v_outer, int64_t v_head,
                  int64_t v_slot, float scale, float softcap, int64_t splits, int threads, float *states, float *out,
                  float *lse, float *weights) {
    const Call call = {{rows, dk, dv, scale, softcap}, q, k, v, q_type, type, frames, lengths, arena, heads, length,
                       slots, splits, k_outer, k_head, k_slot, v_outer, v_head, v_slot, weights};
    const int64_t tasks = batch * heads * splits;
    int64_t claimed = 0;
    int outside = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Blocks blocks = {.now = blocks.blocks, .next = blocks.blocks + 1};
        Walk walk, coming;
        int64_t task = next_task(&call, tasks, &claimed, states, &outside, &walk);
        next_of(&walk, blocks.now);
        while (task < tasks) {
            const int64_t after = next_task(&call, tasks, &claimed, states, &outside, &coming);
            attend_task(&call, task / splits, &walk, &coming, &blocks, state_at(&call.shape, states, task));
            task = after, walk = coming;
        }
#pragma omp barrier
#pragma omp for
        for (int64_t head = 0; head < batch * heads; head++) {
            finish(&call.shape, states, head, splits, out + head * rows * dv, lse + head * rows);
            for (int64_t row = head * rows; weights && row < (head + 1) * rows; row++)
                share(weights + row * length, length, lse[row]);
        }
    }
    return outside;
}
