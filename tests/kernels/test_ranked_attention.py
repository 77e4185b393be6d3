"""Attention over the best pages and the newest keys: the pages that score best, all of them, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.gather_attention import native as attention
from kvtier.kernels.page_scores import native as scoring
from kvtier.kernels.ranked_attention import Ranked, attend_ranked, blocked, native, reference
from kvtier.types import GroupReduce

OBSTACLE = native.obstacle(torch.device("cpu"))
needs_native = pytest.mark.skipif(OBSTACLE is not None, reason=f"native kernels cannot run here: {OBSTACLE}")
ALL = pytest.mark.parametrize(
    ("implementation", "threads"),
    [(blocked, 1), (reference, 1), *(pytest.param(native, threads, marks=needs_native) for threads in (1, 2))],
    ids=["blocked", "reference", "native", "native in two threads"],
)
LIMIT = 2e-5


class Case(NamedTuple):
    """Everything but the choice; frames that no page has, and what lies behind the newest keys, are NaN."""

    q: torch.Tensor
    kmin: torch.Tensor
    kmax: torch.Tensor
    k_arena: torch.Tensor
    v_arena: torch.Tensor
    frames: torch.Tensor
    newest: tuple[torch.Tensor, torch.Tensor] | None

    def run(self, implementation: ModuleType, count: int, how: GroupReduce, softcap: float | None = None) -> Ranked:
        *tensors, newest = self
        return implementation.attend_ranked(
            *tensors, count, newest=newest, group_reduce=how, scale=0.3, softcap=softcap
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One query over a few pages, of every width of the code."""
    batch, heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 8]))
    pages, slots, newest = draw(st.integers(1, 40)), draw(st.sampled_from([1, 4, 16])), draw(st.integers(0, 17))
    dim, value_dim = draw(st.sampled_from([16, 48, 64])), draw(st.sampled_from([16, 80]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    count = batch * heads * pages
    frames = torch.randperm(count + 3, generator=generator)[:count]
    k_arena, v_arena = (torch.full((count + 3, slots, size), torch.nan, dtype=dtype) for size in (dim, value_dim))
    k_arena[frames], v_arena[frames] = drawn(count, slots, dim), drawn(count, slots, value_dim)
    frames = frames.view(batch, heads, pages)
    keys = k_arena[frames]
    tail = None
    if newest:
        held = [torch.full((batch, heads, newest + 5, size), torch.nan, dtype=dtype) for size in (dim, value_dim)]
        for into in held:
            into[:, :, :newest] = drawn(*into[:, :, :newest].shape)
        tail = (held[0][:, :, :newest], held[1][:, :, :newest])
    return Case(drawn(batch, heads * group, 1, dim), keys.amin(3), keys.amax(3), k_arena, v_arena, frames, tail)


def bounds_of(case: Case, how: GroupReduce) -> torch.Tensor:
    """Scores [B, Hk, N] in fp64, by the formula."""
    batch, heads, _, dim = case.kmin.shape
    queries = case.q.double().view(batch, heads, -1, 1, dim)
    corners = torch.maximum(queries * case.kmin.double()[:, :, None], queries * case.kmax.double()[:, :, None]).sum(-1)
    return {"max": corners.amax(2), "sum": corners.sum(2), "mean": corners.mean(2)}[how]


def attention_of(case: Case, pages: torch.Tensor, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of dense attention in fp64 over these pages [B, Hk, n] and the newest keys."""
    held = [arena.double()[case.frames.gather(2, pages)].flatten(2, 3) for arena in (case.k_arena, case.v_arena)]
    if case.newest is not None:
        held = [torch.cat([part, new.double()], 2) for part, new in zip(held, case.newest, strict=True)]
    batch, heads = case.kmin.shape[:2]
    queries = case.q.double().view(batch, heads, -1, case.q.shape[3])
    logits = 0.3 * queries @ held[0].mT
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return (logits.softmax(-1) @ held[1]).view(*case.q.shape[:3], -1), logits.logsumexp(-1).view(case.q.shape[:3])


@contextmanager
def split_in(threads: int) -> Iterator[None]:
    """So many threads, also for small calls, and parts of a few pages or keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads_for", lambda _: threads)
        patch.setattr(scoring, "LEAST_SPLIT", 3)
        for name in ("LEAST_SPLIT", "EASY_SPLIT"):
            patch.setattr(attention, name, 8)
        yield


@ALL
@given(
    case=cases(),
    share=st.floats(0, 1),
    how=st.sampled_from(get_args(GroupReduce)),
    softcap=st.sampled_from([None, 1.5]),
)
def test_the_best_pages_and_the_newest_keys(
    implementation: ModuleType, threads: int, case: Case, share: float, how: GroupReduce, softcap: float | None
) -> None:
    count = 1 + round(share * (case.frames.shape[2] - 1))
    with split_in(threads):
        partial, pages = case.run(implementation, count, how, softcap)

    scores = bounds_of(case, how)
    assert pages.shape == (*scores.shape[:2], count)
    assert (pages.diff() > 0).all()
    left = scores.scatter(2, pages, -torch.inf)
    assert (scores.gather(2, pages).amin(2) >= left.amax(2) - 1e-4).all()
    out, lse = attention_of(case, pages, softcap)
    torch.testing.assert_close(partial.out.double(), out, rtol=0, atol=LIMIT)
    torch.testing.assert_close(partial.lse.double(), lse, rtol=0, atol=LIMIT)


@ALL
@given(case=cases(), count=st.integers(1, 12))
def test_other_pages_are_not_read(implementation: ModuleType, threads: int, case: Case, count: int) -> None:
    with split_in(threads):
        partial, pages = case.run(implementation, count, "max")
        others = torch.ones(case.frames.shape, dtype=torch.bool).scatter_(2, pages, False)
        for arena in (case.k_arena, case.v_arena):
            arena[case.frames[others]] = torch.nan
        again = case._replace(frames=case.frames.masked_fill(others, 2**40)).run(implementation, count, "max")

    assert again.pages.equal(pages)
    assert again.partial.out.equal(partial.out)


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
@given(case=cases(), frame=st.sampled_from([-1, 2**40]))
def test_frames_out_of_range_are_refused(threads: int, case: Case, frame: int) -> None:
    case.frames[-1, -1] = frame
    with split_in(threads), pytest.raises(InputError, match="frames must lie in"):
        case.run(native, 2, "max")


def test_what_does_not_fit_is_refused() -> None:
    q, bound, arena, frames = (
        torch.ones(1, 4, 1, 16),
        torch.ones(1, 2, 5, 16),
        torch.ones(9, 4, 16),
        torch.ones(1, 2, 4),
    )
    with pytest.raises(InputError, match=r"frames \[B, Hk, N\].*\[1, 2, 4\] and 3"):
        attend_ranked(q, bound, bound, arena, arena, frames, 3, group_reduce="max", scale=1.0)
    with pytest.raises(InputError, match="a count of at least 1"):
        attend_ranked(q, bound[:, :, :4], bound[:, :, :4], arena, arena, frames, 0, group_reduce="max", scale=1.0)
    with pytest.raises(InputError, match="group_reduce must be"):
        attend_ranked(q, bound[:, :, :4], bound[:, :, :4], arena, arena, frames, 1, group_reduce="min", scale=1.0)  # type: ignore[arg-type]  # on purpose
