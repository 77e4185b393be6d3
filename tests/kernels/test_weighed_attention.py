"""Attention and what each key received of it: by every implementation, against a softmax in fp64 head by head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.gather_attention import native as attention
from kvtier.kernels.weighed_attention import Weighed, attend_weighing, blocked, native, reference
from kvtier.types import Partial

OBSTACLE = native.obstacle(torch.device("cpu"))
needs_native = pytest.mark.skipif(OBSTACLE is not None, reason=f"native kernels cannot run here: {OBSTACLE}")
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SERVED = TYPES[1::2]
SCALE = 0.3


@dataclass(frozen=True)
class Problem:
    """Queries over keys that are strided views."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    softcap: float | None

    def expected(self) -> Weighed:
        """By hand: one row, one query head and one query at a time."""
        (batch, heads, queries, _), group = self.q.shape, self.q.shape[1] // self.k.shape[1]
        out = torch.zeros(batch, heads, queries, self.v.shape[3], dtype=torch.float64)
        lse = torch.zeros(batch, heads, queries, dtype=torch.float64)
        weights = torch.zeros(batch, heads, self.k.shape[2], dtype=torch.float64)
        for at in torch.cartesian_prod(torch.arange(batch), torch.arange(heads), torch.arange(queries)).tolist():
            b, h, t = at
            logits = self.k[b, h // group].double() @ self.q[b, h, t].double() * SCALE
            if self.softcap is not None:
                logits = (logits / self.softcap).tanh() * self.softcap
            lse[b, h, t] = logits.exp().sum().log()
            weights[b, h] += logits.softmax(0)
            out[b, h, t] = logits.softmax(0) @ self.v[b, h // group].double()
        return Weighed(Partial(out, lse), weights)


@st.composite
def problems(draw: st.DrawFn, *, types: tuple[torch.dtype, ...] = TYPES, most_queries: int = 3) -> Problem:
    batch, heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    queries, keys, dim = draw(st.integers(1, most_queries)), draw(st.integers(1, 300)), draw(st.sampled_from([16, 48]))
    generator, dtype = torch.Generator().manual_seed(draw(st.integers(0, 2**20))), draw(st.sampled_from(types))
    q = 3 * torch.randn(batch, heads * group, queries, dim, generator=generator)
    k, v = (torch.randn(batch, heads + 1, keys + 2, width, generator=generator) for width in (dim, 32))
    return Problem(q.to(dtype), k.to(dtype)[:, 1:, 1:-1], v.to(dtype)[:, 1:, 1:-1], draw(st.none() | st.just(1.5)))


def assert_near(got: Weighed | tuple[Partial, torch.Tensor], problem: Problem) -> None:
    (partial, weights), limit = got, 1e-10 if problem.q.dtype == torch.float64 else 2e-5
    right = problem.expected()
    for mine, theirs in zip((*partial, weights), (*right.partial, right.weights), strict=True):
        assert mine.dtype == (torch.float64 if problem.q.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(mine.double(), theirs, rtol=limit, atol=limit)


@given(problem=problems())
def test_every_implementation(problem: Problem) -> None:
    q, k, v, softcap = problem.q, problem.k, problem.v, problem.softcap
    assert_near(attend_weighing(q, k, v, scale=SCALE, softcap=softcap), problem)
    for module in (reference, blocked):
        assert_near(module.attend_weighing(q, k, v, scale=SCALE, softcap=softcap), problem)


@contextmanager
def alone(threads: int) -> Iterator[None]:
    """Splits of a few keys in so many threads, also for small calls, and never two passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LEAST_SPLIT", 24)
        patch.setattr(attention, "threads_for", lambda _: threads)
        patch.delattr(blocked, "attend_weighing")
        yield


@needs_native
@given(problem=problems(types=SERVED, most_queries=1), threads=st.sampled_from([1, 2]))
def test_one_pass(problem: Problem, threads: int) -> None:
    with alone(threads):
        got = native.attend_weighing(problem.q, problem.k, problem.v, scale=SCALE, softcap=problem.softcap)
    assert_near(got, problem)


@needs_native
def test_weights_below_the_least_normal_number_are_still_ranked() -> None:
    q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 9, 16)
    q[..., 0], k[0, 0, 1:, 0] = 1.0, -torch.arange(88.0, 104.0, 2.0)
    weights = native.attend_weighing(q, k, k, scale=1.0, softcap=None)[1]
    torch.testing.assert_close(weights, k[..., 0].double().exp().float(), rtol=1e-4, atol=2.0**-149)
    assert (weights.diff() < 0).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(1, 3, 1, 16), torch.zeros(1, 2, 4, 16)
    for wrong in ((q, k, k), (q[:, :2], k[:, :, :0], k[:, :, :0]), (q[:, :2], k, k[:, :, :3])):
        with pytest.raises(InputError, match="attend_weighing needs q"):
            attend_weighing(*wrong, scale=1.0)
