"""What C makes of keys beside attention: column sums, summaries of pages and products with them, against fp64."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.kernels.column_sums import blocked as blocked_sums
from kvtier.kernels.column_sums import native as sums
from kvtier.kernels.column_sums import reference as sums_reference
from kvtier.kernels.page_scores import blocked as blocked_scores
from kvtier.kernels.page_scores import native as scores
from kvtier.kernels.page_scores import products
from kvtier.kernels.page_scores import reference as scores_reference
from kvtier.kernels.page_summaries import blocked as blocked_summaries
from kvtier.kernels.page_summaries import native as summaries
from kvtier.kernels.page_summaries import page_planes
from kvtier.kernels.page_summaries import reference as summaries_reference
from kvtier.types import GroupReduce, Visibility

CPU = torch.device("cpu")
MODULES = (sums, summaries, scores)
OBSTACLE = next((found for found in (module.obstacle(CPU) for module in MODULES) if found), None)
needs_native = pytest.mark.skipif(OBSTACLE is not None, reason=f"native kernels cannot run here: {OBSTACLE}")
TYPES = (torch.float32, torch.bfloat16)
threads = st.sampled_from([1, 2])
dims = st.sampled_from([16, 48, 80, 128])
reductions = st.sampled_from(get_args(GroupReduce))
seeds = st.integers(0, 2**20)


@contextmanager
def alone(threads: int) -> Iterator[None]:
    """So many threads also for small calls, splits of a few pages, and nothing handed on to the plain torch form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "LEAST_SPLIT", 3)
        patch.setattr(sums, "MOST_QUERIES", 64)
        for module in (sums, summaries, products):
            patch.setattr(module, "threads_for", lambda _: threads)
        for module in (blocked_sums, blocked_summaries, blocked_scores):
            for name in module.__all__:
                patch.delattr(module, name)
        yield


class Votes(NamedTuple):
    """Queries, the lse of any attention, keys among others that are NaN, and how they see each other."""

    q: torch.Tensor
    lse: torch.Tensor
    k: torch.Tensor
    softcap: float | None
    visible: Visibility | None

    def by(self, queries: slice = slice(None)) -> torch.Tensor:
        visible = self.visible and Visibility(self.visible.q_pos[:, queries], *self.visible[1:])
        q, lse = self.q[:, :, queries], self.lse[:, :, queries]
        return sums.column_sums(q, lse, self.k, scale=0.3, softcap=self.softcap, visible=visible)

    def right(self) -> torch.Tensor:
        q, lse, k = self.q.double(), self.lse.double(), self.k.double()
        return sums_reference.column_sums(q, lse, k, scale=0.3, softcap=self.softcap, visible=self.visible)


@st.composite
def votes(draw: st.DrawFn) -> Votes:
    """Few queries and many, of which some see nothing; keys at any positions, each head its own or all the same."""
    batch, heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 4]))
    queries, keys = draw(st.sampled_from([1, 2, 5, 9, 16, 17, 32, 45, 100])), draw(st.integers(1, 230))
    generator = torch.Generator().manual_seed(draw(seeds))
    dim, q_type, k_type = draw(dims), draw(st.sampled_from(TYPES)), draw(st.sampled_from(TYPES))
    q = torch.randn(batch, queries, heads * group, dim, generator=generator).to(q_type).transpose(1, 2)
    k = torch.randn(batch, heads, keys, dim, generator=generator).to(k_type)
    lse = torch.randn(batch, heads * group, queries, generator=generator) + 2
    lse[torch.rand(lse.shape, generator=generator) < 0.1] = -torch.inf
    visible = None
    if draw(st.booleans()):
        k_pos = torch.arange(keys).expand(batch, draw(st.sampled_from([1, heads])), keys)
        if draw(st.booleans()):
            k_pos = torch.randint(0, keys, k_pos.shape, generator=generator)
        if draw(st.booleans()):
            k_pos = torch.where(torch.rand(k_pos.shape, generator=generator) < 0.1, 2**63 - 1, k_pos)
        q_pos = torch.randint(0, keys, (batch, 1), generator=generator) + torch.arange(queries)
        visible = Visibility(q_pos, k_pos, draw(st.none() | st.integers(1, 40)))
    return Votes(q, lse, _strided(k), draw(st.none() | st.just(1.5)), visible)


@needs_native
@pytest.mark.parametrize("queries", [1, 40])
def test_votes_below_the_least_normal_number_are_still_ranked(queries: int) -> None:
    q = torch.zeros(1, 1, queries, 16)
    q[..., 0] = 1.0
    k = torch.zeros(1, 1, 9, 16)
    k[..., 0] = -torch.arange(86.0, 103.0, 2.0)

    got = sums.column_sums(q, torch.zeros(1, 1, queries), k, scale=1.0, softcap=None, visible=None)

    torch.testing.assert_close(got, queries * k[..., 0].double().exp().float(), rtol=1e-4, atol=queries * 2.0**-149)
    assert (got.diff() < 0).all()


@needs_native
@given(problem=votes(), threads=threads)
def test_column_sums(problem: Votes, threads: int) -> None:
    with alone(threads):
        got = problem.by()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), problem.right(), rtol=2e-5, atol=2e-5)


@needs_native
@given(problem=votes(), at=st.integers(0, 100))
def test_column_sums_of_any_chunks_of_queries_add_up(problem: Votes, at: int) -> None:
    with alone(1):
        parts = [problem.by(part) for part in (slice(at), slice(at, None)) if problem.q[:, :, part].numel()]
        whole = problem.by()
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=2e-5, atol=2e-5)


@needs_native
@pytest.mark.parametrize("queries", [1, 40])
def test_a_hidden_key_counts_nothing_and_a_seen_nan_shows(queries: int) -> None:
    q, k = torch.ones(1, 1, queries, 16), torch.zeros(1, 1, 20, 16)
    k[:, :, 10:] = torch.nan
    visible = Visibility(torch.full((1, queries), 10), torch.arange(20)[None, None])
    got = sums.column_sums(q, torch.zeros(1, 1, queries), k, scale=1.0, softcap=None, visible=visible)[0, 0]
    assert got[:10].equal(torch.full((10,), float(queries)))
    assert got[10].isnan()
    assert got[11:].equal(torch.zeros(9))


@needs_native
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dim=dims,
    dtype=st.sampled_from(TYPES),
    threads=threads,
    seed=seeds,
)
def test_summaries(shape: list[int], dim: int, dtype: torch.dtype, threads: int, seed: int) -> None:
    k = _strided(torch.randn(*shape, dim, generator=torch.Generator().manual_seed(seed)).to(dtype))
    with alone(threads):
        bounds, means = summaries.page_bounds(k), summaries.page_landmarks(k)
    for got, right in zip(bounds, summaries_reference.page_bounds(k), strict=True):
        assert got.dtype == dtype
        assert got.equal(right)
    right = summaries_reference.page_landmarks(k.double())
    assert means.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(means.double(), right, rtol=limit, atol=1e-6)


@needs_native
@pytest.mark.parametrize("dtype", TYPES)
def test_a_nan_among_the_keys_of_a_page_shows_in_its_summaries(dtype: torch.dtype) -> None:
    k = torch.arange(3 * 32, dtype=dtype).view(3, 32)
    k[1, 5] = torch.nan
    for summary in (*summaries.page_bounds(k), summaries.page_landmarks(k)):
        assert summary.isnan().nonzero().tolist() == [[5]]


@needs_native
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 20)),
    slots=st.integers(1, 18),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    dim=dims,
    dtype=st.sampled_from(TYPES),
    group_reduce=reductions,
    threads=threads,
    seed=seeds,
)
def test_products(
    sizes: tuple[int, int, int, int],
    slots: int,
    bits: int,
    dim: int,
    dtype: torch.dtype,
    group_reduce: GroupReduce,
    threads: int,
    seed: int,
) -> None:
    batch, heads, group, pages = sizes
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads * group, 1, dim, generator=generator).to(dtype)
    k = torch.randn(batch, heads, pages, slots, dim, generator=generator).to(dtype)
    low, high = summaries_reference.page_bounds(k)
    planes = page_planes(k, low, high, bits=bits)
    # A reader may stop after any plane.
    arguments = planes[:, :, :, : max(1, bits - 1)], _strided(low), _strided(high)
    with alone(threads):
        got = scores.plane_scores(q, *arguments, group_reduce), scores.landmark_scores(q, _strided(low), group_reduce)
    wide = scores_reference.plane_scores(q.double(), arguments[0], low.double(), high.double(), group_reduce)
    torch.testing.assert_close(got[0].double(), wide, rtol=1e-5, atol=1e-4)
    wide = scores_reference.landmark_scores(q.double(), low.double(), group_reduce)
    torch.testing.assert_close(got[1].double(), wide, rtol=1e-5, atol=1e-4)


@needs_native
def test_centroids_are_scored_once() -> None:
    generator = torch.Generator().manual_seed(0)
    q, centroids = torch.randn(1, 4, 1, 16, generator=generator), torch.randn(1, 2, 7, 16, generator=generator)
    clusters = torch.randint(0, 7, (1, 2, 5, 3), generator=generator)
    with alone(1):
        got = scores.centroid_scores(q, centroids, clusters, "mean")
    right = scores_reference.centroid_scores(q, centroids, clusters, "mean")
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 16), (torch.float16, 16), (torch.float32, 8)])
def test_what_it_does_not_serve_goes_to_plain_torch(dtype: torch.dtype, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, count, dim, generator=generator).to(dtype) for count in (1, 12))
    pages, lse = k.unflatten(2, (3, 4)), torch.zeros(1, 2, 1)
    options = {"scale": 1.0, "softcap": None, "visible": None}
    assert sums.column_sums(q, lse, k, **options).equal(blocked_sums.column_sums(q, lse, k, **options))
    low, high = summaries.page_bounds(pages)
    assert all(map(torch.equal, (low, high), blocked_summaries.page_bounds(pages)))
    assert summaries.page_landmarks(pages).equal(blocked_summaries.page_landmarks(pages))
    planes = summaries.page_planes(pages, low, high, 2)
    given_planes = q, planes, low, high, "max"
    assert scores.plane_scores(*given_planes).equal(blocked_scores.plane_scores(*given_planes))
    assert scores.landmark_scores(q, low, "max").equal(blocked_scores.landmark_scores(q, low, "max"))


@needs_native
@pytest.mark.parametrize("module", [sums, summaries], ids=["column_sums", "page_summaries"])
def test_other_devices_and_wrong_answers_are_obstacles(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.obstacle(torch.device("cuda")) == "is for CPUs"
    monkeypatch.setattr(module, "_trusted", lambda: False)
    assert module.obstacle(CPU) == "its answers to a trial are wrong"


def _strided(x: torch.Tensor) -> torch.Tensor:
    """The same values in memory that is NaN elsewhere."""
    room = torch.full([size + 3 for size in x.shape], torch.nan, dtype=x.dtype)
    view = room[tuple(slice(2, 2 + size) for size in x.shape)]
    view.copy_(x)
    return view
