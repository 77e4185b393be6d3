"""LFU with ageing: the laws of placement, and counts on a plain dict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.policy import PlacementPolicy
from kvtier.errors import PolicyError
from kvtier.policies.placement.lfu import LFU
from kvtier.testing.placement_laws import PlacementLaws, SmallTier, Step, Trace, traces


class TestLFU(PlacementLaws):
    @pytest.fixture
    def policy(self) -> PlacementPolicy:
        return LFU()


@given(trace=traces(batch=1), most=st.sampled_from([1, 3, 15]), period=st.integers(1, 4))
def test_the_least_used_leave_first_and_counts_fade(trace: Trace, most: int, period: int) -> None:
    tier = SmallTier(LFU(most=most, period=period).order(), trace.capacity)
    counts, last, since = dict[int, int](), dict[int, int](), 0
    for clock, step in enumerate(trace.steps):
        before = set(tier.held)
        tier.step(Step(step.used, step.protected))
        if step.used[0] in tier.held:
            used = step.used[0]
            counts[used] = min(counts[used] + 1, most) if used in before else 1
            last[used], since = clock, since + 1
            if since >= period * len(tier.held):
                counts, since = {index: count // 2 for index, count in counts.items()}, 0

        assert tier.ranking() == sorted(tier.held, key=lambda index: (counts[index], last[index]))
        tier.step(Step((), deleted=step.deleted))


def test_old_fame_fades() -> None:
    tier = SmallTier(LFU(period=2).order(), 3)
    for index in [0] * 15 + [1, 2] * 20:
        tier.step(Step((index,)))

    assert tier.ranking()[0] == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"most": 0}, "most must be an integer from 1 to 32767, got 0"),
        ({"most": 2**15}, "most must be an integer from 1 to 32767, got 32768"),
        ({"period": 0}, "period must be an integer of at least 1 use, got 0"),
        ({"period": 1.5}, r"period must be an integer of at least 1 use, got 1\.5"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, int], message: str) -> None:
    with pytest.raises(PolicyError, match=f"lfu: {message}"):
        LFU(**parameters)
