"""The C kernels: right on any problem they serve, built once into a private place, done without where that fails."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError, MissingDependencyError
from kvtier.kernels import native
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.gather_attention import blocked
from kvtier.kernels.gather_attention import native as attention
from kvtier.kernels.page_scores import blocked as blocked_scores
from kvtier.kernels.page_scores import native as scores
from kvtier.kernels.page_scores import reference as scores_reference
from kvtier.kernels.page_summaries import page_bounds
from kvtier.testing.attention_problems import Problem, assert_near
from kvtier.types import GroupReduce

CPU = torch.device("cpu")
OBSTACLE = attention.obstacle(CPU) or scores.obstacle(CPU)
needs_native = pytest.mark.skipif(OBSTACLE is not None, reason=f"native kernels cannot run here: {OBSTACLE}")
in_threads = pytest.mark.parametrize("threads", [1, 2])
TYPES = (torch.float32, torch.bfloat16)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Few queries over pages whose unused neighbours are NaN, of every width of the code."""
    queries = draw(st.integers(1, 3))
    group = draw(st.integers(1, attention.MOST_ROWS // queries))
    sizes = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), group, queries, draw(st.integers(1, 40)))
    return Problem(
        sizes=(*sizes, draw(st.sampled_from([1, 7, 16]))),
        dims=(draw(st.sampled_from([16, 48, 128])), draw(st.sampled_from([16, 80, 128]))),
        dtype=draw(st.sampled_from(TYPES)),
        device=CPU,
        seed=draw(st.integers(0, 2**20)),
        softcap=draw(st.none() | st.just(1.5)),
    )


@contextmanager
def alone(threads: int) -> Iterator[None]:
    """Splits of a few keys in so many threads, also for small calls; and nothing handed on to the plain torch form."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LEAST_SPLIT", "EASY_SPLIT"):
            patch.setattr(attention, name, 8)
        patch.setattr(scores, "LEAST_SPLIT", 3)
        for module in (attention, scores):
            patch.setattr(module, "threads_for", lambda _: threads)
        for module in (blocked, blocked_scores):
            for name in module.__all__:
                patch.delattr(module, name)
        yield


@needs_native
@in_threads
@given(problem=problems(), widened=st.booleans())
def test_pages(threads: int, problem: Problem, widened: bool) -> None:
    q, *others = problem.tensors()
    with alone(threads):
        got = attention.attend_pages(
            q.float() if widened else q, *others, scale=0.3, softcap=problem.softcap, visible=None
        )
    assert_near(got, problem.expected(0.3))


@needs_native
@in_threads
@given(problem=problems())
def test_a_run_behind_any_strides(threads: int, problem: Problem) -> None:
    q, k_arena, v_arena, frames = problem.tensors()
    k, v = (_strided(arena[frames].flatten(2, 3)) for arena in (k_arena, v_arena))
    with alone(threads):
        got = attention.attend_run(q, k, v, scale=0.3, softcap=problem.softcap, visible=None)
    assert_near(got, problem.expected(0.3))


@needs_native
@in_threads
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40)),
    dim=st.sampled_from([16, 48, 128]),
    dtype=st.sampled_from(TYPES),
    group_reduce=st.sampled_from(get_args(GroupReduce)),
    seed=st.integers(0, 2**20),
)
def test_box_scores(
    threads: int, sizes: tuple[int, int, int, int], dim: int, dtype: torch.dtype, group_reduce: GroupReduce, seed: int
) -> None:
    batch, heads, group, pages = sizes
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads * group, 1, dim, generator=generator).to(dtype)
    bounds = page_bounds(torch.randn(batch, heads, pages, 3, dim, generator=generator).to(dtype))
    with alone(threads):
        got = scores.box_scores(q, *map(_strided, bounds), group_reduce)
    right = scores_reference.box_scores(q.double(), *(bound.double() for bound in bounds), group_reduce)
    torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-4)


@pytest.fixture
def plain_cpu(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code as it is compiled for an x86 CPU without AVX-512."""
    if "avx512f" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this CPU has no AVX-512: every other test is of this code")
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-mno-avx512f", "-Wno-psabi"))
    attention._function.cache_clear()
    scores._function.cache_clear()
    yield
    attention._function.cache_clear()
    scores._function.cache_clear()


@needs_native
@pytest.mark.parametrize("dtype", TYPES)
def test_a_cpu_without_avx512(plain_cpu: None, dtype: torch.dtype) -> None:
    problem = Problem(sizes=(1, 2, 7, 1, 9, 16), dims=(64, 80), dtype=dtype, device=CPU)
    q = torch.randn(1, 8, 1, 64).to(dtype)
    bounds = page_bounds(torch.randn(1, 2, 40, 3, 64).to(dtype))
    with alone(2):
        got = attention.attend_pages(*problem.tensors(), scale=0.3, softcap=None, visible=None)
        ranked = scores.box_scores(q, *bounds, "max")
    assert_near(got, problem.expected(0.3))
    right = scores_reference.box_scores(q.double(), *(bound.double() for bound in bounds), "max")
    torch.testing.assert_close(ranked.double(), right, rtol=1e-5, atol=1e-4)


@needs_native
def test_numbers_too_small_to_be_normal_count_as_zero_at_most() -> None:
    """A bf16 key of 2^-130 is 0 where pairs are multiplied at once; no logit moves by more than that times a query."""
    q, k, v = torch.full((1, 1, 1, 32), 2.0), torch.full((1, 1, 40, 32), 2.0**-130), torch.randn(1, 1, 40, 32)
    got = attention.attend_run(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=1.0, softcap=None, visible=None)
    torch.testing.assert_close(got.out[0, 0, 0], v.bfloat16().float().mean((0, 1, 2)), rtol=0, atol=1e-6)
    assert float(got.lse) == pytest.approx(math.log(40), abs=1e-6)


@needs_native
def test_far_apart_logits_and_a_nan_are_what_they_are() -> None:
    q, k, v = torch.full((1, 1, 1, 16), 30.0), torch.zeros(1, 1, 200, 16), torch.randn(1, 1, 200, 16)
    k[0, 0, 150] = 1.0
    got = attention.attend_run(q, k, v, scale=1.0, softcap=None, visible=None)
    assert got.out[0, 0, 0].equal(v[0, 0, 150])
    assert float(got.lse) == pytest.approx(480.0)
    k[0, 0, 3, 2] = torch.nan
    assert attention.attend_run(q, k, v, scale=1.0, softcap=None, visible=None).out.isnan().all()


@needs_native
@pytest.mark.parametrize("frame", [-1, 5])
def test_a_frame_outside_of_the_arena_is_refused(frame: int) -> None:
    arena, frames = torch.randn(5, 4, 16), torch.tensor([[[0, frame]]])
    with pytest.raises(InputError, match=r"frames must lie in \[0, 5\)"):
        attention.attend_pages(torch.randn(1, 1, 1, 16), arena, arena, frames, scale=1.0, softcap=None, visible=None)


@needs_native
def test_what_it_does_not_serve_goes_to_plain_torch() -> None:
    for dtype, rows, dim in (
        (torch.float64, 1, 16),
        (torch.float16, 1, 16),
        (torch.float32, 17, 16),
        (torch.float32, 1, 8),
    ):
        problem = Problem(sizes=(1, 2, rows, 1, 3, 4), dims=(dim, dim), dtype=dtype, device=CPU)
        got = attention.attend_pages(*problem.tensors(), scale=0.3, softcap=None, visible=None)
        right = blocked.attend_pages(*problem.tensors(), scale=0.3, softcap=None, visible=None)
        assert got.out.equal(right.out)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache directory, and nothing built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.built.cache_clear()
    yield tmp_path / "kvtier" / "kernels"
    native.built.cache_clear()


@needs_native
def test_it_is_built_once_and_then_needs_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.built("page_scores").obstacle is None
    (library,) = fresh.iterdir()
    assert library.name.startswith("page_scores-")
    native.built.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert native.built("page_scores").obstacle is None


def test_without_a_compiler_plain_torch_runs(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    operator = Operator(
        "toy",
        [
            Candidate("native", lambda: "native", "quick", attention.obstacle),
            Candidate("blocked", lambda: "blocked", "plain"),
        ],
    )
    assert operator.on(CPU) == "blocked"
    assert operator.choice(CPU).reason == "plain; not native: there is no C compiler (cc, gcc, clang)"
    with pytest.raises(MissingDependencyError, match="there is no C compiler"):
        native.function("gather_attention", "kvtier_attend", [], None)


def test_a_compiler_that_fails_is_told_in_a_line(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FLAGS", ("--no-such-flag",))
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    obstacle = native.built("page_scores").obstacle
    assert obstacle is not None
    assert "failed" in obstacle
    assert "\n" not in obstacle
    assert not list(fresh.iterdir()), "nothing half-built is left"


def test_a_directory_that_others_may_write_is_not_used(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    obstacle = native.built("page_scores").obstacle
    assert obstacle is not None
    assert "can be written by others" in obstacle


def _strided(x: torch.Tensor) -> torch.Tensor:
    """The same values [B, H, N, D] in memory that is NaN elsewhere."""
    batch, heads, keys, dim = x.shape
    room = torch.full((batch, heads + 1, keys + 3, dim + 4), torch.nan, dtype=x.dtype)
    view = room[:, :heads, 2 : 2 + keys, 1 : 1 + dim]
    view.copy_(x)
    return view
