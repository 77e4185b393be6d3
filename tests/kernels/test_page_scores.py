"""Scores of pages: no key of a page beats them, and they are what the formula says."""

from types import ModuleType
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.page_scores import blocked, box_scores, reference
from kvtier.kernels.page_summaries import page_bounds
from kvtier.types import GroupReduce

REDUCTIONS = get_args(GroupReduce)
LIMITS = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 1e-4, torch.bfloat16: 1e-4}
BOTH = pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])

Case = tuple[torch.Tensor, torch.Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Queries [B, Hq, Tq, Dk] and pages of keys [B, Hk, N, P, Dk]."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    queries, pages, slots = draw(st.integers(1, 5)), draw(st.integers(0, 70)), draw(st.integers(1, 5))
    dim, dtype = draw(st.sampled_from([8, 24])), draw(st.sampled_from(list(LIMITS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    q = torch.randn(batch, kv_heads * group, queries, dim, generator=generator, dtype=torch.float64).to(dtype)
    k = torch.randn(batch, kv_heads, pages, slots, dim, generator=generator, dtype=torch.float64).to(dtype)
    return q, k


def dense(q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """The formula in fp64, one KV head at a time."""
    batch, kv_heads, pages, _ = kmin.shape
    group = q.shape[1] // kv_heads
    scores = torch.zeros(batch, kv_heads, pages, dtype=torch.float64)
    for b in range(batch):
        for h in range(kv_heads):
            heads = q[b, h * group : (h + 1) * group].double()
            bounds = heads.relu() @ kmax[b, h].double().T - (-heads).relu() @ kmin[b, h].double().T
            scores[b, h] = getattr(torch, "amax" if group_reduce == "max" else group_reduce)(bounds, 0).amax(0)
    return scores


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=LIMITS[dtype])


@BOTH
@given(cases(), st.sampled_from(REDUCTIONS))
def test_the_formula(implementation: ModuleType, case: Case, group_reduce: GroupReduce) -> None:
    q, k = case
    kmin, kmax = page_bounds(k)
    got = implementation.box_scores(q, kmin, kmax, group_reduce)
    assert_near(got, dense(q, kmin, kmax, group_reduce), q.dtype)


@given(cases())
def test_no_key_of_the_page_beats_the_score(case: Case) -> None:
    q, k = case
    scores = box_scores(q, *page_bounds(k), "max").double()
    grouped = q.double().unflatten(1, (k.shape[1], -1))
    best = torch.einsum("bhgtd,bhnpd->bhngtp", grouped, k.double()).flatten(3).amax(-1)
    assert (scores >= best - LIMITS[q.dtype]).all()


@given(cases())
def test_a_page_of_one_key_has_its_score(case: Case) -> None:
    q, k = case
    k = k[:, :, :, :1]
    exact = torch.einsum("bhgtd,bhnpd->bhngtp", q.double().unflatten(1, (k.shape[1], -1)), k.double())
    assert_near(box_scores(q, *page_bounds(k), "max"), exact.flatten(3).amax(-1), q.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_pages_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "CACHE_BYTES", 1)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1, 16, generator=generator).to(dtype)
    kmin, kmax = page_bounds(torch.randn(2, 3, 200, 4, 16, generator=generator).to(dtype))
    kmin, kmax = kmin[:, :2], kmax[:, :2]
    assert_near(box_scores(q, kmin, kmax, "sum"), dense(q, kmin, kmax, "sum"), dtype)


@pytest.mark.parametrize(
    ("q_shape", "kmin_shape", "kmax_shape"),
    [
        ((4, 1, 8), (1, 2, 5, 8), (1, 2, 5, 8)),
        ((1, 4, 0, 8), (1, 2, 5, 8), (1, 2, 5, 8)),
        ((1, 3, 1, 8), (1, 2, 5, 8), (1, 2, 5, 8)),
        ((1, 4, 1, 9), (1, 2, 5, 8), (1, 2, 5, 8)),
        ((2, 4, 1, 8), (1, 2, 5, 8), (1, 2, 5, 8)),
        ((1, 4, 1, 8), (1, 2, 5, 8), (1, 2, 6, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    q_shape: tuple[int, ...], kmin_shape: tuple[int, ...], kmax_shape: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match=r"box_scores needs q \[B, Hq, Tq, Dk\].* got \["):
        box_scores(torch.zeros(q_shape), torch.zeros(kmin_shape), torch.zeros(kmax_shape), "max")


def test_an_unknown_reduction_is_refused() -> None:
    bounds = torch.zeros(1, 2, 5, 8)
    with pytest.raises(InputError, match="must be one of mean, max, sum, got 'median'"):
        box_scores(torch.zeros(1, 4, 1, 8), bounds, bounds, "median")  # type: ignore[arg-type]
