"""One slot that leaves at a step is the one that a look at all slots drops, whatever scores there are."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.kept import KeptSequence
from kvtier.core.policy import IntArray, KeepPlan, MergePlan, Need, Phase, SelectionPolicy
from kvtier.core.slot_eviction import evict_slots
from kvtier.core.stats import SlotView, Stats
from kvtier.testing.steps import open_memory
from kvtier.types import KVLayout

GROUP = 2
# Few, so that many are equal; the last ones cannot be told apart from protected slots, or not be ranked at all.
SCORES = [0.0, -0.0, 0.25, 1.0, -3.0, math.inf, -math.inf, math.nan]


@dataclass(frozen=True)
class Case:
    """Of each KV head: scores and protected slots in the order of positions [Hk, n], and positions by slot [Hk, n]."""

    scores: list[list[float]]
    protected: list[list[bool]]
    positions: list[list[int]]

    def dropped(self, head: int) -> int:
        """Which slot in order leaves: the least score, NaN above all, the last of equals; else the oldest protected."""
        ranked = [
            ((1, 0.0) if math.isnan(score) else (0, score), -place)
            for place, score in enumerate(self.scores[head])
            if not self.protected[head][place]
        ]
        return -min(ranked)[1] if ranked else 0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 3 KV heads of up to 12 slots, in any order, with positions of their own."""
    heads, slots = draw(st.integers(1, 3)), draw(st.integers(2, 12))
    scores = st.sampled_from(draw(st.sampled_from([SCORES[:4], SCORES])))
    safe = st.sampled_from(draw(st.sampled_from([[False], [False, True], [False, True, True, True], [True]])))
    places = st.integers(0, 40)
    return Case(
        scores=[draw(st.lists(scores, min_size=slots, max_size=slots)) for _ in range(heads)],
        protected=[draw(st.lists(safe, min_size=slots, max_size=slots)) for _ in range(heads)],
        positions=[draw(st.lists(places, min_size=slots, max_size=slots, unique=True)) for _ in range(heads)],
    )


@dataclass(frozen=True, kw_only=True)
class Told(SelectionPolicy):
    """Scores and protects as a case says."""

    name: ClassVar[str] = "told"
    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Need]] = frozenset()
    phase: ClassVar[Phase] = Phase.DECODE
    case: Case
    keep: int | None = None

    def protected(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.case.protected).expand(positions.shape)

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        return torch.tensor(self.case.scores)[None]


class Selects(Told):
    """The same, which the runtime cannot know: it asks for the whole selection."""

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        return super().select(scores, view, keep)


@dataclass(frozen=True, kw_only=True)
class Merges(Told):
    """The same, which is told of every plan before slots leave, and folds nothing."""

    plans: list[list[list[int]]] = field(default_factory=list)

    def merge(self, view: SlotView, plan: KeepPlan) -> MergePlan | None:
        self.plans.append(plan.keep[0].tolist())
        return None


def evicted(case: Case, policy: SelectionPolicy) -> tuple[IntArray, list[torch.Tensor]]:
    """Positions, and keys, values and votes of the slots, after one slot of each KV head left."""
    heads, slots = len(case.positions), len(case.positions[0])
    layout = KVLayout.uniform(
        num_layers=1, num_query_heads=heads * GROUP, num_kv_heads=heads, key_dim=2, value_dim=2, dtype="float32"
    )
    with closing(open_memory(layout)) as memory:
        names = torch.tensor(case.positions).unsqueeze(-1) + 100.0 * torch.arange(heads)[:, None, None]
        sequence = KeptSequence.of(
            memory.groups[0], names.expand(-1, -1, 2), -names.expand(-1, -1, 2), np.array(case.positions)
        )
        sequence.vote(names[..., 0].repeat_interleave(GROUP, 0))
        sequence.budget = slots - 1
        evict_slots(sequence, None, policy)
        held = sequence.length
        left = sequence.positions.copy(), [sequence.keys[:, :held], sequence.values[:, :held], sequence.votes]
        sequence.release()
    return left


@given(case=cases())
@pytest.mark.parametrize("make", [Told, Selects, Merges])
def test_one_slot_of_each_head_leaves(make: Callable[..., SelectionPolicy], case: Case) -> None:
    positions, (keys, values, votes) = evicted(case, make(case=case))

    for head, before in enumerate(case.positions):
        gone = sorted(before)[case.dropped(head)]
        # The last slot moves into the place that became free.
        after = [before[-1] if position == gone else position for position in before[:-1]]
        assert positions[head].tolist() == after
        assert keys[head, :, 0].tolist() == [position + 100.0 * head for position in after]
        assert torch.equal(values[head], -keys[head])
        for query_head in range(head * GROUP, (head + 1) * GROUP):
            assert torch.equal(votes[query_head], keys[head, :, 0])


@given(case=cases())
def test_a_merge_is_told_which_slots_stay(case: Case) -> None:
    policy = Merges(case=case)
    evicted(case, policy)

    slots = range(len(case.scores[0]))
    stay = [[slot for slot in slots if slot != case.dropped(head)] for head in range(len(case.scores))]
    assert policy.plans == [stay]
