"""Bias, ragged heads and trees of drafts: every mix of them, over runs and over pages, against dense attention."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.gather_attention import attend_pages, attend_run, blocked, native, reference
from kvtier.kernels.gather_attention.extras import Extras
from kvtier.testing.attention_problems import Problem
from kvtier.types import Partial, Tree, Visibility

Oracle = Callable[..., Partial]
Check = Callable[[Partial, Partial, torch.dtype], None]
CPU = torch.device("cpu")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any mix of options."""
    bounds = ((1, 2), (1, 3), (1, 3), (1, 12), (1, 9), (1, 6))
    sizes = tuple(draw(st.integers(low, high)) for low, high in bounds)
    return Problem(
        sizes=sizes,  # type: ignore[arg-type]
        dims=(draw(st.sampled_from([8, 24])), draw(st.sampled_from([8, 24]))),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        device=CPU,
        seed=draw(st.integers(0, 2**20)),
        ragged=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 60)),
        softcap=draw(st.none() | st.just(2.0)),
        bias=draw(st.sampled_from([None, "kv", "query"])),
        uneven=draw(st.booleans()),
        drafts=draw(st.integers(0, min(64, sizes[4] * sizes[5]))),
        unified_max=draw(st.sampled_from([None, 0.0, 3.0, -300.0, 300.0])),
    )


def run_of(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same keys as a run; what no head has is NaN."""
    q, k_arena, v_arena, frames = problem.tensors()
    there = frames >= 0
    k, v = (
        arena[frames.clamp_min(0)].masked_fill(~there[..., None, None], torch.nan).flatten(2, 3)
        for arena in (k_arena, v_arena)
    )
    return q, k, v


def options_of(problem: Problem) -> dict[str, object]:
    return {"scale": 0.4, "softcap": problem.softcap, "visible": problem.visible(), "extras": problem.extras()}


def over_run(implementation: ModuleType, problem: Problem) -> Partial:
    got: Partial = implementation.attend_run(*run_of(problem), **options_of(problem))
    return got


def over_pages(implementation: ModuleType, problem: Problem) -> Partial:
    got: Partial = implementation.attend_pages(*problem.tensors(), **options_of(problem))
    return got


@pytest.mark.parametrize("attend", [over_run, over_pages])
@given(problem=problems())
def test_any_mix_in_blocks(
    attend: Callable[..., Partial], engine: str, oracle: Oracle, check: Check, problem: Problem
) -> None:
    check(attend(blocked, problem), oracle(*run_of(problem), **options_of(problem)), problem.dtype)


@pytest.mark.parametrize("attend", [over_run, over_pages])
@given(problem=problems())
def test_any_mix_in_the_reference(
    attend: Callable[..., Partial], oracle: Oracle, check: Check, problem: Problem
) -> None:
    check(attend(reference, problem), oracle(*run_of(problem), **options_of(problem)), problem.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", ["kv", "query"])
@pytest.mark.parametrize("queries", [1, 70])
def test_at_the_measured_sizes(dtype: torch.dtype, bias: str, queries: int, oracle: Oracle, check: Check) -> None:
    problem = Problem(
        sizes=(2, 2, 3, queries, 90, 16),
        dims=(32, 32),
        dtype=dtype,
        device=CPU,
        bias=bias,
        uneven=True,
        drafts=37,  # type: ignore[arg-type]
    )
    for attend in (over_run, over_pages):
        check(attend(blocked, problem), oracle(*run_of(problem), **options_of(problem)), dtype)


def test_a_key_that_counts_n_times() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 8, generator=generator) for heads, tokens in ((4, 1), (2, 6), (2, 6)))
    counts = torch.tensor([1, 3, 1, 2, 1, 1])
    merged = attend_run(q, k, v, scale=0.3, bias=counts.log().expand(1, 2, 6))
    repeated = attend_run(q, k.repeat_interleave(counts, 2), v.repeat_interleave(counts, 2), scale=0.3)
    torch.testing.assert_close(merged.out, repeated.out)
    torch.testing.assert_close(merged.lse, repeated.lse)


def test_a_chain_of_drafts_is_causal_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 8, generator=generator) for heads, tokens in ((4, 7), (2, 40), (2, 40)))
    bits = [(1 << (i + 1)) - 1 for i in range(7)]
    chain = attend_run(q, k, v, scale=0.3, tree=Tree(torch.tensor([bits]), 33))
    causal = attend_run(
        q, k, v, scale=0.3, visible=Visibility(torch.arange(33, 40)[None], torch.arange(40)[None, None])
    )
    torch.testing.assert_close(chain.out, causal.out)
    torch.testing.assert_close(chain.lse, causal.lse)


def test_a_chain_of_drafts_alone_is_causal_attention_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 7, 8, generator=generator) for heads in (4, 2, 2))
    tree = Tree(torch.tensor([[(1 << (i + 1)) - 1 for i in range(7)]]), 0)
    visible = Visibility(torch.arange(7)[None], torch.arange(7)[None, None])
    chain = reference.attend_run(q, k, v, scale=0.3, softcap=None, visible=None, extras=Extras(tree=tree))
    causal = reference.attend_run(q, k, v, scale=0.3, softcap=None, visible=visible)
    assert torch.equal(chain.out, causal.out)
    assert torch.equal(chain.lse, causal.lse)


Q, K, FRAMES = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 80, 8), torch.zeros(1, 2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": torch.zeros(1, 3, 80)}, r"bias must be \[1, 2 or 4, 80\].* got \[1, 3, 80\]"),
        ({"bias": torch.zeros(1, 2, 79)}, "bias must be"),
        (
            {"lengths": torch.zeros(1, 4, dtype=torch.int64)},
            r"lengths must be int64 \[1, 2\].* \[1, 4\]",
        ),
        ({"lengths": torch.zeros(1, 2)}, "got torch.float32"),
        ({"lengths": torch.tensor([[3, 81]])}, r"lengths must lie in \[0, 80\], got 3 to 81"),
        ({"lengths": torch.tensor([[-1, 80]])}, "got -1 to 80"),
        ({"tree": Tree(torch.zeros(1, 2, dtype=torch.int64), 70)}, r"ancestors int64 \[1, 3\]"),
        ({"tree": Tree(torch.zeros(1, 3), 70)}, "got torch.float32"),
        ({"tree": Tree(torch.zeros(1, 3, dtype=torch.int64), 15)}, "at most 64 drafts.* and drafts from 15 on"),
        ({"tree": Tree(torch.zeros(1, 3, dtype=torch.int64), 81)}, "drafts from 81 on"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attend_run(Q, K, K, scale=1.0, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        attend_pages(Q, torch.zeros(9, 16, 8), torch.zeros(9, 16, 8), FRAMES, scale=1.0, **options)  # type: ignore[arg-type]


@pytest.mark.skipif(native.obstacle(CPU) is not None, reason=f"not built: {native.obstacle(CPU)}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attend", [over_run, over_pages])
@given(seed=st.integers(0, 2**20), slots=st.integers(1, 17))
def test_ragged_heads_in_c(
    attend: Callable[..., Partial], oracle: Oracle, check: Check, dtype: torch.dtype, seed: int, slots: int
) -> None:
    problem = Problem(
        sizes=(2, 3, 2, 2, 40, slots), dims=(32, 16), dtype=dtype, device=CPU, seed=seed, uneven=True, softcap=2.0
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LEAST_SPLIT", "EASY_SPLIT"):
            patch.setattr(native, name, 64)
        patch.setattr(native, "blocked", None)
        check(attend(native, problem), oracle(*run_of(problem), **options_of(problem)), dtype)
