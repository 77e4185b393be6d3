"""Merge, column sums, page bounds, page scores and packed pages in Triton, against their references in fp64."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels import column_sums, merge_partials, pack_pages, page_scores, page_summaries
from kvtier.kernels.column_sums import triton as sums_kernel
from kvtier.kernels.gather_attention import reference as attention
from kvtier.kernels.merge_partials import triton as merge_kernel
from kvtier.kernels.pack_pages import triton as pages_kernel
from kvtier.kernels.page_scores import triton as scores_kernel
from kvtier.kernels.page_summaries import triton as bounds_kernel
from kvtier.kernels.tiles import DEBUG_VARIABLE
from kvtier.testing.attention_problems import Problem
from kvtier.types import GroupReduce, Partial

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@settings(max_examples=12)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**20))
def test_merge(device: torch.device, count: int, queries: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(count):
        lse = torch.randn(2, 3, queries, generator=generator) * 30
        lse[torch.rand(lse.shape, generator=generator) < 0.4] = float("-inf")
        out = torch.randn(2, 3, queries, dim, generator=generator).masked_fill(lse.isneginf().unsqueeze(-1), 0.0)
        parts.append(Partial(out, lse))
    expected = merge_partials.reference.merge_partials([Partial(p.out.double(), p.lse.double()) for p in parts])
    got = merge_kernel.merge_partials([Partial(p.out.to(device), p.lse.to(device)) for p in parts])
    torch.testing.assert_close(got.out.cpu().double(), expected.out, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.lse.cpu().double(), expected.lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_column_sums(dtype: torch.dtype, window: int | None, softcap: float | None, device: torch.device) -> None:
    problem = Problem(
        sizes=(2, 2, 2, 19, 10, 7),
        dims=(24, 8),
        dtype=dtype,
        device=device,
        ragged=True,
        window=window,
        softcap=softcap,
    )
    q, k_arena, _, frames = problem.tensors()
    k, seen = k_arena[frames].flatten(2, 3), problem.visible()
    options = {"scale": 0.3, "softcap": softcap, "visible": seen}
    lse = attention.attend_run(q.double(), k.double(), k.double(), **options).lse  # type: ignore[arg-type]
    expected = column_sums.reference.column_sums(q.double(), lse, k.double(), **options)  # type: ignore[arg-type]
    got = sums_kernel.column_sums(q, lse.float(), k, **options)  # type: ignore[arg-type]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (3, 0)])
def test_nothing_to_sum(queries: int, keys: int, device: torch.device) -> None:
    q, k = torch.zeros(1, 4, queries, 8, device=device), torch.zeros(1, 2, keys, 8, device=device)
    lse = torch.zeros(1, 4, queries, device=device)
    assert not sums_kernel.column_sums(q, lse, k, scale=1.0, softcap=None, visible=None).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 11, 7, 24), (5, 16, 128), (0, 4, 8)], ids=str)
def test_page_bounds_are_exact(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    k = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    low, high = bounds_kernel.page_bounds(k)
    expected = page_summaries.reference.page_bounds(k)
    assert low.equal(expected[0])
    assert high.equal(expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_reduce", get_args(GroupReduce))
@pytest.mark.parametrize(("group", "queries", "pages"), [(1, 1, 1), (4, 3, 131), (3, 2, 0)])
def test_box_scores(
    dtype: torch.dtype, group_reduce: GroupReduce, group: int, queries: int, pages: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2 * group, queries, 24, generator=generator).to(dtype).to(device)
    bounds = torch.randn(2, 2, 2, pages, 24, generator=generator).sort(0).values.to(dtype).to(device)
    got = scores_kernel.box_scores(q, bounds[0], bounds[1], group_reduce)
    expected = page_scores.reference.box_scores(q.double(), bounds[0].double(), bounds[1].double(), group_reduce)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("slots", "dims"), [(16, (128, 128)), (7, (5, 3)), (1, (1, 1))], ids=str)
def test_pages_are_packed_and_unpacked(
    dtype: torch.dtype, slots: int, dims: tuple[int, int], device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(6, slots, dim, generator=generator).to(dtype).to(device) for dim in dims)
    keys[2], values[2] = torch.nan, torch.nan
    frames = torch.tensor([5, 0, 1, 3])
    rows = torch.empty(4, slots * sum(dims), dtype=dtype, device=device)
    pages_kernel.pack_pages(keys, values, frames, rows)
    expected = torch.empty_like(rows)
    pack_pages.reference.pack_pages(keys, values, frames, expected)
    assert rows.equal(expected)
    filled = [torch.full_like(arena, 7) for arena in (keys, values)]
    pages_kernel.unpack_pages(rows, filled[0], filled[1], frames)
    for arena, got in zip((keys, values), filled, strict=True):
        assert got[frames].equal(arena[frames])
        assert bool((got[[2, 4]] == 7).all())


@pytest.mark.parametrize("wrong", [-1, 6])
def test_debug_mode_names_pages_out_of_range(wrong: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    keys, values = (torch.zeros(6, 2, 4, device=device) for _ in range(2))
    with pytest.raises(InputError, match=r"frames must lie in \[0, 6\)"):
        pages_kernel.pack_pages(keys, values, torch.tensor([0, wrong]), torch.empty(2, 16, device=device))
