"""LRU: the pages unused for longest, the earlier first, in any number."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvtier.policies.placement.lru import LRU


@given(last_use=st.lists(st.integers(0, 6) | st.integers(0, 2**62), max_size=60), share=st.floats(0, 1.3))
def test_victims_are_the_least_recently_used_the_earlier_first(last_use: list[int], share: float) -> None:
    count = int(share * len(last_use))

    victims = LRU().victims(np.array(last_use, dtype=np.int64), count)

    oldest = sorted(range(len(last_use)), key=lambda page: (last_use[page], page))
    assert victims.tolist() == oldest[:count]


def test_clocks_are_not_changed() -> None:
    last_use = np.array([5, 1, 3], dtype=np.int64)
    LRU().victims(last_use, 2)
    assert last_use.tolist() == [5, 1, 3]


def test_placement_loses_nothing() -> None:
    assert LRU().lossless
