"""LRU: the laws of placement, and the least recently used first."""

from __future__ import annotations

import pytest
from hypothesis import given

from kvtier.core.policy import PlacementPolicy
from kvtier.policies.placement.lru import LRU
from kvtier.testing.placement_laws import PlacementLaws, SmallTier, Trace, traces


class TestLRU(PlacementLaws):
    @pytest.fixture
    def policy(self) -> PlacementPolicy:
        return LRU()


@given(traces(batch=1))
def test_victims_are_the_least_recently_used(trace: Trace) -> None:
    tier, uses = SmallTier(LRU().order(), trace.capacity), list[int]()
    for step in trace.steps:
        tier.step(step)
        uses += step.used

        last = {index: place for place, index in enumerate(uses)}
        assert tier.ranking() == sorted(tier.held, key=lambda index: last[index])


def test_placement_loses_nothing() -> None:
    assert LRU().lossless
    assert not LRU().scan_resistant
