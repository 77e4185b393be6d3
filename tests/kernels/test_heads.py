"""Folding of batch and heads, and the type that kernels accumulate in."""

import pytest
import torch

from kvtier.kernels.heads import accumulation_dtype, fold_heads, fold_queries


def test_contiguous_heads_fold_to_a_view() -> None:
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    folded = fold_heads(x)
    assert folded is not None
    assert folded.data_ptr() == x.data_ptr()
    assert folded.equal(x.reshape(6, 4, 5))


@pytest.mark.parametrize(("batch", "heads"), [(1, 3), (2, 1)])
def test_one_row_or_one_head_folds_whatever_the_strides(batch: int, heads: int) -> None:
    x = torch.arange(batch * heads * 4 * 5).view(4, heads, 5, batch).permute(3, 1, 0, 2)
    folded = fold_heads(x)
    assert folded is not None
    assert folded.data_ptr() == x.data_ptr()
    assert folded.equal(x.reshape(batch * heads, 4, 5))


def test_strides_that_would_need_a_copy_do_not_fold() -> None:
    assert fold_heads(torch.zeros(2, 5, 4, 3)[:, :3]) is None


def test_queries_fold_to_groups_of_their_kv_head() -> None:
    q = torch.arange(2 * 6 * 3 * 4, dtype=torch.float32).view(2, 6, 3, 4)
    folded = fold_queries(q, 2, torch.float64)
    assert folded.dtype == torch.float64
    assert folded[3, 2].equal(q[1, 5].double())


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_accumulation(types: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    assert accumulation_dtype(*(torch.zeros(1, dtype=dtype) for dtype in types)) == expected
