"""Kernels at the shapes of real models, on the GPU: exactness per type, splits, and addresses beyond 2^31 elements."""

from typing import Any

import pytest
import torch

from kvtier.kernels import column_sums, page_scores, page_summaries
from kvtier.kernels.column_sums import triton as sums_kernel
from kvtier.kernels.gather_attention import triton as kernel
from kvtier.kernels.merge_partials import merge_partials
from kvtier.kernels.page_scores import triton as scores_kernel
from kvtier.kernels.page_summaries import triton as bounds_kernel
from kvtier.testing.attention_problems import Problem, assert_near
from kvtier.types import Visibility

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CUDA = torch.device("cuda")
SCALE = 128**-0.5


def options_of(problem: Problem) -> dict[str, Any]:
    return {"scale": SCALE, "softcap": problem.softcap, "visible": problem.visible(), "extras": problem.extras()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": "kv", "uneven": True, "drafts": 64}, {"softcap": 30.0, "ragged": True}, {"unified_max": 4.0}],
    ids=["plain", "bias, ragged heads, tree", "softcap, positions", "unified"],
)
@pytest.mark.parametrize("queries", [1, 5])
def test_pages_of_a_long_context(dtype: torch.dtype, options: dict[str, Any], queries: int) -> None:
    problem = Problem(sizes=(2, 8, 4, queries, 512, 16), dims=(128, 128), dtype=dtype, device=CUDA, **options)
    assert_near(kernel.attend_pages(*problem.tensors(), **options_of(problem)), problem.expected(SCALE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (192, 128), (256, 256)], ids=str)
def test_head_dimensions(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    problem = Problem(sizes=(1, 2, 7, 1, 130, 16), dims=dims, dtype=dtype, device=CUDA)
    assert_near(kernel.attend_pages(*problem.tensors(), **options_of(problem)), problem.expected(SCALE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 500])
def test_a_chunk_of_a_prompt(dtype: torch.dtype, window: int | None) -> None:
    problem = Problem(sizes=(1, 4, 4, 700, 130, 16), dims=(128, 128), dtype=dtype, device=CUDA)
    q, k_arena, v_arena, frames = problem.tensors()
    k, v = (arena[frames].flatten(2, 3) for arena in (k_arena, v_arena))
    keys = k.shape[2]
    visible = Visibility(
        torch.arange(keys - 700, keys, device=CUDA)[None], torch.arange(keys, device=CUDA)[None, None], window
    )
    got = kernel.attend_run(q, k, v, scale=SCALE, softcap=None, visible=visible)
    exact = kernel.blocked.attend_run(q.double(), k.double(), v.double(), scale=SCALE, softcap=None, visible=visible)
    torch.testing.assert_close(got.out.double(), exact.out, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.lse.double(), exact.lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_merge_to_the_whole(dtype: torch.dtype) -> None:
    problem = Problem(sizes=(1, 8, 4, 1, 256, 16), dims=(128, 128), dtype=dtype, device=CUDA)
    q, k_arena, v_arena, frames = problem.tensors()
    parts = [
        kernel.attend_pages(q, k_arena, v_arena, half, scale=SCALE, softcap=None, visible=None)
        for half in frames.split([100, 156], dim=2)
    ]
    assert_near(merge_partials(parts), problem.expected(SCALE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summaries_scores_and_sums(dtype: torch.dtype) -> None:
    generator = torch.Generator(CUDA).manual_seed(0)
    q = torch.randn(1, 32, 1, 128, generator=generator, device=CUDA).to(dtype)
    k = torch.randn(1, 8, 300, 16, 128, generator=generator, device=CUDA).to(dtype)
    low, high = bounds_kernel.page_bounds(k)
    exact_low, exact_high = page_summaries.reference.page_bounds(k)
    assert low.equal(exact_low)
    assert high.equal(exact_high)
    scores = scores_kernel.box_scores(q, low, high, "max")
    exact = page_scores.reference.box_scores(q.double(), low.double(), high.double(), "max")
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-4)
    run, options = k.flatten(2, 3), {"scale": SCALE, "softcap": None, "visible": None}
    lse = kernel.attend_run(q, run, run, **options).lse  # type: ignore[arg-type]
    sums = sums_kernel.column_sums(q, lse, run, **options)  # type: ignore[arg-type]
    exact = column_sums.reference.column_sums(q.double(), lse.double(), run.double(), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(sums.double(), exact, rtol=1e-4, atol=1e-6)


def test_frames_beyond_two_to_the_31_elements() -> None:
    slots, dim = 16, 128
    count = 2**31 // (slots * dim) + 8
    if torch.cuda.mem_get_info()[0] < 3 * count * slots * dim:
        pytest.skip("needs 6 GB of free GPU memory")
    arena = torch.empty(count, slots, dim, dtype=torch.float16, device=CUDA)
    arena[-8:] = torch.randn(8, slots, dim, device=CUDA)
    q = torch.randn(1, 4, 1, dim, device=CUDA).half()
    far = torch.arange(count - 8, count, device=CUDA).view(1, 2, 4)
    got = kernel.attend_pages(q, arena, arena, far, scale=SCALE, softcap=None, visible=None)
    near = arena[-8:].clone()
    expected = kernel.attend_pages(q, near, near, far - (count - 8), scale=SCALE, softcap=None, visible=None)
    assert got.out.equal(expected.out)
