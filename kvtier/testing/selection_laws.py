"""The laws of selection policies: subclass `SelectionLaws` in a test file and they run on your policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from hypothesis import strategies as st

from kvtier.core.policy import KeepPlan, Need, SelectionPolicy
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
    """Votes of query heads [B, Hq, T] over slots at positions [B, Hk, T], a budget, and what the slots hold.

    ``valid`` [B, Hk, T] bool says which slots hold a token, None that all do.
    """

    query_votes: torch.Tensor
    positions: torch.Tensor
    keep: int
    contents: Contents
    valid: torch.Tensor | None = None

    @property
    def slots(self) -> int:
        """Slots T of each row and KV head."""
        return self.positions.shape[2]

    def votes(self, policy: SelectionPolicy) -> torch.Tensor:
        """Votes of KV heads [B, Hk, T] fp32, as the runtime reduces them for this policy."""
        return group_reduce(self.query_votes.float(), self.positions.shape[1], getattr(policy, "group_reduce", "mean"))

    def view(self, policy: SelectionPolicy) -> SlotView:
        """What the policy sees of the slots."""
        held, protected = self.contents, policy.protected(self.positions)
        return SlotView(
            positions=self.positions,
            protected=protected if self.valid is None else protected & self.valid,
            keys=held.keys if Need.KEYS in policy.needs else None,
            value_norms=held.value_norms if Need.VALUE_NORMS in policy.needs else None,
            valid=self.valid,
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

    def keeps(self, policy: SelectionPolicy, keep: int | None = None) -> KeepPlan:
        """What the policy keeps."""
        return policy.select(self.scores(policy), self.view(policy), self.keep if keep is None else keep)

    def plan(self, policy: SelectionPolicy, keep: int | None = None) -> torch.Tensor:
        """Slots kept [B, Hk, K], of a policy that keeps as many in every KV head."""
        return self.keeps(policy, keep).keep

    def left(self, policy: SelectionPolicy) -> SelectionCase:
        """The case of the slots that the policy keeps, as a runtime would give them to it again."""
        stays = self.keeps(policy).stays(self.slots)
        most, group = int(stays.sum(-1).max()), self.query_votes.shape[1] // self.positions.shape[1]
        order = torch.argsort(stays.int(), dim=-1, stable=True)[..., self.slots - most :]
        votes = self.query_votes.gather(-1, order.repeat_interleave(group, 1))
        valid = stays.gather(-1, order) if policy.shares_heads else None
        return SelectionCase(votes, self.positions.gather(-1, order), self.keep, self.contents.at(order), valid)

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
def selection_cases(
    draw: st.DrawFn, *, least_keep: int = 1, least_slots: int = 1, most_slots: int = 40
) -> SelectionCase:
    """Cases of up to 3 rows, 3 KV heads of 1, 2 or 4 query heads, with many ties, gaps and budgets beyond the slots."""
    rows, heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    slots = draw(st.integers(least_slots, most_slots))
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


def _one_too_many(suite: SelectionLaws, policy: SelectionPolicy) -> st.SearchStrategy[SelectionCase]:
    """Cases whose budget is one slot less than there are."""
    del suite
    slots = least_budget(policy) + 1
    return selection_cases(least_slots=slots, most_slots=slots + 24).map(
        lambda case: replace(case, keep=case.slots - 1)
    )


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

    @law("S1", "a row keeps exactly its budget, or all it has, and each KV head at least its part of it", case=_cases)
    def test_the_budget_is_exact(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        must, least = min(case.keep, case.slots), min(policy.least(case.keep), case.slots)
        require(0 <= least <= must, f"each KV head is promised {least} slots, of a budget of {must}")
        for row, heads in enumerate(case.keeps(policy).rows()):
            counts = [len(slots) for slots in heads]
            for head, count in enumerate(counts):
                most = case.slots if policy.shares_heads else must
                found = f"row {row}, KV head {head}: {_some(least, most)} of {case.slots} slots must stay, {count} do"
                require(least <= count <= most, found)
            total = must * len(heads)
            require(sum(counts) == total, f"row {row}: {total} slots must stay in all, {sum(counts)} do: {counts}")

    @law("S2", "protected slots stay, the newest first when the budget is smaller", case=_cases)
    def test_protected_slots_stay(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        protected = policy.protected(case.positions)
        kept = case.keeps(policy).stays(case.slots)
        for place, (mine, theirs) in _each(kept, protected):
            must = theirs.nonzero()[:, 0].tolist()[-case.keep :]
            lost = [slot for slot in must if not mine[slot]]
            require(not lost, f"{place} drops slots {lost}, which are protected")

    @law("S3", "kept slots are distinct, in range and ascend", case=_cases)
    def test_slots_ascend_in_range(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        plan = case.keeps(policy)
        require(plan.keep.dtype == torch.int64, f"slots are int64, got {plan.keep.dtype}")
        for place, slots in _rows(plan):
            require(slots == sorted(set(slots)), f"{place} keeps {slots}")
            require(all(0 <= slot < case.slots for slot in slots), f"{place} keeps {slots} of {case.slots} slots")

    @law("S4", "there is one plan for each KV head, none for query heads", case=_cases)
    def test_heads_are_kv_heads(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        kept, must = tuple(case.plan(policy).shape[:2]), tuple(case.positions.shape[:2])
        require(kept == must, f"{must[0]} rows of {must[1]} KV heads, and plans for {kept[0]} rows of {kept[1]} heads")

    @law("S5", "a larger budget keeps what a smaller one keeps", case=_cases, more=st.integers(1, 20))
    def test_budgets_are_nested(self, policy: SelectionPolicy, case: SelectionCase, more: int) -> None:
        larger = _rows(case.keeps(policy, case.keep + more))
        for (place, few), (_, many) in zip(_rows(case.keeps(policy)), larger, strict=True):
            lost = sorted(set(few) - set(many))
            require(not lost, f"{place} keeps slots {lost} with {case.keep} tokens and not with {case.keep + more}")

    @law("S6", "a row and KV head is planned the same in any company and in any order", case=_cases)
    def test_rows_and_heads_are_planned_alone(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        """KV heads that share a budget are each other's company; a row of them is planned alone."""
        together = case.keeps(policy).rows()
        rows, heads = range(case.positions.shape[0]), range(case.positions.shape[1])
        companies = [list(heads)] if policy.shares_heads else [[head] for head in heads]
        for row in rows:
            for company in companies:
                alone = case.only([row], company).keeps(policy).rows()[0]
                for head, slots in zip(company, alone, strict=True):
                    mine = together[row][head]
                    require(slots == mine, f"row {row}, KV head {head} keeps {slots} alone and {mine} in company")
        turned = heads if policy.shares_heads else heads[::-1]
        plans = case.only(rows[::-1], turned).keeps(policy).rows()
        same = [[plans[row][head] for head in turned] for row in rows[::-1]] == together
        require(same, "rows and heads in reverse order keep other slots")

    @law("S8", "of equal scores the earlier slot stays, and what is dropped never scored more", case=_cases)
    def test_the_best_stay_and_ties_go_to_the_earlier(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        scores, protected = case.scores(policy), policy.protected(case.positions)
        stays = case.keeps(policy).stays(case.slots)
        for place, (score, safe, kept) in _each(scores, protected, stays):
            ranked = [slot for slot in range(case.slots) if not safe[slot]]
            best = sorted(ranked, key=lambda slot: (-float(score[slot]), slot))
            must = sorted(best[: int(sum(bool(kept[slot]) for slot in ranked))])
            mine = [slot for slot in ranked if kept[slot]]
            require(mine == must, f"{place} keeps {mine} of the ranked slots; the best are {must}")

    @law("S9", "selecting again at the same budget drops nothing", case=_cases)
    def test_selecting_again_changes_nothing(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        again = case.left(policy).keeps(policy)
        for (place, kept), (_, row) in zip(_rows(case.keeps(policy)), _rows(again), strict=True):
            require(len(row) == len(kept), f"{place} kept {len(kept)} slots, and then {len(row)}")

    @law("S10", "a KV head that shares a budget gives up a slot only to better ones of the others", case=_cases)
    def test_heads_give_up_slots_to_better_ones(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        claimed(policy.shares_heads, f"{policy.name} has a budget for each KV head")
        scores, protected = case.scores(policy), policy.protected(case.positions)
        least = policy.least(case.keep)
        for row, heads in enumerate(case.keeps(policy).rows()):
            dropped, spare = -torch.inf, torch.inf
            for head, slots in enumerate(heads):
                score, safe = scores[row, head].tolist(), protected[row, head].tolist()
                gone = set(range(case.slots)) - set(slots)
                dropped = max([dropped, *(score[slot] for slot in gone if not safe[slot])])
                if len(slots) > max(least, min(sum(safe), case.keep)):
                    spare = min([spare, *(score[slot] for slot in slots if not safe[slot])])
            found = f"row {row} keeps a slot of score {spare:g} beyond its head's least, and drops one of {dropped:g}"
            require(dropped <= spare, found)

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
        first = _rows(case.keeps(policy))
        other.keeps(policy)
        for (place, before), (_, after) in zip(first, _rows(case.keeps(policy)), strict=True):
            require(before == after, f"{place} kept {before}, then {after}")

    @law("S14", "with one query head a KV head, mean, max and sum keep the same", case=_cases)
    def test_reductions_of_one_head_agree(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        claimed(hasattr(policy, "group_reduce"), f"{policy.name} has no group_reduce")
        group = case.query_votes.shape[1] // case.positions.shape[1]
        single = SelectionCase(case.query_votes[:, ::group], case.positions, case.keep, case.contents.single())
        plans = {how: single.keeps(_reducing(policy, how)).rows() for how in ("mean", "max", "sum")}
        for how, plan in plans.items():
            require(plan == plans["mean"], f"mean and {how} of a single query head keep other slots")

    @law("S18", "what the rule of a step drops is what a selection drops", case=_one_too_many)
    def test_the_rule_of_a_step_is_the_selection(self, policy: SelectionPolicy, case: SelectionCase) -> None:
        rule = policy.step_rule
        claimed(rule is not None, f"{policy.name} has no rule for a step")
        if rule is None:
            return
        asked = rule.by is None or rule.by in policy.needs
        require(asked, f"the rule asks for {rule.by}, which is not among the needs of the policy")
        votes = case.votes(policy)
        for row, heads in enumerate(case.keeps(policy).rows()):
            for head, slots in enumerate(heads):
                positions = case.positions[row, head, : case.slots - rule.recent].tolist()
                ranked = [slot for slot, position in enumerate(positions) if position >= rule.sinks]
                gone = sorted(set(range(case.slots)) - set(slots))
                named = ranked[:1]
                if rule.by is not None:
                    named = sorted(ranked, key=lambda slot: (float(votes[row, head, slot]), -slot))[:1]
                require(not ranked or gone == named, f"row {row}, KV head {head} drops {gone}, and its rule {named}")


def _reducing(policy: SelectionPolicy, how: str) -> SelectionPolicy:
    changed: SelectionPolicy = replace(cast("Any", policy), group_reduce=how)
    return changed


def _some(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _rows(plan: KeepPlan) -> list[tuple[str, list[int]]]:
    """The slots that each row and head keeps, and its place in words."""
    return [
        (f"row {row}, KV head {head}", slots)
        for row, heads in enumerate(plan.rows())
        for head, slots in enumerate(heads)
    ]


def _each(*tensors: torch.Tensor) -> list[tuple[str, tuple[torch.Tensor, ...]]]:
    """The slots of each row and head of tensors [B, Hk, ...], and their place in words."""
    rows, heads = tensors[0].shape[:2]
    return [
        (f"row {row}, KV head {head}", tuple(tensor[row, head] for tensor in tensors))
        for row in range(rows)
        for head in range(heads)
    ]
