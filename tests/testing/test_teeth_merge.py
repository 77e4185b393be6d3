"""Teeth of the merge laws: each bug of published code, made on purpose, and the law that catches it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch

from kvtier.core.policy import (
    KeepPlan,
    MergePlan,
    Need,
    Policy,
    SelectionPolicy,
)
from kvtier.core.stats import SlotView, Stats
from kvtier.policies.eviction.d2o import D2O
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Merging(Voted):
    """Fold every dropped slot into the first kept one, convexly; right."""

    def merge(self, view: SlotView, plan: KeepPlan) -> MergePlan | None:
        slots = view.positions.shape[-1]
        everything = torch.arange(slots).expand_as(view.positions)
        dropped = ~torch.zeros_like(view.positions, dtype=torch.bool).scatter_(-1, plan.keep, True)
        target = plan.keep[..., :1].expand_as(everything)
        share = self.weights(view, dropped, target)
        src = torch.cat([everything, target[..., :1]], dim=-1)
        return MergePlan(src, torch.cat([target, target[..., :1]], dim=-1), share)

    def weights(self, view: SlotView, dropped: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of each slot, and of the target itself."""
        total = dropped.sum(-1, keepdim=True) + 1
        return torch.cat([dropped / total, 1 / total], dim=-1) * (total > 1)


class ScalesBySimilarity(Merging):
    """D2O: evicted vectors are scaled by their cosine, then averaged with the kept one: everything shrinks."""

    def weights(self, view: SlotView, dropped: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        total = dropped.sum(-1, keepdim=True) + 1
        cosine = (
            torch.nn.functional.cosine_similarity(
                view.require_keys().float(),
                view.require_keys().float().gather(2, target[..., None].expand_as(view.require_keys())),
                dim=-1,
            ).clamp(min=0)
            * 0.9
        )
        return torch.cat([dropped * cosine / total, 1 / total], dim=-1) * (total > 1)


class Adds(Merging):
    """The additive variant of D2O's merge."""

    def weights(self, view: SlotView, dropped: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        some = dropped.any(-1, keepdim=True)
        return torch.cat([dropped.float(), some.float()], dim=-1)


class MergesKept(Merging):
    """What stays is folded away, too."""

    def merge(self, view: SlotView, plan: KeepPlan) -> MergePlan | None:
        target = plan.keep[..., :1].expand_as(plan.keep)
        return MergePlan(plan.keep, target, torch.full(plan.keep.shape, 1 / plan.keep.shape[-1]))


class OneThreshold(D2O):
    """D2O: a single running threshold decides for every head, and here for every row."""

    __slots__ = ()
    name: ClassVar[str] = "one threshold"

    def merge(self, view: SlotView, plan: KeepPlan) -> MergePlan | None:
        done = D2O.merge(self, view, plan)
        if done is None or done.memory is None:
            return done
        return done._replace(memory=done.memory.mean().expand(done.memory.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdSurvives(D2O):
    """D2O: the clean-up between samples forgets the threshold."""

    name: ClassVar[str] = "threshold survives"
    last: dict[torch.Size, torch.Tensor] = field(default_factory=dict)

    def merge(self, view: SlotView, plan: KeepPlan) -> MergePlan | None:
        shape = view.positions.shape[:2]
        done = D2O.merge(self, replace(view, memory=self.last.get(shape)), plan)
        if done is not None and done.memory is not None:
            self.last[shape] = done.memory
        return done


def test_a_right_merge_breaks_no_law() -> None:
    verdicts = list(check_policy(Merging(), examples=15))

    assert not [verdict for verdict in verdicts if verdict.holds is False]
    assert {"M1", "M13", "S1"} <= {verdict.code for verdict in verdicts}


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (ScalesBySimilarity(), "M1", r"slot 0 becomes 0\.5 of slot 0.*: 0\.5 in all"),
        (Adds(), "M1", r"slot 0 becomes 1 of slot 0, 1 of slot 1: 2 in all"),
        (OneThreshold(sinks=0, recent=1), "M14", "alone, .* in company"),
        (ThresholdSurvives(sinks=0, recent=1), "M13", "first, .* the second time"),
        (MergesKept(), "M4", r"slot 1 is kept and goes into slot 0"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_wrong_merges_are_caught(wrong: Policy, code: str, words: str) -> None:
    (verdict,) = check_policy(wrong, examples=EXAMPLES, only=[code])

    assert verdict.holds is False
    assert re.search(words, verdict.found), verdict.found
