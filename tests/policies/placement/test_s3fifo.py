"""S3-FIFO: the laws of placement, and algorithm 1 of the paper on plain lists, request by request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.policy import PlacementPolicy
from kvtier.errors import PolicyError
from kvtier.policies.placement.s3fifo import S3FIFO
from kvtier.testing.placement_laws import PlacementLaws, SmallTier, Step, Trace, traces


@pytest.mark.parametrize("percent", [1, 10, 50])
class TestS3FIFO(PlacementLaws):
    @pytest.fixture
    def policy(self, percent: int) -> PlacementPolicy:
        return S3FIFO(small_percent=percent)


class ListS3FIFO:
    """Algorithm 1 of Yang et al. 2023 on lists, the oldest first; what may not leave is passed over."""

    def __init__(self, capacity: int, percent: int) -> None:
        self.capacity, self.percent = capacity, percent
        self.small, self.main, self.ghosts = list[int](), list[int](), list[int]()
        self.uses: dict[int, int] = {}
        self.left: list[int] = []

    def request(self, x: int, protected: frozenset[int]) -> None:
        if x in self.small or x in self.main:
            self.uses[x] = min(self.uses[x] + 1, 3)
            return
        while len(self.small) + len(self.main) >= self.capacity:
            if not self.evict(protected):
                return
        self.uses[x] = 0
        if x in self.ghosts:
            self.ghosts.remove(x)
            self.main.append(x)
        else:
            self.small.append(x)

    def evict(self, protected: frozenset[int]) -> bool:
        share = len(self.small) * 100 >= self.capacity * self.percent
        return (share and self.evict_small(protected)) or self.evict_main(protected) or self.evict_oldest(protected)

    def evict_small(self, protected: frozenset[int]) -> bool:
        for x in list(self.small):
            if x in protected:
                continue
            self.small.remove(x)
            if self.uses[x] <= 1:
                self.leave(x)
                return True
            self.uses[x] = 0
            self.main.append(x)
        return False

    def evict_main(self, protected: frozenset[int]) -> bool:
        while any(x not in protected for x in self.main):
            x = next(x for x in self.main if x not in protected)
            self.main.remove(x)
            if self.uses[x] == 0:
                self.left.append(x)
                return True
            self.uses[x] -= 1
            self.main.append(x)
        return False

    def evict_oldest(self, protected: frozenset[int]) -> bool:
        for x in self.small:
            if x not in protected:
                self.small.remove(x)
                self.leave(x)
                return True
        return False

    def leave(self, x: int) -> None:
        self.left.append(x)
        self.ghosts.append(x)
        while len(self.ghosts) > self.capacity * (100 - self.percent) // 100:
            self.ghosts.pop(0)

    def delete(self, x: int) -> None:
        for queue in (self.small, self.main, self.ghosts):
            if x in queue:
                queue.remove(x)


@given(trace=traces(batch=1, delete=False), percent=st.sampled_from([5, 10, 30, 60]))
def test_every_request_goes_as_in_the_paper(trace: Trace, percent: int) -> None:
    paper = ListS3FIFO(trace.capacity, percent)
    tier = SmallTier(S3FIFO(small_percent=percent).order(), trace.capacity)
    for step in trace.steps:
        paper.request(step.used[0], step.protected)
        tier.step(step)

        assert tier.left == paper.left
        assert tier.held == {*paper.small, *paper.main}
        known = np.flatnonzero(tier.order.remembers(np.arange(12)))
        assert set(known.tolist()) == {*paper.small, *paper.main, *paper.ghosts}


@given(capacity=st.integers(1, 90), requests=st.lists(st.integers(0, 120), max_size=400), count=st.integers(1, 90))
def test_many_victims_are_those_of_one_eviction_after_the_other(capacity: int, requests: list[int], count: int) -> None:
    paper, tier = ListS3FIFO(capacity, 10), SmallTier(S3FIFO().order(), capacity)
    for request in requests:
        paper.request(request, frozenset())
        tier.step(Step((request,)))
    # Lists measure their share of the tier's size, an order of what it held when it was last full.
    paper.capacity = min(capacity, len(tier.held))
    tier.make_room(count, ())
    for _ in range(min(count, paper.capacity)):
        paper.evict(frozenset())

    assert tier.left == paper.left


@pytest.mark.parametrize("percent", [0, 100, 10.0, True])
def test_shares_out_of_range_are_refused(percent: int) -> None:
    with pytest.raises(PolicyError, match="s3fifo: small_percent must be an integer from 1 to 99, got"):
        S3FIFO(small_percent=percent)
