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
)
from kvtier.core.stats import SlotView, Stats
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


def test_a_right_policy_breaks_no_law() -> None:
    verdicts = list(check_policy(Voted(), examples=15))

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
        (RoundsLayers(), "S11", r"1 tokens in each of 1 layers, 2 in all"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_wrong_selections_are_caught(wrong: Policy, code: str, words: str) -> None:
    (verdict,) = check_policy(wrong, examples=EXAMPLES, only=[code])

    assert verdict.holds is False
    assert re.search(words, verdict.found), verdict.found
