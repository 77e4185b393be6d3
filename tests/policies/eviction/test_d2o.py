"""D2O: the laws of selections, in the abstract and in a session, and its threshold written out."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.policy import KeepPlan, MergePlan, Phase, SelectionPolicy
from kvtier.core.stats import SlotView
from kvtier.errors import PolicyError
from kvtier.policies.eviction.d2o import D2O
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.merge_laws import MergeLaws
from kvtier.testing.selection_laws import SelectionLaws


class TestD2O(SelectionLaws, EvictionLaws, MergeLaws):
    @pytest.fixture
    def policy(self) -> SelectionPolicy:
        return D2O(sinks=2, recent=3)


class TestD2OAtEveryStep(EvictionLaws, MergeLaws):
    @pytest.fixture
    def policy(self) -> SelectionPolicy:
        return D2O(sinks=2, recent=3, when="step", momentum=0.7)


def merged(policy: D2O, keys: torch.Tensor, dropped: list[int], memory: torch.Tensor | None = None) -> MergePlan:
    """The merge of one head whose slots hold ``keys`` [T, D]."""
    slots = keys.shape[0]
    positions = torch.arange(slots)[None, None]
    view = SlotView(positions=positions, protected=policy.protected(positions), keys=keys[None, None], memory=memory)
    plan = policy.merge(view, KeepPlan(torch.tensor([[[slot for slot in range(slots) if slot not in dropped]]])))
    assert plan is not None
    return plan


@given(seed=st.integers(0, 2**16), momentum=st.sampled_from([0.0, 0.5, 0.9]), steps=st.integers(1, 6))
def test_the_threshold_is_the_running_mean_of_similarities(seed: int, momentum: float, steps: int) -> None:
    random = torch.Generator().manual_seed(seed)
    policy = D2O(sinks=1, recent=2, when="step", momentum=momentum)
    threshold, memory = math.nan, None
    for step in range(steps):
        keys = torch.randn(8, 4, generator=random)
        dropped = [2, 4, 5] if step == 0 else [3]
        plan = merged(policy, keys, dropped, memory)
        kept = [slot for slot in range(8) if slot not in dropped]
        near = {
            slot: max((float(torch.cosine_similarity(keys[slot], keys[into], dim=0)), -into) for into in kept)
            for slot in dropped
        }
        mean = sum(value for value, _ in near.values()) / len(near)
        threshold = mean if step == 0 else momentum * threshold + (1 - momentum) * mean
        memory = plan.memory
        assert memory is not None
        assert memory.shape == (1, 1, 1)
        assert float(memory) == pytest.approx(threshold, abs=1e-5)
        goes = {
            (src, dst)
            for src, dst, weight in zip(*(part[0, 0].tolist() for part in plan[:3]), strict=True)  # type: ignore[union-attr]
            if weight > 0 and src != dst
        }
        right = {(slot, -into) for slot, (value, into) in near.items() if value >= threshold + 1e-5}
        perhaps = {(slot, -into) for slot, (value, into) in near.items() if value >= threshold - 1e-5}
        assert right <= goes <= perhaps


@pytest.mark.parametrize(("threshold", "entries"), [(math.inf, 0), (-1.0, 2)])
def test_what_is_not_near_enough_is_lost(threshold: float, entries: int) -> None:
    plan = merged(D2O(when="step"), torch.eye(6) + 0.1, [2, 3], torch.full((1, 1, 1), threshold))
    moved = (plan.weight > 0) & (plan.src != plan.dst)

    assert int(moved.sum()) == entries


@pytest.mark.parametrize(("when", "phase"), [("prefill", Phase.PREFILL), ("step", Phase.DECODE)])
def test_it_acts_when_it_says(when: Literal["prefill", "step"], phase: Phase) -> None:
    policy = D2O(when=when)

    assert policy.phase is phase
    assert policy.merges_steps == (when == "step")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"when": "decode"}, "when must be 'prefill' or 'step', got 'decode'"),
        ({"momentum": 1.0}, r"momentum must be from 0 to below 1, got 1\.0"),
        ({"momentum": "half"}, "momentum must be from 0 to below 1, got 'half'"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=f"d2o: {message}"):
        D2O(**parameters)  # type: ignore[arg-type]
