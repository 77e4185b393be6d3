"""Keys from low-rank factors in Triton, against the reference in fp64; rows and tables that are not named are NaN."""

import pytest
import torch

from kvtier.errors import InputError
from kvtier.kernels.lowrank_keys import Rotation, reference
from kvtier.kernels.lowrank_keys import triton as kernel
from kvtier.kernels.tiles import DEBUG_VARIABLE
from kvtier.testing.lowrank_problems import LowRankProblem

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LIMIT = 1e-5
# The interpreter cuts fp32 to bf16 where a device rounds: one unit in the last place instead of a half.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def expected(problem: LowRankProblem) -> torch.Tensor:
    u, sv, positions, pages, (cos, sin) = problem.arguments()
    tables = Rotation(cos.double(), sin.double())
    return reference.lowrank_keys(u.double(), sv.double(), positions, pages, tables, page_tokens=problem.sizes[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "rank", "dim", "turned"),
    [
        ((1, 1, 1, 1), 1, 2, 2),
        ((2, 3, 5, 7), 9, 24, 24),
        ((1, 2, 9, 8), 70, 40, 16),
        ((1, 1, 70, 1), 160, 128, 128),
        ((2, 1, 3, 4), 5, 14, 0),
    ],
    ids=str,
)
def test_keys(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], rank: int, dim: int, turned: int, device: torch.device
) -> None:
    problem = LowRankProblem(sizes=sizes, rank=rank, dim=dim, turned=turned, dtype=dtype, device=device)
    got = kernel.lowrank_keys(*problem.arguments(), page_tokens=sizes[3])
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected(problem), rtol=ROUNDING[dtype], atol=LIMIT)


def test_factors_of_different_types_and_strided_views(device: torch.device) -> None:
    problem = LowRankProblem(sizes=(2, 2, 3, 4), rank=6, dim=16, turned=16, dtype=torch.bfloat16, device=device)
    u, sv, positions, pages, rotation = problem.arguments()
    poisoned = torch.full((*u.shape[:2], 11), torch.nan, dtype=torch.float32, device=device)
    poisoned[..., :6] = u
    doubled = Rotation(*(table.repeat(1, 2)[:, :8] for table in rotation))
    got = kernel.lowrank_keys(poisoned[..., :6], sv.mT.contiguous().mT, positions, pages, doubled, page_tokens=4)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected(problem), rtol=0, atol=LIMIT)


def test_no_pages_and_fp64_go_to_torch(device: torch.device) -> None:
    problem = LowRankProblem(sizes=(1, 2, 3, 2), rank=4, dim=8, turned=8, dtype=torch.float64, device=device)
    u, sv, positions, pages, rotation = problem.arguments()
    assert kernel.lowrank_keys(u, sv, positions, pages, rotation, page_tokens=2).dtype == torch.float64
    nothing = kernel.lowrank_keys(u.float(), sv.float(), positions, pages[:, :, :0], rotation, page_tokens=2)
    assert nothing.shape == (1, 2, 0, 8)


@pytest.mark.parametrize("wrong", ["pages", "positions"])
def test_debug_mode_names_what_is_out_of_range(
    wrong: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    problem = LowRankProblem(sizes=(1, 2, 3, 2), rank=4, dim=8, turned=8, dtype=torch.float32, device=device)
    u, sv, positions, pages, rotation = problem.arguments()
    positions = positions.clamp_max(5)
    if wrong == "pages":
        pages[0, 1, 2] = -1
    else:
        positions[0, 3] = len(rotation.cos)
    with pytest.raises(InputError, match=rf"{wrong} must lie in \[0, "):
        kernel.lowrank_keys(u, sv, positions, pages, rotation, page_tokens=2)
