"""ARC: the laws of placement, and figure 4 of the paper on plain lists, request by request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.policy import PlacementPolicy
from kvtier.policies.placement.arc import ARC
from kvtier.testing.placement_laws import PlacementLaws, SmallTier, Step, ids_of


class TestARC(PlacementLaws):
    @pytest.fixture
    def policy(self) -> PlacementPolicy:
        return ARC()


class ListARC:
    """Figure 4 of Megiddo & Modha 2003, word by word; lists have the least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.c, self.p = capacity, 0.0
        self.t1, self.t2, self.b1, self.b2 = list[int](), list[int](), list[int](), list[int]()
        self.left: list[int] = []

    def request(self, x: int) -> None:
        if x in self.t1 or x in self.t2:
            (self.t1 if x in self.t1 else self.t2).remove(x)
            self.t2.append(x)
        elif x in self.b1:
            self.p = min(self.c, self.p + max(len(self.b2) / len(self.b1), 1))
            self.replace(x)
            self.b1.remove(x)
            self.t2.append(x)
        elif x in self.b2:
            self.p = max(0, self.p - max(len(self.b1) / len(self.b2), 1))
            self.replace(x)
            self.b2.remove(x)
            self.t2.append(x)
        else:
            self.new(x)

    def new(self, x: int) -> None:
        if len(self.t1) + len(self.b1) == self.c:
            if len(self.t1) < self.c:
                self.b1.pop(0)
                self.replace(x)
            else:
                self.left.append(self.t1.pop(0))
        elif (total := sum(map(len, (self.t1, self.t2, self.b1, self.b2)))) >= self.c:
            if total == 2 * self.c:
                self.b2.pop(0)
            self.replace(x)
        self.t1.append(x)

    def replace(self, x: int) -> None:
        if self.t1 and (len(self.t1) > self.p or (x in self.b2 and len(self.t1) == self.p)):
            self.left.append(self.t1.pop(0))
            self.b1.append(self.left[-1])
        else:
            self.left.append(self.t2.pop(0))
            self.b2.append(self.left[-1])


@given(capacity=st.integers(1, 7), requests=st.lists(st.integers(0, 13), max_size=150))
def test_every_request_goes_as_in_the_paper(capacity: int, requests: list[int]) -> None:
    paper, tier = ListARC(capacity), SmallTier(ARC().order(), capacity)
    for request in requests:
        paper.request(request)
        tier.step(Step((request,)))

        assert tier.left == paper.left
        assert tier.held == {*paper.t1, *paper.t2}
        known = np.flatnonzero(tier.order.remembers(np.arange(14)))
        assert set(known.tolist()) == {*paper.t1, *paper.t2, *paper.b1, *paper.b2}


@given(capacity=st.integers(2, 7), requests=st.lists(st.integers(0, 13), max_size=80), count=st.integers(1, 7))
def test_many_victims_are_those_of_one_eviction_after_the_other(capacity: int, requests: list[int], count: int) -> None:
    tiers = [SmallTier(ARC().order(), capacity) for _ in range(2)]
    for request in requests:
        for tier in tiers:
            tier.step(Step((request,)))
    tiers[0].make_room(count, ())
    for _ in range(count):
        tiers[1].make_room(1, ())

    assert tiers[0].left == tiers[1].left


def test_ids_that_come_back_shift_the_target_to_their_list() -> None:
    tier = SmallTier(ARC().order(), 4)
    for index in [0, 1, 0, 1, 2, 3, 4, 5, 2]:  # 0 and 1 used again, 2 and 3 evicted from those used once, 2 comes back
        tier.step(Step((index,)))

    assert tier.left == [2, 3, 4]
    tier.order.miss(ids_of([3]))
    assert tier.order.victims(1).tolist() == [0]
