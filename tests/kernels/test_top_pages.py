"""The best pages: as many as asked for, in order of place, none better left out."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.top_pages import blocked, native, reference, top_pages

OBSTACLE = native.obstacle(torch.device("cpu"))
ALL = pytest.mark.parametrize(
    "implementation",
    [
        blocked,
        reference,
        pytest.param(native, marks=pytest.mark.skipif(OBSTACLE is not None, reason=f"native: {OBSTACLE}")),
    ],
    ids=["blocked", "reference", "native"],
)
SCORES = st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.25, 1.0, 3.0, math.inf])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


@ALL
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


@ALL
def test_nan_counts_as_the_highest(implementation: ModuleType) -> None:
    scores = torch.tensor([[[1.0, math.nan, 3.0, 2.0]]])

    assert implementation.top_pages(scores, 2).tolist() == [[[1, 2]]]


@ALL
@given(seed=st.integers(0, 2**20), pages=st.integers(2, 100), data=st.data())
def test_ties_and_nan_in_rows_longer_than_a_vector(
    implementation: ModuleType, seed: int, pages: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 3, pages, generator=generator).mul(2).round()
    scores[torch.rand(scores.shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.2, 1.0]))] = math.nan
    chosen = implementation.top_pages(scores, data.draw(st.integers(1, pages)))

    assert bool((chosen.diff() > 0).all())
    taken = scores.gather(2, chosen).nan_to_num(nan=math.inf).sort().values
    best = scores.nan_to_num(nan=math.inf).sort().values[..., pages - chosen.shape[2] :]
    assert taken.equal(best)


@pytest.mark.parametrize(("shape", "count"), [((2, 5), 1), ((1, 2, 5), -1)], ids=["shape", "count"])
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(InputError, match=r"top_pages needs scores \[B, Hk, N\] and a count of at least 0, got \["):
        top_pages(torch.zeros(shape), count)
