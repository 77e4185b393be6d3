"""The defaults of the five roles, the statistics a policy may ask for, and the reduction of query heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvtier.core.policy import Need, Policy, SelectionPolicy
from kvtier.core.selection import group_reduce
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError, SessionStateError
from kvtier.testing.dense import reduce_heads
from kvtier.testing.session_machine import small_layout
from kvtier.types import GroupReduce

REDUCTIONS: list[GroupReduce] = ["mean", "max", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ByPosition(SelectionPolicy):
    """Keeps the newest."""

    name: ClassVar[str] = "by position"
    paper: ClassVar[str] = "none"
    keep: int | None = None

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        return view.positions.float()


def test_a_selection_protects_nothing_merges_nothing_and_shares_evenly_by_default() -> None:
    policy = ByPosition()
    positions = torch.arange(5)[None, None]
    view = SlotView(positions=positions, protected=policy.protected(positions))
    plan = policy.select(policy.score(view, Stats()), view, 2)

    assert not view.protected.any()
    assert plan.keep.tolist() == [[[3, 4]]]
    assert policy.merge(view, plan) is None
    assert policy.allocate(small_layout(), 9) == (9, 9, 9)
    assert policy.parts == (policy,)
    policy.check_layout(small_layout())
    assert policy.window_queries == 0


class ByAttention(ByPosition):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.WINDOW_ATTENTION})


def test_a_policy_that_needs_attention_says_of_how_many_queries() -> None:
    with pytest.raises(PolicyError, match="by position declares no query window; WINDOW_ATTENTION needs one"):
        _ = ByAttention().window_queries


def test_scores_that_are_infinite_or_huge_are_still_ranked() -> None:
    scores = torch.tensor([[[-torch.inf, 3e38, torch.inf, 0.0, -3e38]]])
    view = SlotView(positions=torch.arange(5)[None, None], protected=torch.zeros(1, 1, 5, dtype=torch.bool))

    kept = [ByPosition().select(scores, view, keep).keep.tolist()[0][0] for keep in range(1, 6)]

    assert kept == [[2], [1, 2], [1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_a_policy_declares_nothing_by_default() -> None:
    assert (Policy.roles, Policy.needs, Policy.lossless, Policy.query_aware) == (frozenset(), frozenset(), False, False)


@pytest.mark.parametrize("name", ["window_attention", "column_sums"])
def test_a_statistic_that_was_not_declared_is_not_there(name: str) -> None:
    with pytest.raises(SessionStateError, match=rf"declare Need\.{name.upper()} in the policy's `needs`"):
        getattr(Stats(), f"require_{name}")()
    there = Stats(**{name: torch.ones(2)})
    assert torch.equal(getattr(there, f"require_{name}")(), torch.ones(2))


@pytest.mark.parametrize("how", REDUCTIONS)
def test_query_heads_are_reduced_to_the_kv_head_they_share(how: GroupReduce) -> None:
    values = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    reduced = group_reduce(values, 2, how)

    for row in range(3):
        assert torch.equal(reduced[row], reduce_heads(values[row], 2, how))


def test_groups_of_one_agree_and_max_keeps_the_outlier_that_mean_drops() -> None:
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(group_reduce(values, 3, how), values) for how in REDUCTIONS)

    votes = torch.tensor([[[0.9, 0.5], [0.0, 0.5]]])
    assert group_reduce(votes, 1, "max").argmax().item() == 0
    assert group_reduce(votes, 1, "mean").argmax().item() == 1
