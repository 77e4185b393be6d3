"""Attention over a run, blocked and reference, against dense fp64 softmax attention."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.gather_attention import attend_run, blocked, reference
from kvtier.kernels.gather_attention.table import BreakEven
from kvtier.kernels.merge_partials import merge_partials
from kvtier.types import Partial, Visibility

Oracle = Callable[..., Partial]
Check = Callable[[Partial, Partial, torch.dtype], None]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def problem(
    shape: tuple[int, int, int, int, int], dims: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k, v for (B, Hk, G, Tq, N) and (Dk, Dv)."""
    batch, kv_heads, group, queries, keys = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    return (
        normal(batch, kv_heads * group, queries, dims[0]),
        normal(batch, kv_heads, keys, dims[0]),
        normal(batch, kv_heads, keys, dims[1]),
    )


def causal(batch: int, queries: int, keys: int, window: int | None = None) -> Visibility:
    """The last queries of a sequence of ``keys`` tokens."""
    k_pos = torch.arange(keys).expand(batch, 1, keys)
    return Visibility(torch.arange(keys - queries, keys).expand(batch, queries), k_pos, window)


@pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((1, 1, 1, 1, 1), (8, 8)),
        ((2, 2, 4, 1, 37), (16, 16)),
        ((1, 4, 2, 3, 300), (64, 32)),
        ((3, 2, 1, 29, 61), (24, 40)),
        ((1, 2, 4, 1, 2100), (128, 128)),
        ((1, 2, 4, 3, 1300), (64, 64)),
    ],
    ids=str,
)
def test_every_key_seen(
    implementation: ModuleType,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    dims: tuple[int, int],
    oracle: Oracle,
    check: Check,
) -> None:
    q, k, v = problem(shape, dims, dtype)
    got = implementation.attend_run(q, k, v, scale=0.2, softcap=None, visible=None)
    check(got, oracle(q, k, v, scale=0.2), dtype)


@pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 40, 10_000])
@pytest.mark.parametrize("shape", [(1, 2, 2, 300, 300), (2, 1, 4, 77, 200), (2, 2, 1, 5, 1111)], ids=str)
def test_causal_with_windows_and_softcap(
    implementation: ModuleType,
    dtype: torch.dtype,
    softcap: float | None,
    window: int | None,
    shape: tuple[int, int, int, int, int],
    oracle: Oracle,
    check: Check,
) -> None:
    q, k, v = problem(shape, (32, 32), dtype)
    visible = causal(shape[0], shape[3], shape[4], window)
    got = implementation.attend_run(q, k, v, scale=0.3, softcap=softcap, visible=visible)
    check(got, oracle(q, k, v, scale=0.3, softcap=softcap, visible=visible), dtype)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, object]]:
    """Any small problem, its keys at any positions, most of them out of order."""
    sizes = ((1, 3), (1, 4), (1, 4), (1, 20), (1, 45))
    shape = tuple(draw(st.integers(low, high)) for low, high in sizes)
    batch, kv_heads, _, queries, keys = shape
    dims = (draw(st.sampled_from([8, 24])), draw(st.sampled_from([8, 24])))
    seed = draw(st.integers(0, 2**20))
    q, k, v = problem(shape, dims, draw(st.sampled_from(DTYPES)), seed)  # type: ignore[arg-type]
    if draw(st.booleans()):
        k, v = strided(k), strided(v)
    visible = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        k_pos = torch.randint(0, 50, (batch, draw(st.sampled_from([1, kv_heads])), keys), generator=generator)
        q_pos = torch.randint(0, 50, (batch, 1), generator=generator) + torch.arange(queries)
        if draw(st.booleans()):
            k_pos = k_pos.sort(-1).values
        visible = Visibility(q_pos, k_pos, draw(st.none() | st.integers(1, 30)))
    return q, k, v, {"scale": 0.4, "softcap": draw(st.none() | st.just(2.0)), "visible": visible}


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values behind a head stride that does not fold, in memory that is NaN elsewhere."""
    batch, heads, keys, dim = x.shape
    room = torch.full((batch, heads + 1, keys + 3, dim), torch.nan, dtype=x.dtype)
    view = room[:, :heads, 2 : 2 + keys]
    view.copy_(x)
    return view


@given(problems())
def test_any_problem_in_blocks(
    engine: str, oracle: Oracle, check: Check, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, object]]
) -> None:
    q, k, v, options = case
    check(blocked.attend_run(q, k, v, **options), oracle(q, k, v, **options), q.dtype)  # type: ignore[arg-type]


@given(problems())
def test_any_problem_in_the_reference(
    oracle: Oracle, check: Check, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, object]]
) -> None:
    q, k, v, options = case
    check(reference.attend_run(q, k, v, **options), oracle(q, k, v, **options), q.dtype)  # type: ignore[arg-type]


@given(problems(), st.data())
def test_any_split_of_the_keys_merges_to_the_whole(
    tiny_blocks: None,
    oracle: Oracle,
    check: Check,
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, object]],
    data: st.DataObject,
) -> None:
    q, k, v, options = case
    keys = k.shape[2]
    cuts = sorted(data.draw(st.lists(st.integers(0, keys), max_size=4)))
    visible = options.pop("visible")
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, keys], strict=True):
        seen = visible._replace(k_pos=visible.k_pos[..., start:stop]) if isinstance(visible, Visibility) else None
        parts.append(attend_run(q, k[:, :, start:stop], v[:, :, start:stop], **options, visible=seen))  # type: ignore[arg-type]
    merged = merge_partials(data.draw(st.permutations(parts)))
    check(merged, oracle(q, k, v, **options, visible=visible), q.dtype)


@pytest.mark.parametrize("cache_bytes", [1, 2**20])
@pytest.mark.parametrize("queries", [1, 40])
def test_queries_that_see_nothing(queries: int, cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(blocked, "VIEWS", BreakEven(rows=8, key_bytes=cache_bytes))
    q, k, v = problem((2, 2, 2, queries, 50), (16, 16), torch.float32)
    q_pos, k_pos = torch.full((2, queries), 7), torch.full((2, 1, 50), 8)
    for visible in (Visibility(q_pos, k_pos), Visibility(q_pos + 100, k_pos, 50)):
        out, lse = attend_run(q, k, v, scale=1.0, visible=visible)
        assert out.equal(torch.zeros(2, 4, queries, 16))
        assert lse.equal(torch.full((2, 4, queries), -torch.inf))


@pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
@pytest.mark.parametrize("shape", [(1, 2, 2, 3, 0), (1, 2, 2, 0, 5), (0, 2, 2, 3, 5)], ids=str)
def test_nothing_to_attend_to(
    implementation: ModuleType, shape: tuple[int, int, int, int, int], oracle: Oracle, check: Check
) -> None:
    q, k, v = problem(shape, (8, 16), torch.float32)
    got = implementation.attend_run(q, k, v, scale=1.0, softcap=None, visible=None)
    check(got, oracle(q, k, v, scale=1.0), torch.float32)


@pytest.mark.parametrize("keys", [600, 3000])
def test_large_logits_stay_finite(keys: int, oracle: Oracle, check: Check) -> None:
    q, k, v = problem((1, 2, 2, 1, keys), (16, 16), torch.float64)
    check(attend_run(q, k, v, scale=300.0), oracle(q, k, v, scale=300.0), torch.float64)


def test_16_bit_inputs_are_not_rounded_again(oracle: Oracle) -> None:
    q, k, v = problem((1, 2, 4, 1, 2048), (64, 64), torch.bfloat16)
    exact = oracle(q, k, v, scale=0.125)
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.125, enable_gqa=True)
    ours = attend_run(q, k, v, scale=0.125).out
    assert (ours - exact.out).abs().max() < 0.01 * (stock - exact.out).abs().max()


def test_inputs_are_not_written_to() -> None:
    q, k, v = problem((1, 2, 2, 20, 90), (16, 16), torch.float32)
    copies = [x.clone() for x in (q, k, v)]
    attend_run(q, k, v, scale=1.0, softcap=2.0, visible=causal(1, 20, 90, 30))
    attend_run(q, k, v, scale=1.0, visible=causal(1, 20, 90))
    assert all(x.equal(copy) for x, copy in zip((q, k, v), copies, strict=True))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_results_do_not_lie_in_scratch(softcap: float | None) -> None:
    q, k, v = problem((1, 2, 2, 1, 2000), (16, 16), torch.bfloat16)
    first = attend_run(q, k, v, scale=1.0, softcap=softcap)
    kept = Partial(first.out.clone(), first.lse.clone())
    attend_run(-q, k.flip(2), v.flip(2), scale=0.5, softcap=softcap)
    assert first.out.equal(kept.out)
    assert first.lse.equal(kept.lse)


@pytest.mark.parametrize("queries", [1, 40])
def test_inference_mode_makes_no_difference(queries: int) -> None:
    q, k, v = problem((1, 2, 2, queries, 3000), (16, 16), torch.bfloat16)
    with torch.inference_mode():
        inside = attend_run(q, k, v, scale=1.0, softcap=5.0)
    outside = attend_run(q, k, v, scale=1.0, softcap=5.0)
    assert outside.out.equal(inside.out)
    assert outside.lse.equal(inside.lse)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def positions(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("q", "k", "v", "visible"),
    [
        (zeros(4, 1, 8), zeros(1, 2, 5, 8), zeros(1, 2, 5, 8), None),
        (zeros(1, 4, 1, 8), zeros(1, 2, 5, 9), zeros(1, 2, 5, 8), None),
        (zeros(1, 4, 1, 8), zeros(1, 2, 5, 8), zeros(1, 2, 6, 8), None),
        (zeros(1, 3, 1, 8), zeros(1, 2, 5, 8), zeros(1, 2, 5, 8), None),
        (zeros(2, 4, 1, 8), zeros(1, 2, 5, 8), zeros(1, 2, 5, 8), None),
        (zeros(1, 4, 1, 8), zeros(1, 0, 5, 8), zeros(1, 0, 5, 8), None),
        (zeros(1, 4, 1, 8), zeros(1, 2, 5, 8), zeros(1, 2, 5, 8), Visibility(positions(1, 2), positions(1, 1, 5))),
        (zeros(1, 4, 1, 8), zeros(1, 2, 5, 8), zeros(1, 2, 5, 8), Visibility(positions(1, 1), positions(1, 4, 5))),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility | None
) -> None:
    with pytest.raises(InputError, match=r"attend_run needs q \[B, Hq, Tq, Dk\].* got \["):
        attend_run(q, k, v, scale=1.0, visible=visible)
