"""A prompt filter is split from what a session runs, with its own budget, and its plans are checked."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvtier.core.compose import policy
from kvtier.core.filtering import BoundFilter, take_filter
from kvtier.core.policy import Need, PromptFilterPolicy
from kvtier.errors import CompositionError, PolicyError
from kvtier.policies.prompt.gemfilter import GemFilter
from kvtier.types import Budgets, KVLayout

LAYOUT = KVLayout.uniform(num_layers=4, num_kv_heads=2, key_dim=8, value_dim=8, dtype="float32")


def test_a_policy_without_a_filter_stays_as_it_is() -> None:
    whole, budgets = policy("snapkv(keep=64)"), Budgets(keep=64)

    assert take_filter(whole, LAYOUT, budgets) == (None, whole, budgets)


@pytest.mark.parametrize(
    ("words", "budgets", "keep", "left", "left_keep"),
    [
        ("gemfilter(keep=64)", Budgets(), 64, ["full"], None),
        ("gemfilter", Budgets(keep=64), 64, ["full"], None),
        ("gemfilter(keep=64)", Budgets(keep=64), 64, ["full"], None),
        ("gemfilter | quest", Budgets(keep=64, read=128), 64, ["quest"], None),
        ("gemfilter(keep=96) | snapkv", Budgets(keep=64), 96, ["snapkv"], 64),
        ("surprisal(keep=96) | snapkv(keep=64) | quest", Budgets(read=128), 96, ["snapkv", "quest"], None),
    ],
)
def test_budgets_go_where_they_belong(
    words: str, budgets: Budgets, keep: int, left: list[str], left_keep: int | None
) -> None:
    bound, rest, others = take_filter(policy(words), LAYOUT, budgets)

    assert bound is not None
    assert bound.keep == keep
    assert bound.layer == (2 if words.startswith("gemfilter") else None)
    assert [part.name for part in rest.parts] == left
    assert (others.keep, others.read) == (left_keep, budgets.read)


@pytest.mark.parametrize(
    ("words", "budgets", "said"),
    [
        ("gemfilter", Budgets(), "gemfilter needs keep, the prompt tokens to run"),
        ("gemfilter | snapkv", Budgets(keep=64), "gemfilter needs keep"),
        ("gemfilter(keep=32)", Budgets(keep=64), "keep=32.* and keep=64 disagree"),
        ("snapkv(keep=64) | gemfilter(keep=96)", Budgets(), r"write it first: gemfilter \| snapkv"),
        ("gemfilter(keep=64, layer=9)", Budgets(), "layer must be from 0 to 3"),
    ],
)
def test_what_cannot_work_is_refused(words: str, budgets: Budgets, said: str) -> None:
    with pytest.raises(CompositionError, match=said):
        take_filter(policy(words), LAYOUT, budgets)


def test_two_filters_are_one_too_many() -> None:
    with pytest.raises(CompositionError, match="one policy per role"):
        policy("gemfilter(keep=8) | surprisal(keep=8)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed(PromptFilterPolicy):
    """Always the same answer."""

    name: ClassVar[str] = "fixed"
    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LAST_QUERY})
    answer: tuple[float, ...]
    keep: int | None = None

    def keep_tokens(self, token_ids: torch.Tensor, votes: torch.Tensor, keep: int) -> torch.Tensor:
        whole = all(float(index).is_integer() for index in self.answer)
        return torch.tensor(self.answer, dtype=torch.int64 if whole else torch.float32)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((), "at least one of 5 prompt tokens"),
        ((0.5, 1.5), "int64"),
        ((-1, 2), "distinct tokens from 0 to 4"),
        ((1, 5), "distinct tokens from 0 to 4"),
        ((2, 1), "ascending"),
        ((1, 1), "distinct"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(answer: tuple[float, ...], said: str) -> None:
    bound = BoundFilter(policy=Fixed(answer=answer), keep=2, layer=0)

    with pytest.raises(PolicyError, match=said):
        bound.plan(torch.arange(5), torch.zeros(5))


def test_votes_must_come_from_somewhere() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Blind(GemFilter):
        name: ClassVar[str] = "blind"
        needs: ClassVar[frozenset[Need]] = frozenset({Need.COLUMN_SUMS})

    with pytest.raises(CompositionError, match="blind needs COLUMN_SUMS; a prompt filter needs one of"):
        take_filter(Blind(keep=4), LAYOUT, Budgets())
