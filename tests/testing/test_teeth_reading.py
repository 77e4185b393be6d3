"""Teeth of the retrieval and prompt filter laws: bugs made on purpose, and the law that catches each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from kvtier.core.policy import (
    Policy,
    PromptFilterPolicy,
    RetrievalPolicy,
    Sketch,
)
from kvtier.testing.check import check_policy
from kvtier.types import GroupReduce

EXAMPLES = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes(RetrievalPolicy):
    """Quest's bounds, written out, with page 0 pinned as sinks; right."""

    name: ClassVar[str] = "boxes"
    paper: ClassVar[str] = "none"
    read: int | None = None
    dense_layers: int = 0
    group_reduce: GroupReduce = "max"

    @property
    def upper_bound(self) -> bool:
        return True

    def sketch(self, keys: torch.Tensor) -> Sketch:
        return {"low": keys.amin(2), "high": keys.amax(2)}

    def sketch_bytes(self, key_dim: int, element_bytes: int) -> int:
        return 2 * key_dim * element_bytes

    def pinned(self, sketch: Sketch) -> torch.Tensor:
        return torch.arange(sketch["low"].shape[2]).expand(sketch["low"].shape[:3]) == 0

    def rank(self, query: torch.Tensor, sketch: Sketch) -> torch.Tensor:
        scores = self.bounds(query, sketch)
        return scores.masked_fill(self.pinned(sketch), torch.inf)

    def bounds(self, query: torch.Tensor, sketch: Sketch) -> torch.Tensor:
        """Scores [B, Hk, N] of pages."""
        queries = query.float().unflatten(1, (sketch["low"].shape[1], -1))[:, :, :, :, None]
        low, high = (sketch[name].float()[:, :, None, None] for name in ("low", "high"))
        return torch.maximum(queries * low, queries * high).sum(-1).amax((2, 3))


class ForgetsSinks(Boxes):
    """A budget that forgets sinks or outliers: they are pinned, and then compete like any page."""

    def rank(self, query: torch.Tensor, sketch: Sketch) -> torch.Tensor:
        return self.bounds(query, sketch)


class OutliersOnTop(Boxes):
    """ShadowKV: outliers and local pages come on top of the budget."""

    def choose(self, scores: torch.Tensor, pages: int) -> Any:
        return super().choose(scores, pages + 1)


class RanksByMeans(Boxes):
    """A mean is no bound."""

    def bounds(self, query: torch.Tensor, sketch: Sketch) -> torch.Tensor:
        middle = dict.fromkeys(("low", "high"), (sketch["low"] + sketch["high"]) / 2)
        return super().bounds(query, middle)


class RanksByHeadZero(Boxes):
    """InfiniGen's accuracy model: head 0 speaks for every head."""

    def bounds(self, query: torch.Tensor, sketch: Sketch) -> torch.Tensor:
        scores = super().bounds(query, sketch)
        return scores / scores[:, :1].abs().amax(-1, keepdim=True).clamp(min=1)


def test_a_right_retrieval_breaks_no_law() -> None:
    verdicts = list(check_policy(Boxes(), examples=EXAMPLES))

    assert not [verdict for verdict in verdicts if verdict.holds is False]


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (ForgetsSinks(), "R7", r"pages \[0\] are pinned, \[\d\] are read with 1 pages"),
        (OutliersOnTop(), "R2", r"1 pages are due, got \[1, 1, 2\]"),
        (RanksByMeans(), "R1", r"page \d scores .* and holds a logit of"),
        (RanksByHeadZero(), "R6", r"KV head [12] scores .* alone, .* in company"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_wrong_retrievals_are_caught(wrong: Policy, code: str, words: str) -> None:
    (verdict,) = check_policy(wrong, examples=EXAMPLES, only=[code])

    assert verdict.holds is False
    assert re.search(words, verdict.found), verdict.found


@dataclass(frozen=True, slots=True, kw_only=True)
class TopTokens(PromptFilterPolicy):
    """The best tokens and the last one; right."""

    name: ClassVar[str] = "top tokens"
    paper: ClassVar[str] = "none"

    def protected(self, tokens: int) -> torch.Tensor:
        return torch.arange(tokens) == tokens - 1

    def keep_tokens(self, token_ids: torch.Tensor, votes: torch.Tensor, keep: int) -> torch.Tensor:
        safe = votes.masked_fill(self.protected(votes.shape[0]), torch.inf)
        return safe.sort(descending=True, stable=True).indices[:keep].sort().values


class LosesTheQuestion(TopTokens):
    """The end of the prompt competes with the document."""

    def keep_tokens(self, token_ids: torch.Tensor, votes: torch.Tensor, keep: int) -> torch.Tensor:
        return votes.sort(descending=True, stable=True).indices[:keep].sort().values


class RunsInScoreOrder(TopTokens):
    """Tokens are run in the order of their votes."""

    def keep_tokens(self, token_ids: torch.Tensor, votes: torch.Tensor, keep: int) -> torch.Tensor:
        return votes.sort(descending=True, stable=True).indices[:keep]


def test_a_right_filter_breaks_no_law() -> None:
    verdicts = list(check_policy(TopTokens(), examples=EXAMPLES))

    assert not [verdict for verdict in verdicts if verdict.holds is False]


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (LosesTheQuestion(), "E2", r"tokens \[1\] are protected and not run"),
        (RunsInScoreOrder(), "E1", r"tokens \[1, 0\] are run"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_wrong_filters_are_caught(wrong: Policy, code: str, words: str) -> None:
    (verdict,) = check_policy(wrong, examples=EXAMPLES, only=[code])

    assert verdict.holds is False
    assert re.search(words, verdict.found), verdict.found
