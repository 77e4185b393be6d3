"""Landmarks are means of pages, and pages are scored by them, or by the centroids of the clusters they belong to."""

from types import ModuleType
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels import page_scores, page_summaries
from kvtier.kernels.page_scores import centroid_scores, landmark_scores
from kvtier.kernels.page_summaries import page_landmarks
from kvtier.types import GroupReduce

REDUCTIONS = get_args(GroupReduce)
LIMITS = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 1e-4, torch.bfloat16: 1e-4}
ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SUMMARIES = pytest.mark.parametrize(
    "implementation", [page_summaries.blocked, page_summaries.reference], ids=["blocked", "reference"]
)
SCORES = pytest.mark.parametrize(
    "implementation", [page_scores.blocked, page_scores.reference], ids=["blocked", "reference"]
)

Case = tuple[torch.Tensor, torch.Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Queries [B, Hq, Tq, Dk] and landmarks [B, Hk, N, Dk]."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    queries, pages = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    dim, dtype = draw(st.sampled_from([8, 27])), draw(st.sampled_from(list(LIMITS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    q = torch.randn(batch, kv_heads * group, queries, dim, generator=generator, dtype=torch.float64).to(dtype)
    marks = torch.randn(batch, kv_heads, pages, dim, generator=generator, dtype=torch.float64).to(dtype)
    return q, marks


def dense(q: torch.Tensor, marks: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Products in fp64, one KV head at a time."""
    batch, kv_heads, pages, _ = marks.shape
    group = q.shape[1] // kv_heads
    scores = torch.zeros(batch, kv_heads, pages, dtype=torch.float64)
    for b in range(batch):
        for h in range(kv_heads):
            products = q[b, h * group : (h + 1) * group].double() @ marks[b, h].double().T
            scores[b, h] = getattr(torch, "amax" if group_reduce == "max" else group_reduce)(products, 0).amax(0)
    return scores


@SUMMARIES
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (2, 3, 7, 5), (0, 2, 3), (16, 1, 8)], ids=str)
def test_a_landmark_is_the_mean(implementation: ModuleType, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    k = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    marks = implementation.page_landmarks(k)
    assert marks.dtype == dtype
    torch.testing.assert_close(marks.double(), k.double().mean(-2), rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@SCORES
@given(cases(), st.sampled_from(REDUCTIONS))
def test_scores_are_products(implementation: ModuleType, case: Case, group_reduce: GroupReduce) -> None:
    q, marks = case
    got = implementation.landmark_scores(q, marks, group_reduce)
    assert got.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), dense(q, marks, group_reduce), rtol=0, atol=LIMITS[q.dtype])


@SCORES
@given(cases(), st.sampled_from(REDUCTIONS), st.data())
def test_a_page_has_the_score_of_its_best_cluster(
    implementation: ModuleType, case: Case, group_reduce: GroupReduce, data: st.DataObject
) -> None:
    q, centroids = case
    used, pages, slots = data.draw(st.integers(1, centroids.shape[2])), data.draw(st.integers(1, 9)), 3
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    clusters = torch.randint(0, used, (*centroids.shape[:2], pages, slots), generator=generator)
    scores = dense(q, centroids, group_reduce)
    # Centroids of empty clusters may hold anything.
    centroids = centroids.clone()
    centroids[:, :, used:] = torch.nan
    got = implementation.centroid_scores(q, centroids, clusters, group_reduce)
    for place in torch.cartesian_prod(*(torch.arange(count) for count in got.shape)).tolist():
        b, h, n = place
        best = max(float(scores[b, h, cluster]) for cluster in clusters[b, h, n].tolist())
        assert abs(float(got[b, h, n]) - best) <= LIMITS[q.dtype]


def test_the_landmark_of_one_key_gives_its_logit() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 1, 8, generator=generator), torch.randn(1, 2, 5, 1, 8, generator=generator)
    expected = torch.einsum("bhtd,bhnpd->bhn", q.double(), k.double())
    torch.testing.assert_close(landmark_scores(q, page_landmarks(k), "max").double(), expected, rtol=0, atol=1e-5)


def test_views_that_do_not_fold_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_scores.blocked, "CACHE_BYTES", 1)
    generator = torch.Generator().manual_seed(0)
    q, marks = torch.randn(2, 4, 1, 16, generator=generator), torch.randn(2, 3, 50, 16, generator=generator)[:, :2]
    got = landmark_scores(q, marks, "sum")
    torch.testing.assert_close(got.double(), dense(q, marks, "sum"), rtol=0, atol=1e-4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, marks = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(InputError, match=r"landmark_scores needs q \[B, Hq, Tq, Dk\].* got \["):
        landmark_scores(q, marks[..., :7], "max")
    with pytest.raises(InputError, match=r"centroid_scores needs q \[B, Hq, Tq, Dk\].* got \["):
        centroid_scores(q, marks, torch.zeros(1, 2, 5, 0, dtype=torch.int64), "max")
    with pytest.raises(InputError, match=r"clusters \[B, Hk, N, P\] of int64, .* torch\.int32"):
        centroid_scores(q, marks, torch.zeros(1, 2, 5, 3, dtype=torch.int32), "max")
    with pytest.raises(InputError, match=r"page_landmarks needs keys \[\.\.\., P, D\] with at least one slot"):
        page_landmarks(torch.zeros(3, 0, 4))
