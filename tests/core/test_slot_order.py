"""Slots in the order of their positions: what is kept step by step equals a sort."""

from __future__ import annotations

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
