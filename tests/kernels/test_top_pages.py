"""The best pages: as many as asked for, in order of place, none better left out."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.top_pages import blocked, reference, top_pages

BOTH = pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
SCORES = st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.25, 1.0, 3.0, math.inf])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


@BOTH
@given(data=st.data(), pages=st.integers(0, 30), count=st.integers(0, 40), dtype=DTYPES)
def test_none_better_is_left_out(
    implementation: ModuleType, data: st.DataObject, pages: int, count: int, dtype: torch.dtype
) -> None:
    rows = [data.draw(st.lists(SCORES, min_size=pages, max_size=pages)) for _ in range(4)]
    chosen = implementation.top_pages(torch.tensor(rows, dtype=dtype).view(2, 2, pages), count)

    assert chosen.shape == (2, 2, min(count, pages))
    assert chosen.dtype == torch.int64
    for scores, best in zip(rows, chosen.flatten(0, 1).tolist(), strict=True):
        assert best == sorted(set(best))
        left = [score for page, score in enumerate(scores) if page not in best]
        if best and left:
            assert min(scores[page] for page in best) >= max(left)


@given(seed=st.integers(0, 2**20), pages=st.integers(1, 300), count=st.integers(1, 300))
def test_implementations_agree_where_scores_differ(seed: int, pages: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.stack([torch.randperm(pages, generator=generator) for _ in range(3)]).float()[None]

    assert top_pages(scores, count).equal(reference.top_pages(scores, count))


@BOTH
def test_nan_counts_as_the_highest(implementation: ModuleType) -> None:
    scores = torch.tensor([[[1.0, math.nan, 3.0, 2.0]]])

    assert implementation.top_pages(scores, 2).tolist() == [[[1, 2]]]


@pytest.mark.parametrize(("shape", "count"), [((2, 5), 1), ((1, 2, 5), -1)], ids=["shape", "count"])
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(InputError, match=r"top_pages needs scores \[B, Hk, N\] and a count of at least 0, got \["):
        top_pages(torch.zeros(shape), count)
