"""Bit planes of pages: the codes are nested cells, and what is scored from any number of planes bounds every logit."""

from types import ModuleType
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels import page_scores, page_summaries
from kvtier.kernels.page_scores import box_scores, plane_scores
from kvtier.kernels.page_summaries import page_bounds, page_planes
from kvtier.types import GroupReduce

REDUCTIONS = get_args(GroupReduce)
LIMITS = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 1e-4, torch.bfloat16: 1e-4}
SUMMARIES = pytest.mark.parametrize(
    "implementation", [page_summaries.blocked, page_summaries.reference], ids=["blocked", "reference"]
)
SCORES = pytest.mark.parametrize(
    "implementation", [page_scores.blocked, page_scores.reference], ids=["blocked", "reference"]
)

Case = tuple[torch.Tensor, torch.Tensor, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Queries [B, Hq, Tq, Dk], pages of keys [B, Hk, N, P, Dk], some channels constant, and planes."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    queries, pages, slots = draw(st.integers(1, 3)), draw(st.integers(0, 20)), draw(st.integers(1, 5))
    dim, dtype = draw(st.sampled_from([4, 8, 27])), draw(st.sampled_from(list(LIMITS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    q = torch.randn(batch, kv_heads * group, queries, dim, generator=generator, dtype=torch.float64).to(dtype)
    k = torch.randn(batch, kv_heads, pages, slots, dim, generator=generator, dtype=torch.float64).to(dtype)
    k[..., :: draw(st.integers(2, 9))] = 1.5
    return q, k, draw(st.integers(1, 8))


def cells(k: torch.Tensor, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper edges [B, Hk, N, P, Dk] of the cells that the planes name, in fp64, unpacked by numpy."""
    kmin, kmax = (bound.double().unsqueeze(-2) for bound in page_bounds(k))
    bits = np.unpackbits(planes.numpy(), axis=-1)[..., : k.shape[-1]].astype(np.int64)
    weights = 2 ** np.arange(planes.shape[-3])[::-1]
    codes = torch.from_numpy(np.einsum("...bpd,b->...pd", bits, weights))
    width = (kmax - kmin) / 2 ** planes.shape[-3]
    return kmin + codes * width, kmin + (codes + 1) * width


@SUMMARIES
@given(cases())
def test_every_key_lies_in_its_cell(implementation: ModuleType, case: Case) -> None:
    _, k, bits = case
    planes = implementation.page_planes(k, *page_bounds(k), bits)
    assert planes.dtype == torch.uint8
    assert planes.shape == (*k.shape[:3], bits, k.shape[3], -(-k.shape[4] // 8))
    low, high = cells(k, planes)
    slack = 1e-6 * (1 + k.double().abs())
    assert ((low - slack <= k.double()) & (k.double() <= high + slack)).all()


@SUMMARIES
@given(cases())
def test_the_first_planes_are_a_coarser_code(implementation: ModuleType, case: Case) -> None:
    _, k, bits = case
    k = k.double()
    planes = implementation.page_planes(k, *page_bounds(k), bits)
    for fewer in range(1, bits):
        assert implementation.page_planes(k, *page_bounds(k), fewer).equal(planes[:, :, :, :fewer])


@SUMMARIES
@given(cases())
def test_spare_bits_and_constant_channels_are_zero(implementation: ModuleType, case: Case) -> None:
    _, k, bits = case
    planes = implementation.page_planes(k, *page_bounds(k), bits)
    codes = np.unpackbits(planes.numpy(), axis=-1)
    kmin, kmax = page_bounds(k)
    constant = (kmin == kmax).numpy()[:, :, :, None, None, :]
    assert not codes[..., k.shape[-1] :].any()
    assert not (codes[..., : k.shape[-1]] & constant).any()


@SCORES
@given(cases(), st.sampled_from(REDUCTIONS), st.data())
def test_the_formula(implementation: ModuleType, case: Case, group_reduce: GroupReduce, data: st.DataObject) -> None:
    q, k, bits = case
    kmin, kmax = page_bounds(k)
    planes = page_planes(k, kmin, kmax, bits=bits)[:, :, :, : data.draw(st.integers(0, bits), label="planes read")]
    got = implementation.plane_scores(q, planes, kmin, kmax, group_reduce)

    low, high = cells(k, planes)
    heads = q.double().unflatten(1, (k.shape[1], -1))
    bounds = torch.einsum("bhgtd,bhnpd->bhgtnp", heads, (low + high) / 2)
    bounds += torch.einsum("bhgtd,bhnpd->bhgtnp", heads.abs(), (high - low) / 2)
    best = getattr(torch, "amax" if group_reduce == "max" else group_reduce)(bounds.amax(-1), 2).amax(2)
    assert got.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), best, rtol=0, atol=LIMITS[q.dtype])


@SCORES
@given(cases())
def test_no_key_beats_the_bound_and_no_plane_raises_it(implementation: ModuleType, case: Case) -> None:
    q, k, bits = case
    kmin, kmax = page_bounds(k)
    planes = page_planes(k, kmin, kmax, bits=bits)
    heads = q.double().unflatten(1, (k.shape[1], -1))
    best = torch.einsum("bhgtd,bhnpd->bhngtp", heads, k.double()).flatten(3).amax(-1)
    before = box_scores(q, kmin, kmax, "max")
    for read in range(bits + 1):
        bound = implementation.plane_scores(q, planes[:, :, :, :read], kmin, kmax, "max")
        assert (bound <= before + LIMITS[q.dtype]).all()
        assert (bound.double() >= best - LIMITS[q.dtype]).all()
        before = bound


@given(cases())
def test_the_bound_is_within_one_step_of_the_best_key(case: Case) -> None:
    q, k, bits = case
    kmin, kmax = page_bounds(k)
    bound = plane_scores(q, page_planes(k, kmin, kmax, bits=bits), kmin, kmax, "max").double()
    heads = q.double().unflatten(1, (k.shape[1], -1))
    best = torch.einsum("bhgtd,bhnpd->bhngtp", heads, k.double()).amax(-1)
    step = torch.einsum("bhgtd,bhnd->bhngt", heads.abs(), (kmax.double() - kmin.double()) / 2**bits)
    assert (bound <= (best + step).flatten(3).amax(-1) + LIMITS[q.dtype]).all()


@given(cases())
def test_without_planes_it_is_the_box(case: Case) -> None:
    q, k, _ = case
    kmin, kmax = page_bounds(k)
    none = torch.zeros(*k.shape[:3], 0, k.shape[3], -(-k.shape[4] // 8), dtype=torch.uint8)
    got = plane_scores(q, none, kmin, kmax, "mean")
    torch.testing.assert_close(got, box_scores(q, kmin, kmax, "mean"), rtol=0, atol=LIMITS[q.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_pages_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_scores.blocked, "CACHE_BYTES", 1)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1, 16, generator=generator).to(dtype)
    # Heads of a wider tensor cannot be folded into the batch without a copy.
    k = torch.randn(2, 3, 50, 4, 16, generator=generator).to(dtype)
    kmin, kmax = page_bounds(k)
    planes = page_planes(k, kmin, kmax, bits=2)
    views = planes[:, :2], kmin[:, :2], kmax[:, :2]
    expected = page_scores.reference.plane_scores(q.double(), *(view.contiguous() for view in views), "sum")
    torch.testing.assert_close(plane_scores(q, *views, "sum"), expected, rtol=0, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize(
    ("planes_shape", "dtype"),
    [
        ((1, 2, 5, 9, 3, 1), torch.uint8),
        ((1, 2, 5, 2, 0, 1), torch.uint8),
        ((1, 2, 5, 2, 3, 2), torch.uint8),
        ((1, 2, 4, 2, 3, 1), torch.uint8),
        ((1, 2, 5, 3, 1), torch.uint8),
        ((1, 2, 5, 2, 3, 1), torch.int64),
    ],
)
def test_planes_that_do_not_fit_are_refused(planes_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    bounds = torch.zeros(1, 2, 5, 8)
    with pytest.raises(InputError, match=r"plane_scores needs q \[B, Hq, Tq, Dk\].* got \["):
        plane_scores(torch.zeros(1, 4, 1, 8), torch.zeros(planes_shape, dtype=dtype), bounds, bounds, "max")


@pytest.mark.parametrize("bits", [0, 9])
def test_planes_out_of_range_are_refused(bits: int) -> None:
    k = torch.zeros(3, 4, 8)
    with pytest.raises(InputError, match=rf"bits from 1 to 8, got {bits}"):
        page_planes(k, *page_bounds(k), bits=bits)


def test_bounds_of_other_pages_are_refused() -> None:
    k = torch.zeros(3, 4, 8)
    with pytest.raises(InputError, match=r"page_planes needs keys \[\.\.\., P, D\] with bounds"):
        page_planes(k, torch.zeros(2, 8), torch.zeros(2, 8), bits=2)
