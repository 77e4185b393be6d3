"""Column sums, blocked and reference, against weights of a dense fp64 softmax."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.column_sums import blocked, column_sums, reference
from kvtier.kernels.gather_attention import attend_run
from kvtier.types import Visibility

LIMITS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}


@pytest.fixture(scope="module")
def tiny_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "TILE_ROWS", 8)
        patch.setattr(blocked, "TILE_KEYS", {"cpu": 8})
        yield


def dense(
    q: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    visible: Visibility | None = None,
) -> torch.Tensor:
    """Sums in fp64, one batch row and one query head at a time."""
    batch, heads, _, _ = q.shape
    sums = torch.zeros(batch, heads, k.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv_head = h * k.shape[1] // heads
            logits = q[b, h].double() @ k[b, kv_head].double().T * scale
            if softcap is not None:
                logits = (logits / softcap).tanh() * softcap
            weights = (logits - lse[b, h].double()[:, None]).exp()
            weights[lse[b, h].isneginf()] = 0
            if visible is not None:
                at = visible.q_pos[b][:, None]
                place = visible.k_pos[b, kv_head if visible.k_pos.shape[1] > 1 else 0][None, :]
                weights[place > at] = 0
                if visible.window is not None:
                    weights[place <= at - visible.window] = 0
            sums[b, h] = weights.sum(0)
    return sums


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=LIMITS[dtype], atol=LIMITS[dtype])


Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, object]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Queries with the lse of their attention over the keys, keys at any positions; some queries see nothing."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    queries, keys, dim = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.sampled_from([8, 24]))
    dtype = draw(st.sampled_from(list(LIMITS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    q = torch.randn(batch, kv_heads * group, queries, dim, generator=generator, dtype=torch.float64).to(dtype)
    k = torch.randn(batch, kv_heads + 1, keys, dim, generator=generator, dtype=torch.float64).to(dtype)[:, 1:]
    visible = None
    if draw(st.booleans()):
        k_pos = torch.randint(0, 50, (batch, draw(st.sampled_from([1, kv_heads])), keys), generator=generator)
        q_pos = torch.randint(0, 50, (batch, 1), generator=generator) + torch.arange(queries)
        visible = Visibility(q_pos, k_pos, draw(st.none() | st.integers(1, 30)))
    options: dict[str, object] = {"scale": 0.4, "softcap": draw(st.none() | st.just(2.0)), "visible": visible}
    return q, attend_run(q, k, k, **options).lse, k, options  # type: ignore[arg-type]


@pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
@given(cases())
def test_any_problem(tiny_tiles: None, implementation: ModuleType, case: Case) -> None:
    q, lse, k, options = case
    assert_near(implementation.column_sums(q, lse, k, **options), dense(q, lse, k, **options), q.dtype)  # type: ignore[arg-type]


@given(cases())
def test_every_query_that_sees_a_key_gives_one_in_all(tiny_tiles: None, case: Case) -> None:
    q, lse, k, options = case
    given_out = column_sums(q, lse, k, **options).double().sum(-1)  # type: ignore[arg-type]
    voters = (~lse.isneginf()).double().sum(-1)
    torch.testing.assert_close(given_out, voters, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_the_measured_tile_size(dtype: torch.dtype, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 300, 32, generator=generator).to(dtype)
    k = torch.randn(2, 2, 1300, 32, generator=generator).to(dtype)
    visible = Visibility(torch.arange(1000, 1300).expand(2, 300), torch.arange(1300).expand(2, 1, 1300))
    lse = attend_run(q, k, k, scale=0.2, softcap=softcap, visible=visible).lse
    got = column_sums(q, lse, k, scale=0.2, softcap=softcap, visible=visible)
    assert_near(got, dense(q, lse, k, scale=0.2, softcap=softcap, visible=visible), dtype)


def test_parts_of_the_keys_share_one_lse() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 9, 16, generator=generator), torch.randn(1, 2, 60, 16, generator=generator)
    lse = attend_run(q, k, k, scale=0.3).lse
    parts = [column_sums(q, lse, part, scale=0.3) for part in k.split([7, 40, 13], dim=2)]
    torch.testing.assert_close(torch.cat(parts, -1), column_sums(q, lse, k, scale=0.3), rtol=0, atol=1e-5)


def test_a_hidden_pair_counts_nothing_however_large_its_logit() -> None:
    q, k = torch.ones(1, 1, 1, 8), torch.cat([torch.zeros(1, 1, 1, 8), torch.full((1, 1, 1, 8), 1e4)], 2)
    visible = Visibility(torch.tensor([[0]]), torch.tensor([[[0, 1]]]))
    assert column_sums(q, torch.zeros(1, 1, 1), k, scale=1.0, visible=visible).tolist() == [[[1.0, 0.0]]]


@pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (3, 0)])
def test_nothing_to_sum(implementation: ModuleType, queries: int, keys: int) -> None:
    q, k = torch.zeros(1, 4, queries, 8), torch.zeros(1, 2, keys, 8)
    sums = implementation.column_sums(q, torch.zeros(1, 4, queries), k, scale=1.0, softcap=None, visible=None)
    assert sums.equal(torch.zeros(1, 4, keys))


def test_the_lse_is_not_written_to() -> None:
    lse = torch.tensor([[[0.5, -torch.inf]]])
    column_sums(torch.zeros(1, 1, 2, 8), lse, torch.zeros(1, 1, 3, 8), scale=1.0)
    assert lse.tolist() == [[[0.5, -torch.inf]]]


@pytest.mark.parametrize(
    ("q_shape", "lse_shape", "k_shape", "positions"),
    [
        ((1, 4, 3, 8), (1, 4, 2), (1, 2, 5, 8), None),
        ((1, 4, 3, 8), (1, 4, 3), (1, 2, 5, 9), None),
        ((1, 4, 3, 8), (1, 4, 3), (1, 3, 5, 8), None),
        ((1, 4, 3, 8), (1, 4, 3), (2, 2, 5, 8), None),
        ((1, 4, 3, 8), (1, 4, 3), (2, 5, 8), None),
        ((1, 4, 3, 8), (1, 4, 3), (1, 2, 5, 8), ((1, 3), (1, 1, 4))),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    q_shape: tuple[int, ...],
    lse_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    positions: tuple[tuple[int, ...], tuple[int, ...]] | None,
) -> None:
    visible = None
    if positions is not None:
        q_pos, k_pos = (torch.zeros(shape, dtype=torch.int64) for shape in positions)
        visible = Visibility(q_pos, k_pos)
    with pytest.raises(InputError, match=r"column_sums needs q \[B, Hq, Tq, Dk\].* got \["):
        column_sums(torch.zeros(q_shape), torch.zeros(lse_shape), torch.zeros(k_shape), scale=1.0, visible=visible)
