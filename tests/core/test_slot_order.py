"""Slots in the order of their positions: what is kept step by step equals a sort."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.slot_order import SlotOrder


@given(
    seed=st.integers(0, 999),
    heads=st.integers(1, 3),
    held=st.integers(1, 9),
    steps=st.lists(st.integers(0, 99), max_size=90),
)
def test_steps_equal_a_sort(seed: int, heads: int, held: int, steps: list[int]) -> None:
    random = np.random.default_rng(seed)
    start = np.stack([random.permutation(3 * held)[:held] for _ in range(heads)])
    order, slots = SlotOrder(start), start.copy()
    for step, rank in enumerate(steps):
        newest = np.array([[100 + step]])
        order.extend(newest)
        slots = np.concatenate([slots, np.broadcast_to(newest, (heads, 1))], axis=1)
        ranks = np.array([(rank + 7 * head) % slots.shape[1] for head in range(heads)])
        for head, own in enumerate(ranks):
            slots[head, np.argsort(slots[head])[own]] = slots[head, -1]
        order.fork().remove(ranks)
        order.remove(ranks)
        slots = slots[:, :-1]
        assert np.array_equal(order.positions, slots)
        assert np.array_equal(order.slots, np.argsort(slots, axis=1))
        assert np.array_equal(order.ascending, np.sort(slots, axis=1))


SCORES = [0.0, -0.0, 0.25, 1.0, -3.0, math.inf, math.nan]


@given(
    data=st.data(), heads=st.integers(1, 3), held=st.integers(1, 9), sinks=st.integers(0, 6), recent=st.integers(0, 9)
)
def test_least_and_oldest_equal_a_look_at_each(
    data: st.DataObject, heads: int, held: int, sinks: int, recent: int
) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    positions = np.stack([random.permutation(2 * held)[:held] for _ in range(heads)])
    numbers = st.sampled_from(data.draw(st.sampled_from([SCORES[:5], SCORES])))
    each = st.lists(numbers, min_size=held, max_size=held)
    scores = np.array([data.draw(each) for _ in range(heads)], dtype=np.float32)
    order = SlotOrder(positions)

    oldest, least = [], []
    for own, votes in zip(positions, scores, strict=True):
        in_order = np.argsort(own)
        free = [rank for rank in range(max(0, held - recent)) if own[in_order[rank]] >= sinks]
        oldest += free[:1]
        ranked = [(float(votes[in_order[rank]]), -rank) for rank in free]
        # An infinity is as good as protected, and NaN has no place among numbers.
        told = ranked and not any(math.isnan(score) for score, _ in ranked) and min(ranked)[0] < math.inf
        least += [-min(ranked)[1]] if told else []

    found = order.oldest(sinks=sinks, recent=recent)
    assert (found is None) == (len(oldest) < heads)
    assert found is None or found.tolist() == oldest
    found = order.least(scores, sinks=sinks, recent=recent)
    assert (found is None) == (len(least) < heads)
    assert found is None or found.tolist() == least
