"""SnapKV: the laws of selections, and its plan against the paper's steps written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.policy import Need, Phase, SelectionPolicy
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError, SessionStateError
from kvtier.policies.eviction.snapkv import SnapKV
from kvtier.testing.dense import snapkv_slots
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.selection_laws import SelectionLaws, selection_cases
from kvtier.types import KVLayout


@pytest.mark.parametrize(("window", "kernel"), [(1, 1), (4, 7), (13, 5)])
class TestSnapKV(SelectionLaws, EvictionLaws):
    @pytest.fixture
    def policy(self, window: int, kernel: int) -> SelectionPolicy:
        return SnapKV(window=window, kernel=kernel)


@given(data=st.data(), window=st.integers(1, 12), kernel=st.sampled_from([1, 3, 7, 13]))
def test_the_plan_is_the_paper_written_out(data: st.DataObject, window: int, kernel: int) -> None:
    case = data.draw(selection_cases(least_keep=window + 1))
    policy = SnapKV(window=window, kernel=kernel)
    kept = case.plan(policy)

    for row, votes in zip(kept.tolist(), case.votes(policy), strict=True):
        assert row == snapkv_slots(votes, window=window, kernel=kernel, keep=case.keep)


def test_neighbours_of_a_needle_survive_with_it() -> None:
    votes = torch.zeros(1, 1, 40)
    votes[..., 20] = 1.0
    view = SlotView(positions=torch.arange(40)[None, None], protected=torch.zeros(1, 1, 40, dtype=torch.bool))
    policy = SnapKV(window=2, kernel=5)

    scores = policy.score(view, Stats(window_attention=votes))

    assert scores[0, 0].nonzero()[:, 0].tolist() == [18, 19, 20, 21, 22]


def test_votes_for_the_window_do_not_leak_into_its_neighbours() -> None:
    votes = torch.full((1, 1, 20), 0.1)
    votes[..., 16:] = 100.0
    positions = torch.arange(20)[None, None]
    policy = SnapKV(window=4, kernel=7)
    view = SlotView(positions=positions, protected=policy.protected(positions))

    scores = policy.score(view, Stats(window_attention=votes))

    assert (scores[..., :16] == torch.tensor(0.1)).all()


def test_a_budget_smaller_than_what_is_protected_keeps_the_newest() -> None:
    positions = torch.arange(10)[None, None]
    view = SlotView(positions=positions, protected=torch.ones(1, 1, 10, dtype=torch.bool))

    plan = SnapKV(window=2).select(torch.zeros(1, 1, 10), view, 3)

    assert plan.keep.tolist() == [[[7, 8, 9]]]


def test_it_declares_what_it_needs() -> None:
    policy = SnapKV(window=5)

    assert policy.needs == {Need.WINDOW_ATTENTION}
    assert policy.phase is Phase.PREFILL
    assert policy.window_queries == 5
    assert policy.query_aware
    assert not policy.lossless
    positions = torch.arange(4)[None, None]
    view = SlotView(positions=positions, protected=policy.protected(positions))
    with pytest.raises(SessionStateError, match=r"declare Need\.WINDOW_ATTENTION"):
        policy.score(view, Stats())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"window": 0}, "window must be an integer of at least 1 query, got 0"),
        ({"window": 2.0}, r"window must be an integer of at least 1 query, got 2\.0"),
        ({"window": True}, "window must be an integer of at least 1 query, got True"),
        ({"kernel": 4}, "kernel must be an odd integer of at least 1, got 4"),
        ({"kernel": -1}, "kernel must be an odd integer of at least 1, got -1"),
        ({"kernel": "7"}, "kernel must be an odd integer of at least 1, got '7'"),
        ({"group_reduce": "median"}, "group_reduce must be 'mean', 'max' or 'sum', got 'median'"),
        ({"keep": 32}, r"keep must be more than window \(32\) tokens, got 32"),
        ({"keep": 1.5}, r"keep must be more than window \(32\) tokens, got 1\.5"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        SnapKV(**parameters)  # type: ignore[arg-type]


def test_a_budget_within_the_window_is_refused_when_it_is_allocated() -> None:
    layout = KVLayout.uniform(num_layers=2, num_kv_heads=1, key_dim=4, value_dim=4, dtype="float32")

    assert SnapKV(window=8).allocate(layout, 9) == (9, 9)
    with pytest.raises(PolicyError, match=r"keep must be more than window \(8\) tokens, got 8"):
        SnapKV(window=8).allocate(layout, 8)
