"""Teeth of the selection laws: each bug of published code, made on purpose, and the law that catches it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from kvtier.core.policy import (
    KeepPlan,
    Need,
    Policy,
    SelectionPolicy,
    StepRule,
)
from kvtier.core.stats import SlotView, Stats
from kvtier.policies.eviction.h2o import H2O
from kvtier.policies.eviction.heads import share_heads
from kvtier.policies.eviction.streamingllm import StreamingLLM
from kvtier.testing.check import check_policy
from kvtier.types import GroupReduce

EXAMPLES = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Voted(SelectionPolicy):
    """Keep what was voted for; right, and the base of the wrong ones."""

    name: ClassVar[str] = "voted"
    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.WINDOW_ATTENTION})
    keep: int | None = None
    group_reduce: GroupReduce = "mean"

    @property
    def window_queries(self) -> int:
        return 2

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        return stats.require_window_attention()


class CachesQueryHeads(Voted):
    """SnapKV, PyramidKV, D2O: keys are repeated for every query head, then ranked and stored."""

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        plan = super().select(scores, view, keep).keep
        return KeepPlan(plan.repeat_interleave(2, dim=1))


class FloatBudget(Voted):
    """Kvpress: ``int(length * (1 - ratio))`` tokens stay, none of a short prompt."""

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        ratio = 1 - keep / (scores.shape[-1] + 10)
        return super().select(scores, view, int(scores.shape[-1] * (1 - ratio)))


class ThresholdOfHeadZero(Voted):
    """InfiniGen's accuracy model: what the first head's maximum says holds for every head."""

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        votes = stats.require_window_attention()
        return (votes >= votes[:, :1].amax(-1, keepdim=True) / 2).float()


class SumsOverTheBatch(Voted):
    """H2O's real-drop code: column sums are added over the rows of the batch."""

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        votes = stats.require_window_attention()
        return votes.sum(0, keepdim=True).expand_as(votes).contiguous()


@dataclass(frozen=True, kw_only=True)
class RemembersThePreviousSample(Voted):
    """D2O: the EMA threshold of one sample is the start of the next."""

    past: list[float] = field(default_factory=list)

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        votes = stats.require_window_attention()
        mean = float(votes.mean())
        self.past.append(mean if not self.past else (self.past[-1] + mean) / 2)
        return (votes >= self.past[-1]).float()


class ForgetsItsWindow(Voted):
    """A budget that does not hold what it protects: the sinks compete for it."""

    def protected(self, positions: torch.Tensor) -> torch.Tensor:
        return positions < 2

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        return super().select(scores, SlotView(positions=view.positions, protected=view.protected & False), keep)


class KeepsInScoreOrder(Voted):
    """Kvpress: kept tokens stay in the order of their scores."""

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        return KeepPlan(scores.topk(min(keep, scores.shape[-1]), dim=-1).indices)


class BreaksTies(Voted):
    """Of equal scores any slot stays, which differs between devices."""

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        return KeepPlan(super().select(scores.flip(-1), view, keep).keep.neg().add(scores.shape[-1] - 1).flip(-1))


class NormalisesInPlace(Voted):
    """Statistics that other policies read are divided in place."""

    def score(self, view: SlotView, stats: Stats) -> torch.Tensor:
        return stats.require_window_attention().sub_(1)


class RoundsLayers(Voted):
    """PyramidKV's floor division: the budgets of the layers do not sum to the budget."""

    def allocate(self, layout: Any, keep: int) -> tuple[int, ...]:
        layers = len(layout.layers)
        return tuple(max(1, 2 * keep - (2 * keep // layers) * layer) for layer in range(layers))


class Shared(Voted):
    """KV heads share a budget, half of which each keeps for itself; right, and the base of the wrong ones."""

    shares_heads: ClassVar[bool] = True

    def least(self, keep: int) -> int:
        return keep // 2

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        return share_heads(scores, view, keep, self.least(keep))


class RoundsHeads(Shared):
    """AdaKV's published code: the best are counted by head, mixed with the even share, and rounded."""

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        counts = share_heads(scores, view, keep, 0).stays(scores.shape[-1]).sum(-1)
        mixed = torch.round(counts * 0.5 + keep / 2 + 0.01).long()
        best = torch.argsort(scores, dim=-1, descending=True, stable=True)
        place = torch.empty_like(best).scatter_(-1, best, torch.arange(scores.shape[-1]).expand_as(best).contiguous())
        return KeepPlan.of(place < mixed.unsqueeze(-1))


class StarvesAHead(Shared):
    """No safeguard: the best of all heads, whoever has them."""

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        return share_heads(scores, view, keep, 0)


class SharesOverTheBatch(Shared):
    """One ranking for the heads of all rows."""

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        def one(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.flatten(0, 1)[None]

        valid = None if view.valid is None else one(view.valid)
        whole = SlotView(positions=one(view.positions), protected=one(view.protected), valid=valid)
        stays = share_heads(one(scores), whole, keep, self.least(keep)).stays(scores.shape[-1])
        return KeepPlan.of(stays[0].unflatten(0, scores.shape[:2]))


class SharesNothing(Shared):
    """Says that heads share a budget, and gives each the same."""

    def select(self, scores: torch.Tensor, view: SlotView, keep: int) -> KeepPlan:
        return share_heads(scores, view, keep, keep)


class Aged(StreamingLLM):
    """The sinks and the newest, told by position; right, and the base of the wrong ones."""

    name: ClassVar[str] = "aged"


class NamesASink(Aged):
    """The oldest token, whatever protects it."""

    @property
    def step_rule(self) -> StepRule:
        return StepRule(by=None)


class NamesTheNext(Aged):
    """One token further than the first behind the sinks."""

    @property
    def step_rule(self) -> StepRule:
        return StepRule(by=None, sinks=self.sinks + 1)


class Hitters(H2O):
    """Heavy hitters and the newest; right, and the base of the wrong ones."""

    name: ClassVar[str] = "hitters"


class ForgetsTheRecent(Hitters):
    """A token that few queries have seen yet leaves first."""

    @property
    def step_rule(self) -> StepRule:
        return StepRule(by=Need.COLUMN_SUMS)


class DropsTheOldest(Hitters):
    """By age, as if no vote had been taken."""

    @property
    def step_rule(self) -> StepRule:
        return StepRule(by=None, recent=self.recent)


class AsksForMore(Hitters):
    """A statistic that the runtime was not told to keep."""

    @property
    def step_rule(self) -> StepRule:
        return StepRule(by=Need.WINDOW_ATTENTION, recent=self.recent)


@pytest.mark.parametrize("right", [Voted(), Shared(), Aged(sinks=2), Hitters(recent=2)])
def test_a_right_policy_breaks_no_law(right: SelectionPolicy) -> None:
    verdicts = list(check_policy(right, examples=15))

    assert not [verdict for verdict in verdicts if verdict.holds is False]
    assert len(verdicts) >= 15


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (CachesQueryHeads(), "S4", r"1 rows of 1 KV heads, and plans for 1 rows of 2 heads"),
        (FloatBudget(), "S1", r"1 of 1 slots must stay, 0 do"),
        (
            ThresholdOfHeadZero(),
            "S6",
            r"(KV head \d keeps .* alone and .* in company|in reverse order keep other slots)",
        ),
        (SumsOverTheBatch(), "S6", r"row \d, KV head \d keeps \[.*\] alone and \[.*\] in company"),
        (RemembersThePreviousSample(), "S13", r"row \d, KV head \d kept \[.*\], then \[.*\]"),
        (ForgetsItsWindow(), "S2", r"row 0, KV head 0 drops slots \[[01]\], which are protected"),
        (KeepsInScoreOrder(), "S3", r"row 0, KV head 0 keeps \[\d, \d"),
        (BreaksTies(), "S8", r"row 0, KV head 0 keeps \[1\] of the ranked slots; the best are \[0\]"),
        (NormalisesInPlace(), "S12", r"the votes are not what they were"),
        (RoundsHeads(), "S1", r"row 0: \d+ slots must stay in all, \d+ do: \[.*\]|slots must stay, \d+ do"),
        (StarvesAHead(), "S1", r"row \d, KV head \d: \d+ to \d+ of \d+ slots must stay, \d+ do"),
        (SharesOverTheBatch(), "S1", r"row 0: \d+ slots must stay in all, \d+ do: \[.*\]"),
        (SharesNothing(), "S10", r"row \d keeps a slot of score 0.* beyond its head's least, and drops one of"),
        (RoundsLayers(), "S11", r"1 tokens in each of 1 layers, 2 in all"),
        (NamesASink(sinks=1), "S18", r"row 0, KV head 0 drops \[1\], and its rule \[0\]"),
        (NamesTheNext(sinks=1), "S18", r"row 0, KV head 0 drops \[1\], and its rule \[2\]"),
        (ForgetsTheRecent(recent=1), "S18", r"row 0, KV head 0 drops \[1\], and its rule \[2\]"),
        (DropsTheOldest(recent=1), "S18", r"row 0, KV head 0 drops \[1\], and its rule \[0\]"),
        (AsksForMore(recent=1), "S18", r"the rule asks for Need.WINDOW_ATTENTION, which is not among the needs"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_wrong_selections_are_caught(wrong: Policy, code: str, words: str) -> None:
    (verdict,) = check_policy(wrong, examples=EXAMPLES, only=[code])

    assert verdict.holds is False
    assert re.search(words, verdict.found), verdict.found


@pytest.mark.parametrize("wrong", [NamesASink(sinks=1), NamesTheNext(sinks=1)])
def test_no_other_law_sees_what_is_named_by_position(wrong: Policy) -> None:
    broken = [verdict.code for verdict in check_policy(wrong, examples=15) if verdict.holds is False]

    assert broken == ["S18"]
