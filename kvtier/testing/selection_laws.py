"""The laws of selection policies: subclass `SelectionLaws` in a test file and they run on your policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from hypothesis import strategies as st

from kvtier.core.policy import Need, SelectionPolicy
from kvtier.core.selection import group_reduce
from kvtier.core.stats import QueryMoments, SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.testing.draws import DTYPES, draw_levels, table
from kvtier.testing.law import PolicyLaws, claimed, law, require
from kvtier.types import KVLayout, Rope

__all__ = ["Contents", "SelectionCase", "SelectionLaws", "least_budget", "selection_cases"]

_MOST_BUDGET = 300
_KEY_DIM = 4
_ROPE = Rope(frequencies=(1.0, 0.125))


@dataclass(frozen=True)
class Contents:
    """What slots hold and who will look at them, for policies that ask: all drawn from one seed.

    ``keys`` [B, Hk, T, D], ``value_norms`` [B, Hk, T], and the queries' ``mean`` [B, Hq, D] and ``covariance``
    [B, Hq, D, D].
    """

    keys: torch.Tensor
    value_norms: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def drawn(cls, seed: int, rows: int, heads: int, group: int, slots: int, dtype: torch.dtype) -> Contents:
        """Random ones, without ties."""
        random = torch.Generator().manual_seed(seed)
        queries = torch.randn(rows, heads * group, 6, _KEY_DIM, generator=random)
        apart = queries - queries.mean(2, keepdim=True)
        return cls(
            torch.randn(rows, heads, slots, _KEY_DIM, generator=random).to(dtype),
            torch.rand(rows, heads, slots, generator=random) + 0.5,
            queries.mean(2),
            apart.mT @ apart / 6,
        )

    def only(self, rows: Sequence[int], heads: Sequence[int]) -> Contents:
        """These rows and KV heads, with their query heads, in this order."""
        group = self.mean.shape[1] // self.keys.shape[1]
        of_queries = (
            part[list(rows)].unflatten(1, (-1, group))[:, list(heads)].flatten(1, 2)
            for part in (self.mean, self.covariance)
        )
        return Contents(
            self.keys[list(rows)][:, list(heads)], self.value_norms[list(rows)][:, list(heads)], *of_queries
        )

    def at(self, slots: torch.Tensor) -> Contents:
        """Of these slots [B, Hk, K] alone."""
        keys = self.keys.gather(2, slots.unsqueeze(-1).expand(*slots.shape, _KEY_DIM))
        return replace(self, keys=keys, value_norms=self.value_norms.gather(2, slots))

    def single(self) -> Contents:
        """With the first query head of each KV head."""
        group = self.mean.shape[1] // self.keys.shape[1]
        return replace(self, mean=self.mean[:, ::group], covariance=self.covariance[:, ::group])


@dataclass(frozen=True)
class SelectionCase:
    """Votes of query heads [B, Hq, T] over slots at positions [B, Hk, T], a budget, and what the slots hold."""

    query_votes: torch.Tensor
    positions: torch.Tensor
    keep: int
    contents: Contents

    @property
    def slots(self) -> int:
        """Slots T of each row and KV head."""
        return self.positions.shape[2]

    def votes(self, policy: SelectionPolicy) -> torch.Tensor:
        """Votes of KV heads [B, Hk, T] fp32, as the runtime reduces them for this policy."""
        return group_reduce(self.query_votes.float(), self.positions.shape[1], getattr(policy, "group_reduce", "mean"))

    def view(self, policy: SelectionPolicy) -> SlotView:
        """What the policy sees of the slots."""
        held = self.contents
        return SlotView(
            positions=self.positions,
            protected=policy.protected(self.positions),
            keys=held.keys if Need.KEYS in policy.needs else None,
            value_norms=held.value_norms if Need.VALUE_NORMS in policy.needs else None,
        )

    def stats(self, policy: SelectionPolicy) -> Stats:
        """What the policy is told of attention."""
        votes, moments = self.votes(policy), None
        if Need.QUERY_MOMENTS in policy.needs:
            moments = QueryMoments(self.contents.mean, self.contents.covariance, _ROPE, 0.5)
        return Stats(window_attention=votes, column_sums=votes.clone(), query_moments=moments)

    def scores(self, policy: SelectionPolicy) -> torch.Tensor:
        """Scores [B, Hk, T]."""
        return policy.score(self.view(policy), self.stats(policy))

    def plan(self, policy: SelectionPolicy, keep: int | None = None) -> torch.Tensor:
        """Slots kept [B, Hk, K]."""
        return policy.select(self.scores(policy), self.view(policy), self.keep if keep is None else keep).keep

    def only(self, rows: Sequence[int], heads: Sequence[int]) -> SelectionCase:
        """These rows and KV heads, with their query heads, in this order."""
        group = self.query_votes.shape[1] // self.positions.shape[1]
        votes = self.query_votes[list(rows)].unflatten(1, (-1, group))[:, list(heads)].flatten(1, 2)
        positions = self.positions[list(rows)][:, list(heads)]
        return SelectionCase(votes, positions, self.keep, self.contents.only(rows, heads))

    def describe(self) -> str:
        """The case in words."""
        rows, heads = self.positions.shape[:2]
        return (
            f"{rows} rows, {heads} KV heads of {self.query_votes.shape[1] // heads} query heads, {self.slots} slots, "
            f"keep {self.keep}, {self.query_votes.dtype}; {table('positions', self.positions)}; "
            f"{table('votes', self.query_votes)}"
        )


@st.composite
def selection_cases(draw: st.DrawFn, *, least_keep: int = 1, most_slots: int = 40) -> SelectionCase:
    """Cases of up to 3 rows, 3 KV heads of 1, 2 or 4 query heads, with many ties, gaps and budgets beyond the slots."""
    rows, heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    slots = draw(st.integers(1, most_slots))
    levels = draw(st.sampled_from([1, 2, 4, 250]))
    # Query heads of very different strength, so that one cannot speak for another.
    strength = 4.0 ** -draw_levels(draw, (rows, heads * group, 1), 3)
    votes = draw_levels(draw, (rows, heads * group, slots), levels) / levels * strength
    gaps = 1 + draw_levels(draw, (rows, heads, slots), draw(st.integers(1, 4)))
    votes = votes.to(draw(st.sampled_from(DTYPES)))
    keep = draw(st.integers(least_keep, max(slots + 5, least_keep)))
    contents = Contents.drawn(draw(st.integers(0, 99)), rows, heads, group, slots, votes.dtype)
    return SelectionCase(votes, gaps.cumsum(-1) - 1, keep, contents)


def least_budget(policy: SelectionPolicy) -> int:
    """The smallest budget that a policy accepts for a layer."""
    layout = KVLayout.uniform(num_layers=1, num_kv_heads=1, key_dim=4, value_dim=4, dtype="float32")
    if policy.keep is not None:
        return policy.keep
    return next((keep for keep in range(1, _MOST_BUDGET) if _accepts(policy, layout, keep)), 1)


def _accepts(policy: SelectionPolicy, layout: KVLayout, keep: int) -> bool:
    try:
        policy.allocate(layout, keep)
    except PolicyError:
        return False
    return True


def _cases(suite: SelectionLaws, policy: SelectionPolicy) -> st.SearchStrategy[SelectionCase]:
    del suite
    least = least_budget(policy)
    return selection_cases(least_keep=least, most_slots=least + 24)


class SelectionLaws(PolicyLaws):
    """What every selection policy keeps; override the fixture ``policy``.

    Examples
    --------
    ::

        class TestMySelection(SelectionLaws):
            @pytest.fixture
            def policy(self) -> SelectionPolicy:
                return MySelection(window=4)
    """

    @law("S1", "every row and KV head keeps exactly its budget, or all it has", case=_cases)
    def test_the_budget_is_exact(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        kept = case.plan(policy).shape[-1]
        must = min(case.keep, case.slots)
        require(kept == must, f"{must} of {case.slots} slots must stay, {kept} do")

    @law("S2", "protected slots stay, the newest first when the budget is smaller", case=_cases)
    def test_protected_slots_stay(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        protected = policy.protected(case.positions)
        kept = _mask(case.plan(policy), protected)
        for place, (mine, theirs) in _each(kept, protected):
            must = theirs.nonzero()[:, 0].tolist()[-case.keep :]
            lost = [slot for slot in must if not mine[slot]]
            require(not lost, f"{place} drops slots {lost}, which are protected")

    @law("S3", "kept slots are distinct, in range and ascend", case=_cases)
    def test_slots_ascend_in_range(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        kept = case.plan(policy)
        require(kept.dtype == torch.int64, f"slots are int64, got {kept.dtype}")
        for place, (row,) in _each(kept):
            slots = row.tolist()
            require(slots == sorted(set(slots)), f"{place} keeps {slots}")
            require(all(0 <= slot < case.slots for slot in slots), f"{place} keeps {slots} of {case.slots} slots")

    @law("S4", "there is one plan for each KV head, none for query heads", case=_cases)
    def test_heads_are_kv_heads(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        kept, must = tuple(case.plan(policy).shape[:2]), tuple(case.positions.shape[:2])
        require(kept == must, f"{must[0]} rows of {must[1]} KV heads, and plans for {kept[0]} rows of {kept[1]} heads")

    @law("S5", "a larger budget keeps what a smaller one keeps", case=_cases, more=st.integers(1, 20))
    def test_budgets_are_nested(self, policy: SelectionPolicy, case: SelectionCase, more: int) -> None:
        for place, (few, many) in _each(case.plan(policy), case.plan(policy, case.keep + more)):
            lost = sorted(set(few.tolist()) - set(many.tolist()))
            require(not lost, f"{place} keeps slots {lost} with {case.keep} tokens and not with {case.keep + more}")

    @law("S6", "a row and KV head is planned the same in any company and in any order", case=_cases)
    def test_rows_and_heads_are_planned_alone(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        together = case.plan(policy)
        rows, heads = case.positions.shape[:2]
        for row in range(rows):
            for head in range(heads):
                alone = case.only([row], [head]).plan(policy)[0, 0].tolist()
                mine = together[row, head].tolist()
                require(alone == mine, f"row {row}, KV head {head} keeps {alone} alone and {mine} in company")
        turned = case.only(range(rows)[::-1], range(heads)[::-1]).plan(policy).flip(0, 1)
        require(torch.equal(turned, together), "rows and heads in reverse order keep other slots")

    @law("S8", "of equal scores the earlier slot stays, and what is dropped never scored more", case=_cases)
    def test_the_best_stay_and_ties_go_to_the_earlier(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        scores, protected = case.scores(policy), policy.protected(case.positions)
        for place, (score, safe, stays) in _each(scores, protected, _mask(case.plan(policy), protected)):
            ranked = [slot for slot in range(case.slots) if not safe[slot]]
            best = sorted(ranked, key=lambda slot: (-float(score[slot]), slot))
            must = sorted(best[: int(sum(bool(stays[slot]) for slot in ranked))])
            mine = [slot for slot in ranked if stays[slot]]
            require(mine == must, f"{place} keeps {mine} of the ranked slots; the best are {must}")

    @law("S9", "selecting again at the same budget drops nothing", case=_cases)
    def test_selecting_again_changes_nothing(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        kept = case.plan(policy)
        group = case.query_votes.shape[1] // case.positions.shape[1]
        votes = case.query_votes.gather(-1, kept.repeat_interleave(group, 1))
        left = SelectionCase(votes, case.positions.gather(-1, kept), case.keep, case.contents.at(kept))
        again = left.plan(policy)
        for place, (row,) in _each(again):
            require(row.numel() == kept.shape[-1], f"{place} kept {kept.shape[-1]} slots, and then {row.numel()}")

    @law(
        "S11",
        "the budgets of all layers sum to the budget times the layers",
        layers=st.integers(1, 40),
        more=st.integers(0, 4000),
    )
    def test_layers_share_the_budget_exactly(self, policy: SelectionPolicy, layers: int, more: int) -> None:
        layout = KVLayout.uniform(num_layers=layers, num_kv_heads=2, key_dim=8, value_dim=8, dtype="float32")
        keep = least_budget(policy) + more
        shares = policy.allocate(layout, keep)
        require(all(type(share) is int for share in shares), f"budgets are integers of tokens, got {shares}")
        require(len(shares) == layers, f"{layers} layers and {len(shares)} budgets")
        require(sum(shares) == keep * layers, f"{keep} tokens in each of {layers} layers, {sum(shares)} in all")
        require(min(shares) >= 1, f"a layer keeps {min(shares)} tokens")

    @law("S12", "statistics belong to the runtime: scoring changes none", case=_cases)
    def test_scoring_changes_no_statistic(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        view, votes, stats = case.view(policy), case.votes(policy), case.stats(policy)
        positions, protected = view.positions.clone(), view.protected.clone()
        policy.select(policy.score(view, stats), view, case.keep)
        same = torch.equal(stats.require_window_attention(), votes) and torch.equal(stats.require_column_sums(), votes)
        require(same, "the votes are not what they were")
        require(torch.equal(view.positions, positions), "the positions are not what they were")
        require(torch.equal(view.protected, protected), "the protected slots are not what they were")

    @law("S13", "a plan is the same whatever was planned before", case=_cases, other=_cases)
    def test_no_state_survives(self, policy: SelectionPolicy, case: SelectionCase, other: SelectionCase) -> None:
        first = case.plan(policy)
        other.plan(policy)
        again = case.plan(policy)
        for place, (before, after) in _each(first, again):
            require(before.tolist() == after.tolist(), f"{place} kept {before.tolist()}, then {after.tolist()}")

    @law("S14", "with one query head a KV head, mean, max and sum keep the same", case=_cases)
    def test_reductions_of_one_head_agree(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        claimed(hasattr(policy, "group_reduce"), f"{policy.name} has no group_reduce")
        group = case.query_votes.shape[1] // case.positions.shape[1]
        single = SelectionCase(case.query_votes[:, ::group], case.positions, case.keep, case.contents.single())
        plans = {how: single.plan(_reducing(policy, how)) for how in ("mean", "max", "sum")}
        for how, plan in plans.items():
            require(torch.equal(plan, plans["mean"]), f"mean and {how} of a single query head keep other slots")


def _reducing(policy: SelectionPolicy, how: str) -> SelectionPolicy:
    changed: SelectionPolicy = replace(cast("Any", policy), group_reduce=how)
    return changed


def _mask(kept: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like).scatter_(-1, kept, True)


def _each(*tensors: torch.Tensor) -> list[tuple[str, tuple[torch.Tensor, ...]]]:
    """The slots of each row and head of tensors [B, Hk, ...], and their place in words."""
    rows, heads = tensors[0].shape[:2]
    return [
        (f"row {row}, KV head {head}", tuple(tensor[row, head] for tensor in tensors))
        for row in range(rows)
        for head in range(heads)
    ]
