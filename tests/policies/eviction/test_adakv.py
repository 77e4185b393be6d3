"""AdaKV: the laws of selections, and budgets of KV heads against the rule written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.policy import KeepPlan, SelectionPolicy
from kvtier.core.stats import SlotView
from kvtier.errors import CompositionError, PolicyError
from kvtier.policies.eviction.adakv import AdaKV, AdaPyramidKV
from kvtier.policies.eviction.snapkv import SnapKV
from kvtier.testing.dense_heads import AdaKVRule, adakv_slots
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.selection_laws import Contents, SelectionCase, SelectionLaws, selection_cases
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import open_memory


@pytest.mark.parametrize(("window", "alpha"), [(1, 0.0), (3, 0.2)])
class TestAdaKV(SelectionLaws, EvictionLaws):
    @pytest.fixture
    def policy(self, window: int, alpha: float) -> SelectionPolicy:
        return AdaKV(window=window, kernel=3, alpha=alpha)


class TestAdaPyramidKV(SelectionLaws, EvictionLaws):
    @pytest.fixture
    def policy(self) -> SelectionPolicy:
        return AdaPyramidKV(window=3, kernel=3, beta=5)


@given(data=st.data(), window=st.integers(1, 8), kernel=st.sampled_from([1, 3, 7]), percent=st.integers(0, 100))
def test_the_plan_is_the_rule_written_out(data: st.DataObject, window: int, kernel: int, percent: int) -> None:
    case = data.draw(selection_cases(least_keep=window + 1))
    policy = AdaKV(window=window, kernel=kernel, alpha=percent / 100)
    plan = case.keeps(policy).rows()

    for row, votes in zip(plan, case.votes(policy), strict=True):
        rule = AdaKVRule(window=window, kernel=kernel, keep=case.keep, alpha_percent=percent)
        assert row == adakv_slots(votes.tolist(), rule)


@given(selection_cases(least_keep=4))
def test_a_safeguard_of_all_is_snapkv(case: SelectionCase) -> None:
    whole = case.keeps(AdaKV(window=3, kernel=3, alpha=1)).rows()

    assert whole == case.keeps(SnapKV(window=3, kernel=3)).rows()


def test_a_head_whose_attention_is_spread_keeps_more_than_a_sharp_one() -> None:
    votes = torch.full((1, 2, 100), 0.001)
    votes[0, 0, 7], votes[0, 1] = 1.0, 0.5
    case = SelectionCase(votes, torch.arange(100).expand(1, 2, 100), 20, Contents.drawn(0, 1, 2, 1, 100, torch.float32))

    counts = case.keeps(AdaKV(window=2, kernel=1, alpha=0.5)).counts

    assert counts is not None
    assert counts.tolist() == [[2 + 9, 40 - 11]]


@pytest.mark.parametrize(
    ("alpha", "keep", "least"), [(0.2, 32, 32), (0.2, 33, 32), (0.29, 132, 61), (1, 132, 132), (0, 132, 32)]
)
def test_the_safeguard_is_an_integer_of_tokens(alpha: float, keep: int, least: int) -> None:
    assert AdaKV(window=32, alpha=alpha).least(keep) == least
    assert AdaPyramidKV(window=32, alpha=alpha).least(keep) == least


def test_slots_without_a_token_are_never_kept() -> None:
    valid = torch.tensor([[[False, False, True, True], [True, True, True, True]]])
    positions = torch.arange(4).expand(1, 2, 4)
    policy = AdaKV(window=1, kernel=1, alpha=0)
    view = SlotView(positions=positions, protected=policy.protected(positions) & valid, valid=valid)

    assert policy.select(torch.ones(1, 2, 4), view, 3).rows() == [[[2, 3], [0, 1, 2, 3]]]
    assert policy.select(torch.ones(1, 2, 4), view, 2).rows() == [[[3], [0, 1, 3]]]
    assert policy.select(torch.ones(1, 2, 4), view, 9).rows() == [[[2, 3], [0, 1, 2, 3]]]


def test_a_plan_is_made_from_what_stays_and_says_it_again() -> None:
    stays = torch.tensor([[[True, False, True], [False, False, True]]])
    plan = KeepPlan.of(stays)

    assert plan.rows() == [[[0, 2], [2]]]
    assert torch.equal(plan.stays(3), stays)
    assert KeepPlan(torch.tensor([[[0, 0]]]), torch.tensor([[1]])).stays(2).tolist() == [[[True, False]]]


@pytest.mark.parametrize("policy", [AdaKV, AdaPyramidKV])
@pytest.mark.parametrize("alpha", [-0.1, 1.5, True, "0.2", float("nan")])
def test_a_safeguard_out_of_range_is_refused(policy: type[AdaKV], alpha: object) -> None:
    with pytest.raises(PolicyError, match=f"{policy.name}: alpha must be a number from 0 to 1, got {alpha!r}"):
        policy(alpha=alpha)  # type: ignore[arg-type]


@pytest.mark.parametrize("parameters", [{"window": 0}, {"keep": 32}, {"kernel": 2}])
def test_parameters_of_the_votes_are_refused_as_before(parameters: dict[str, int]) -> None:
    with pytest.raises(PolicyError, match="must be"):
        AdaKV(**parameters)


def test_pages_of_unequal_heads_are_not_ranked_together() -> None:
    with pytest.raises(CompositionError, match="adakv leaves each KV head its own number of pages, and quest ranks"):
        open_memory(small_layout(), "adakv(window=2) | quest", keep=16, read=32)


class Merging(AdaKV):
    """Folds what it drops."""

    def merge(self, view: SlotView, plan: KeepPlan) -> None:
        return None


def test_sharing_among_heads_and_merging_exclude_each_other() -> None:
    from kvtier.core.compose import bind
    from kvtier.types import Budgets

    with pytest.raises(CompositionError, match="adakv shares a budget among KV heads, and so may neither evict"):
        bind(Merging(window=2), small_layout(), Budgets(keep=8))
