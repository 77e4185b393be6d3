"""Quest: the laws of retrieval, and its scores as bounds of every logit in a page."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.policy import RetrievalPolicy
from kvtier.errors import PolicyError
from kvtier.policies.retrieval.quest import Quest
from kvtier.testing.dense import box_bound, quest_pages, reduce_heads
from kvtier.testing.retrieval_laws import RetrievalCase, RetrievalLaws, retrieval_cases
from kvtier.types import GroupReduce

ROUNDING = 1e-9  # of bounds up to 8 * 8 * 64 * 8, summed in fp64 in another order


@pytest.mark.parametrize("how", ["mean", "max", "sum"])
class TestQuest(RetrievalLaws):
    @pytest.fixture
    def policy(self, how: GroupReduce) -> RetrievalPolicy:
        return Quest(group_reduce=how)


@given(retrieval_cases(dtypes=[torch.float64]))
def test_the_score_bounds_every_logit_of_every_query_head(case: RetrievalCase) -> None:
    group = case.query.shape[1] // case.keys.shape[1]
    query = case.query.unflatten(1, (-1, group))

    logits = torch.einsum("bhgtd,bhnpd->bhgtnp", query, case.keys)

    assert (case.rank(Quest(group_reduce="max")) >= logits.amax((2, 3, 5)) - ROUNDING).all()


@given(retrieval_cases(dtypes=[torch.float64]))
def test_the_score_of_a_page_of_one_token_is_its_logit(case: RetrievalCase) -> None:
    single = RetrievalCase(case.query[:, :: case.query.shape[1] // case.keys.shape[1], :1], case.keys[:, :, :, :1])

    logits = torch.einsum("bhtd,bhnpd->bhnt", single.query, single.keys)[..., 0]

    torch.testing.assert_close(single.rank(Quest()), logits, rtol=0, atol=ROUNDING)


@given(retrieval_cases(dtypes=[torch.float64]), st.sampled_from(["mean", "max", "sum"]))
def test_scores_are_the_better_corners_reduced_over_the_group(case: RetrievalCase, how: GroupReduce) -> None:
    group = case.query.shape[1] // case.keys.shape[1]
    scores = case.rank(Quest(group_reduce=how))

    for row, (query, keys) in enumerate(zip(case.query, case.keys, strict=True)):
        low, high = (part.repeat_interleave(group, 0)[:, None] for part in (keys.amin(2), keys.amax(2)))
        bounds = reduce_heads(box_bound(query[:, :, None], low, high), keys.shape[0], how).amax(1)
        torch.testing.assert_close(scores[row], bounds, rtol=0, atol=ROUNDING)


@given(retrieval_cases(dtypes=[torch.float64]), st.integers(1, 12))
def test_the_chosen_pages_are_those_of_the_paper_written_out(case: RetrievalCase, count: int) -> None:
    policy = Quest()
    scores = case.rank(policy)
    chosen = policy.choose(scores, count).pages

    for row, (query, keys) in enumerate(zip(case.query, case.keys, strict=True)):
        paper = torch.tensor(quest_pages(query, keys, count=count, how="max"))
        # Pages may tie: their scores are compared.
        mine, theirs = (scores[row].gather(-1, pages).sort(-1).values for pages in (chosen[row], paper))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=ROUNDING)


@given(retrieval_cases(dtypes=[torch.float64]))
def test_reductions_of_a_group_of_one_agree(case: RetrievalCase) -> None:
    single = RetrievalCase(case.query[:, : case.keys.shape[1]], case.keys)
    scores = [single.rank(Quest(group_reduce=how)) for how in ("mean", "max", "sum")]

    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def test_max_reads_the_page_that_one_head_needs_and_mean_misses() -> None:
    keys = torch.tensor([[[1.0, 0.0]], [[0.0, 0.8]]], dtype=torch.float64)[None, None]
    query = torch.tensor([[10.0, 0.0], [-9.0, 7.0]], dtype=torch.float64)[None, :, None]
    case = RetrievalCase(query, keys)

    assert Quest(group_reduce="max").choose(case.rank(Quest(group_reduce="max")), 1).pages.item() == 0
    assert Quest(group_reduce="mean").choose(case.rank(Quest(group_reduce="mean")), 1).pages.item() == 1


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"read": 0}, "read must be an integer of at least 1 token, got 0"),
        ({"read": 12.5}, r"read must be an integer of at least 1 token, got 12\.5"),
        ({"read": True}, "read must be an integer of at least 1 token, got True"),
        ({"dense_layers": -1}, "dense_layers must be an integer of at least 0, got -1"),
        ({"dense_layers": "2"}, "dense_layers must be an integer of at least 0, got '2'"),
        ({"group_reduce": None}, "group_reduce must be 'mean', 'max' or 'sum', got None"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=f"quest: {message}"):
        Quest(**parameters)  # type: ignore[arg-type]
