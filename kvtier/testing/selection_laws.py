"""The laws of selection policies: subclass `SelectionLaws` in a test file and they run on your policy."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.core.policy import SelectionPolicy
from kvtier.core.stats import SlotView, Stats
from kvtier.types import KVLayout

__all__ = ["SelectionCase", "SelectionLaws", "selection_cases"]

_LAW = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
)


@dataclass(frozen=True)
class SelectionCase:
    """Votes [B, Hk, T] over slots at positions [B, Hk, T], and a budget."""

    votes: torch.Tensor
    positions: torch.Tensor
    keep: int

    def view(self, policy: SelectionPolicy) -> SlotView:
        """What the policy sees of the slots."""
        return SlotView(positions=self.positions, protected=policy.protected(self.positions))

    def scores(self, policy: SelectionPolicy) -> torch.Tensor:
        """Scores [B, Hk, T]."""
        stats = Stats(window_attention=self.votes.clone(), column_sums=self.votes.clone())
        return policy.score(self.view(policy), stats)

    def plan(self, policy: SelectionPolicy, keep: int | None = None) -> torch.Tensor:
        """Slots kept [B, Hk, K]."""
        return policy.select(self.scores(policy), self.view(policy), self.keep if keep is None else keep).keep


@st.composite
def selection_cases(draw: st.DrawFn, *, least_keep: int) -> SelectionCase:
    """Cases of up to 3 rows, 3 heads and 70 slots, with many ties, gaps in the positions and budgets beyond them."""
    rows, heads, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 70))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    votes = torch.randint(levels, (rows, heads, slots), generator=random).float() / levels
    gaps = torch.randint(1, draw(st.integers(2, 5)), (rows, heads, slots), generator=random)
    return SelectionCase(votes, gaps.cumsum(-1), draw(st.integers(least_keep, max(slots + 5, least_keep))))


class SelectionLaws:
    """What every selection policy keeps; override the fixture ``policy``.

    Examples
    --------
    ::

        class TestMySelection(SelectionLaws):
            @pytest.fixture
            def policy(self) -> SelectionPolicy:
                return MySelection(window=4)
    """

    least_keep = 1
    """The smallest budget that the policy accepts."""

    @pytest.fixture
    def policy(self) -> SelectionPolicy:
        """Make the policy under test."""
        pytest.fail("override the fixture 'policy': return a SelectionPolicy")

    @_LAW
    @given(data=st.data())
    def test_the_budget_is_exact_and_slots_ascend_in_range(self, policy: SelectionPolicy, data: st.DataObject) -> None:
        """S1, S3: min(budget, slots) distinct slots, ascending."""
        case = data.draw(selection_cases(least_keep=self.least_keep))
        kept = case.plan(policy)

        slots = case.votes.shape[-1]
        assert kept.shape == (*case.votes.shape[:2], min(case.keep, slots))
        assert kept.dtype == torch.int64
        assert (kept.diff(dim=-1) > 0).all()
        assert 0 <= int(kept.min()) <= int(kept.max()) < slots

    @_LAW
    @given(data=st.data())
    def test_protected_slots_stay_the_newest_first(self, policy: SelectionPolicy, data: st.DataObject) -> None:
        """S2: all of them if the budget allows, else the newest."""
        case = data.draw(selection_cases(least_keep=self.least_keep))
        protected = policy.protected(case.positions)
        kept = torch.zeros_like(protected).scatter_(-1, case.plan(policy), True)

        for mine, theirs in zip(kept.flatten(0, 1), protected.flatten(0, 1), strict=True):
            must = theirs.nonzero()[:, 0].tolist()[-case.keep :]
            assert mine[must].all(), f"slots {must} are protected"

    @_LAW
    @given(data=st.data(), more=st.integers(1, 20))
    def test_a_larger_budget_keeps_what_a_smaller_one_keeps(
        self, policy: SelectionPolicy, data: st.DataObject, more: int
    ) -> None:
        """S5."""
        case = data.draw(selection_cases(least_keep=self.least_keep))
        small, large = case.plan(policy), case.plan(policy, case.keep + more)

        for few, many in zip(small.flatten(0, 1).tolist(), large.flatten(0, 1).tolist(), strict=True):
            assert set(few) <= set(many)

    @_LAW
    @given(data=st.data())
    def test_rows_and_heads_are_planned_alone(self, policy: SelectionPolicy, data: st.DataObject) -> None:
        """S6, S13: the plan of a row and head is the same in any company, and whatever was planned before."""
        case = data.draw(selection_cases(least_keep=self.least_keep))
        together = case.plan(policy)

        for row in range(case.votes.shape[0]):
            for head in range(case.votes.shape[1]):
                pick = (slice(row, row + 1), slice(head, head + 1))
                alone = SelectionCase(case.votes[pick], case.positions[pick], case.keep)
                assert torch.equal(alone.plan(policy)[0, 0], together[row, head])

    @_LAW
    @given(data=st.data())
    def test_of_equal_scores_the_earlier_slot_stays(self, policy: SelectionPolicy, data: st.DataObject) -> None:
        """S8, S10: what is dropped scores less, or the same and lies behind."""
        case = data.draw(selection_cases(least_keep=self.least_keep))
        protected, scores = policy.protected(case.positions), case.scores(policy)
        kept = torch.zeros_like(protected).scatter_(-1, case.plan(policy), True)

        flat = (part.flatten(0, 1).tolist() for part in (scores, protected, kept))
        for score, safe, stays in zip(*flat, strict=True):
            ranked = [slot for slot in range(len(score)) if not safe[slot]]
            order = sorted(ranked, key=lambda slot: (-score[slot], slot))
            assert [stays[slot] for slot in order] == sorted((stays[slot] for slot in ranked), reverse=True)

    @_LAW
    @given(data=st.data())
    def test_selecting_again_changes_nothing(self, policy: SelectionPolicy, data: st.DataObject) -> None:
        """S9: at the same budget, all that was kept is kept."""
        case = data.draw(selection_cases(least_keep=self.least_keep))
        kept = case.plan(policy)
        again = SelectionCase(case.votes.gather(-1, kept), case.positions.gather(-1, kept), case.keep)

        assert torch.equal(again.plan(policy), torch.arange(kept.shape[-1]).expand_as(kept))

    @_LAW
    @given(data=st.data())
    def test_scoring_changes_no_statistic(self, policy: SelectionPolicy, data: st.DataObject) -> None:
        """The statistics belong to the runtime."""
        case = data.draw(selection_cases(least_keep=self.least_keep))
        stats = Stats(window_attention=case.votes.clone(), column_sums=case.votes.clone())
        view = case.view(policy)
        policy.select(policy.score(view, stats), view, case.keep)

        assert torch.equal(stats.require_window_attention(), case.votes)
        assert torch.equal(stats.require_column_sums(), case.votes)

    @pytest.mark.parametrize("layers", [1, 3, 32])
    def test_layers_share_the_budget_exactly(self, policy: SelectionPolicy, layers: int) -> None:
        """S11: the mean over the layers is the budget."""
        layout = KVLayout.uniform(num_layers=layers, num_kv_heads=2, key_dim=8, value_dim=8, dtype="float32")
        for keep in (self.least_keep, self.least_keep + 7, 4096):
            shares = policy.allocate(layout, keep)
            assert len(shares) == layers
            assert sum(shares) == keep * layers
            assert min(shares) >= 1
