"""Laws of attention in parts: any split of the keys is the whole, in any order; what is masked counts for nothing."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.kernels.gather_attention import blocked, native, reference
from kvtier.kernels.gather_attention.extras import Extras
from kvtier.kernels.merge_partials import merge_partials
from kvtier.testing.attention_problems import Problem
from kvtier.types import Partial, Visibility

Oracle = Callable[..., Partial]
Check = Callable[[Partial, Partial, torch.dtype], None]

CPU = torch.device("cpu")
IMPLEMENTATIONS = [blocked, reference, native]


@st.composite
def dense_problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Visibility, torch.Tensor]:
    """Queries, a run of keys, their positions and a bias."""
    batch, kv_heads, group, queries, keys = (
        draw(st.integers(low, high)) for low, high in ((1, 2), (1, 3), (1, 3), (1, 4), (1, 40))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    q, k, v, bias = (
        torch.randn(batch, *size, generator=generator)
        for size in ((kv_heads * group, queries, 8), (kv_heads, keys, 8), (kv_heads, keys, 6), (kv_heads, keys))
    )
    q_pos = torch.randint(0, 50, (batch, queries), generator=generator)
    return q, k, v, Visibility(q_pos, torch.randint(0, 50, (batch, kv_heads, keys), generator=generator)), bias


def paged(run: torch.Tensor, slots: int, frames: torch.Tensor) -> torch.Tensor:
    """The run [B, Hk, N, D] in frames [B, Hk, pages] of an arena whose other slots are NaN."""
    batch, kv_heads, keys, dim = run.shape
    pages = frames.shape[2]
    padded = torch.full((batch, kv_heads, pages * slots, dim), torch.nan)
    padded[:, :, :keys] = run
    arena = torch.full((int(frames.max()) + 3, slots, dim), torch.nan)
    arena[frames] = padded.unflatten(2, (pages, slots))
    return arena


@given(dense_problems(), st.data())
def test_any_split_into_tiers_and_pages_is_the_whole(
    tiny_blocks: None,
    oracle: Oracle,
    check: Check,
    problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Visibility, torch.Tensor],
    data: st.DataObject,
) -> None:
    q, k, v, visible, bias = problem
    keys = k.shape[2]
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=keys, max_size=keys), label="tier of each key"))
    parts = []
    for tier in owner.unique().tolist():
        mine = (owner == tier).nonzero().flatten()
        mine = mine[torch.tensor(data.draw(st.permutations(range(len(mine))), label="order"))]
        seen, own_bias = visible._replace(k_pos=visible.k_pos[..., mine]), bias[..., mine]
        implementation = data.draw(st.sampled_from(IMPLEMENTATIONS))
        slots = data.draw(st.none() | st.integers(1, 5), label="slots")
        if slots is None:
            parts.append(
                implementation.attend_run(
                    q, k[:, :, mine], v[:, :, mine], scale=0.4, softcap=None, visible=seen, extras=Extras(own_bias)
                )
            )
            continue
        pages = -(-len(mine) // slots)
        frames = torch.randperm(2 * k.shape[0] * k.shape[1] * pages)[: k.shape[0] * k.shape[1] * pages]
        frames = frames.view(*k.shape[:2], pages)
        short = pages * slots - len(mine)
        seen = seen._replace(k_pos=torch.nn.functional.pad(seen.k_pos, (0, short)))
        lengths = torch.full(k.shape[:2], len(mine))
        extras = Extras(torch.nn.functional.pad(own_bias, (0, short)), lengths)
        arenas = [paged(run[:, :, mine], slots, frames) for run in (k, v)]
        parts.append(
            implementation.attend_pages(q, *arenas, frames, scale=0.4, softcap=None, visible=seen, extras=extras)
        )
    merged = merge_partials(data.draw(st.permutations(parts)))
    check(merged, oracle(q, k, v, scale=0.4, visible=visible, extras=Extras(bias)), torch.float32)


@given(st.integers(0, 2**20), st.sampled_from(IMPLEMENTATIONS), st.data())
def test_the_order_of_pages_is_irrelevant(
    tiny_blocks: None, oracle: Oracle, check: Check, seed: int, implementation: ModuleType, data: st.DataObject
) -> None:
    problem = Problem(
        sizes=(2, 2, 2, 3, 7, 4), dims=(8, 8), dtype=torch.float32, device=CPU, seed=seed, ragged=True, bias="query"
    )
    q, k_arena, v_arena, frames = problem.tensors()
    visible, bias = problem.visible(), problem.extras().bias
    assert visible is not None
    assert bias is not None
    order = torch.tensor(data.draw(st.permutations(range(7))))
    moved = visible._replace(k_pos=visible.k_pos.unflatten(2, (7, 4))[:, :, order].flatten(2))
    moved_bias = bias.unflatten(2, (7, 4))[:, :, order].flatten(2)
    got = implementation.attend_pages(
        q, k_arena, v_arena, frames[:, :, order], scale=0.4, softcap=None, visible=moved, extras=Extras(moved_bias)
    )
    check(got, problem.expected(0.4), torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["blocked", "reference", "native"])
@pytest.mark.parametrize("how", ["bias", "lengths"])
def test_masked_heads_contribute_nothing(implementation: ModuleType, how: str) -> None:
    problem = Problem(sizes=(2, 3, 2, 2, 5, 4), dims=(8, 8), dtype=torch.float32, device=CPU)
    tensors, plain = problem.tensors(), {"scale": 0.4, "softcap": None, "visible": None}
    whole = implementation.attend_pages(*tensors, **plain)
    masked = torch.tensor([[True, False, True], [False, True, False]])
    if how == "bias":
        extras = Extras(torch.zeros(2, 3, 20).masked_fill(masked.unsqueeze(-1), -torch.inf))
    else:
        extras = Extras(lengths=torch.where(masked, 0, 20))
    got = implementation.attend_pages(*tensors, **plain, extras=extras)
    blind = masked.repeat_interleave(2, 1)
    assert not got.out[blind].any()
    assert got.lse[blind].isneginf().all()
    torch.testing.assert_close(got.out[~blind], whole.out[~blind])
    torch.testing.assert_close(got.lse[~blind], whole.lse[~blind])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["blocked", "reference", "native"])
@pytest.mark.parametrize("queries", [1, 30])
def test_nothing_is_read_past_a_page(implementation: ModuleType, queries: int, check: Check) -> None:
    problem = Problem(sizes=(1, 2, 2, queries, 90, 16), dims=(16, 16), dtype=torch.float32, device=CPU)
    q, k_arena, v_arena, frames = problem.tensors()
    rooms = [torch.full((len(k_arena), 16 + 3, 16 + 5), torch.nan) for _ in range(2)]
    views = [room[:, 1:17, 2:18].copy_(arena) for room, arena in zip(rooms, (k_arena, v_arena), strict=True)]
    got = implementation.attend_pages(q, *views, frames, scale=0.4, softcap=None, visible=None)
    check(got, problem.expected(0.4), torch.float32)
