"""Landmarks, bit planes and their scores in Triton, against their references in fp64; unread memory is NaN."""

from typing import get_args

import pytest
import torch

from kvtier.kernels import page_scores, page_summaries
from kvtier.kernels.page_scores import triton as scores_kernel
from kvtier.kernels.page_summaries import triton as summaries_kernel
from kvtier.types import GroupReduce

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter cuts fp32 to bf16 where a device rounds: one unit in the last place instead of a half.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
LIMIT = 1e-4


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 7, 24), (5, 16, 128), (0, 4, 8)], ids=str)
def test_landmarks(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    k = normal(*shape, dtype=dtype, device=device)
    got, expected = summaries_kernel.page_landmarks(k), page_summaries.reference.page_landmarks(k)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected.float(), rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 7, 27), (5, 16, 128), (0, 4, 8)], ids=str)
def test_planes(dtype: torch.dtype, bits: int, shape: tuple[int, ...], device: torch.device) -> None:
    wide = torch.full((*shape[:-1], shape[-1] + 5), torch.nan, dtype=dtype, device=device)
    wide[..., :-5] = normal(*shape, dtype=dtype, device=device)
    wide[..., 3] = 0.5
    k = wide[..., :-5]
    kmin, kmax = page_summaries.reference.page_bounds(k)
    got = summaries_kernel.page_planes(k, kmin, kmax, bits)
    span = (kmax.double() - kmin.double()).unsqueeze(-2)
    place = ((k.double() - kmin.double().unsqueeze(-2)) / span * 2**bits).nan_to_num(0.5)
    # What lies on an edge, within fp32, may be counted to either side.
    clear = ((place - place.round()).abs() > 1e-4).cpu()
    expected = page_summaries.reference.page_planes(k, kmin, kmax, bits)
    codes, expected = codes_of(got.cpu(), shape[-1]), codes_of(expected.cpu(), shape[-1])
    assert codes[clear].equal(expected[clear])
    assert ((codes - expected).abs() <= 1).all()


def codes_of(planes: torch.Tensor, dim: int) -> torch.Tensor:
    """Codes [..., P, D] of planes [..., b, P, W]."""
    bits = torch.stack([(planes >> (7 - place)) & 1 for place in range(8)], dim=-1).flatten(-2)[..., :dim].long()
    return sum(plane * 2 ** (planes.shape[-3] - 1 - index) for index, plane in enumerate(bits.unbind(-3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("group_reduce", "group", "queries", "pages", "slots", "read"),
    [("max", 1, 1, 1, 1, 1), ("mean", 4, 2, 17, 5, 2), ("sum", 3, 2, 0, 4, 2), ("max", 2, 1, 9, 16, 0)],
)
def test_plane_scores(
    dtype: torch.dtype,
    group_reduce: GroupReduce,
    group: int,
    queries: int,
    pages: int,
    slots: int,
    read: int,
    device: torch.device,
) -> None:
    q = normal(2, 2 * group, queries, 27, dtype=dtype, device=device)
    k = normal(2, 2, pages, slots, 27, dtype=dtype, device=device, seed=1)
    kmin, kmax = page_summaries.reference.page_bounds(k)
    planes = page_summaries.reference.page_planes(k, kmin, kmax, 4)[:, :, :, :read]
    got = scores_kernel.plane_scores(q, planes, kmin, kmax, group_reduce)
    expected = page_scores.reference.plane_scores(q.double(), planes, kmin.double(), kmax.double(), group_reduce)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=LIMIT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_reduce", get_args(GroupReduce))
@pytest.mark.parametrize(("group", "queries", "pages"), [(1, 1, 1), (4, 3, 131), (3, 2, 0)])
def test_landmark_scores(
    dtype: torch.dtype, group_reduce: GroupReduce, group: int, queries: int, pages: int, device: torch.device
) -> None:
    q = normal(2, 2 * group, queries, 24, dtype=dtype, device=device)
    wide = torch.full((2, 3, pages, 30), torch.nan, dtype=dtype, device=device)
    marks = wide[:, :2, :, :24]
    marks.copy_(normal(2, 2, pages, 24, dtype=dtype, device=device, seed=1))
    got = scores_kernel.landmark_scores(q, marks, group_reduce)
    expected = page_scores.reference.landmark_scores(q.double(), marks.double(), group_reduce)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=LIMIT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_centroid_scores(dtype: torch.dtype, device: torch.device) -> None:
    q, centroids = (
        normal(1, 4, 1, 24, dtype=dtype, device=device),
        normal(1, 2, 9, 24, dtype=dtype, device=device, seed=1),
    )
    clusters = torch.randint(0, 9, (1, 2, 13, 5), generator=torch.Generator().manual_seed(0)).to(device)
    got = scores_kernel.centroid_scores(q, centroids, clusters, "max")
    expected = page_scores.reference.centroid_scores(q.double(), centroids.double(), clusters, "max")
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=LIMIT)


def test_fp64_goes_to_torch(device: torch.device) -> None:
    q, k = (
        torch.ones(1, 2, 1, 8, dtype=torch.float64, device=device),
        torch.ones(1, 2, 3, 4, 8, dtype=torch.float64, device=device),
    )
    kmin, kmax = summaries_kernel.page_bounds(k)
    planes = summaries_kernel.page_planes(k, kmin, kmax, 2)
    assert scores_kernel.plane_scores(q, planes, kmin, kmax, "max").dtype == torch.float64
    assert scores_kernel.landmark_scores(q, summaries_kernel.page_landmarks(k), "max").dtype == torch.float64
