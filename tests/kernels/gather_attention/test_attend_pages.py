"""Attention over pages is attention over the run that they make; frames that are not named are never read."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.gather_attention import attend_pages, blocked, reference
from kvtier.kernels.merge_partials import merge_partials
from kvtier.types import Partial, Visibility

Oracle = Callable[..., Partial]
Check = Callable[[Partial, Partial, torch.dtype], None]


class Paged:
    """Queries, arenas whose unused frames are NaN, frames, and the run that they stand for."""

    def __init__(
        self, shape: tuple[int, int, int, int, int, int], dims: tuple[int, int], dtype: torch.dtype, seed: int = 0
    ) -> None:
        batch, kv_heads, group, queries, pages, slots = shape
        generator = torch.Generator().manual_seed(seed)
        total = batch * kv_heads * pages
        self.q = torch.randn(batch, kv_heads * group, queries, dims[0], generator=generator).to(dtype)
        self.frames = torch.randperm(2 * total, generator=generator)[:total].view(batch, kv_heads, pages)
        self.k_arena, self.v_arena = (torch.full((2 * total, slots, dim), torch.nan, dtype=dtype) for dim in dims)
        for arena in (self.k_arena, self.v_arena):
            used = torch.randn(total, *arena.shape[1:], generator=generator).to(dtype)
            arena[self.frames.flatten()] = used
        self.k, self.v = (arena[self.frames].flatten(2, 3) for arena in (self.k_arena, self.v_arena))
        self.dtype = dtype

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k_arena, self.v_arena, self.frames


@pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((1, 1, 1, 1, 1, 1), (8, 8)),
        ((2, 2, 4, 1, 5, 16), (64, 64)),
        ((1, 2, 4, 1, 140, 16), (64, 32)),
        ((1, 2, 2, 90, 21, 16), (32, 32)),
        ((2, 3, 1, 40, 13, 7), (24, 24)),
    ],
    ids=str,
)
def test_pages_are_the_run_that_they_make(
    implementation: ModuleType,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int, int],
    dims: tuple[int, int],
    oracle: Oracle,
    check: Check,
) -> None:
    paged = Paged(shape, dims, dtype)
    got = implementation.attend_pages(*paged.arguments(), scale=0.2, softcap=None, visible=None)
    check(got, oracle(paged.q, paged.k, paged.v, scale=0.2), dtype)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Paged, dict[str, object]]:
    sizes = ((1, 2), (1, 3), (1, 4), (1, 12), (1, 9), (1, 6))
    shape = tuple(draw(st.integers(low, high)) for low, high in sizes)
    dims = (draw(st.sampled_from([8, 24])), draw(st.sampled_from([8, 24])))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    seed = draw(st.integers(0, 2**20))
    paged = Paged(shape, dims, dtype, seed)  # type: ignore[arg-type]
    visible = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        heads = draw(st.sampled_from([1, shape[1]]))
        k_pos = torch.randint(0, 40, (shape[0], heads, shape[4] * shape[5]), generator=generator)
        q_pos = torch.randint(0, 40, (shape[0], 1), generator=generator) + torch.arange(shape[3])
        visible = Visibility(q_pos, k_pos, draw(st.none() | st.integers(1, 25)))
    return paged, {"scale": 0.4, "softcap": draw(st.none() | st.just(2.0)), "visible": visible}


@given(cases())
def test_any_problem_in_blocks(
    engine: str, oracle: Oracle, check: Check, case: tuple[Paged, dict[str, object]]
) -> None:
    paged, options = case
    got = blocked.attend_pages(*paged.arguments(), **options)  # type: ignore[arg-type]
    check(got, oracle(paged.q, paged.k, paged.v, **options), paged.dtype)


@given(cases())
def test_any_problem_in_the_reference(oracle: Oracle, check: Check, case: tuple[Paged, dict[str, object]]) -> None:
    paged, options = case
    got = reference.attend_pages(*paged.arguments(), **options)  # type: ignore[arg-type]
    check(got, oracle(paged.q, paged.k, paged.v, **options), paged.dtype)


@given(cases(), st.data())
def test_any_split_of_the_pages_merges_to_the_whole(
    tiny_blocks: None, oracle: Oracle, check: Check, case: tuple[Paged, dict[str, object]], data: st.DataObject
) -> None:
    paged, options = case
    slots, count = paged.k_arena.shape[1], paged.frames.shape[2]
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    visible = options.pop("visible")
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
        seen = None
        if isinstance(visible, Visibility):
            seen = visible._replace(k_pos=visible.k_pos[..., start * slots : stop * slots])
        frames = paged.frames[:, :, start:stop]
        parts.append(attend_pages(paged.q, paged.k_arena, paged.v_arena, frames, **options, visible=seen))  # type: ignore[arg-type]
    merged = merge_partials(data.draw(st.permutations(parts)))
    check(merged, oracle(paged.q, paged.k, paged.v, **options, visible=visible), paged.dtype)


@pytest.mark.parametrize("window", [None, 40])
def test_positions_that_hide_nothing_change_nothing(window: int | None) -> None:
    paged = Paged((1, 2, 2, 1, 5, 4), (16, 16), torch.float32)
    visible = Visibility(torch.tensor([[30]]), torch.arange(20)[None, None], window)
    with_positions = attend_pages(*paged.arguments(), scale=1.0, visible=visible)
    without = attend_pages(*paged.arguments(), scale=1.0)
    assert with_positions.out.equal(without.out)
    assert with_positions.lse.equal(without.lse)


def test_a_frame_may_serve_several_heads(oracle: Oracle, check: Check) -> None:
    paged = Paged((1, 2, 2, 1, 3, 4), (16, 16), torch.float32)
    frames = paged.frames[:, :1].expand(1, 2, 3)
    got = attend_pages(paged.q, paged.k_arena, paged.v_arena, frames, scale=1.0)
    k, v = paged.k[:, :1].expand(1, 2, -1, -1), paged.v[:, :1].expand(1, 2, -1, -1)
    check(got, oracle(paged.q, k, v, scale=1.0), torch.float32)


@pytest.mark.parametrize("queries", [1, 30])
def test_arenas_may_be_strided_views(queries: int, oracle: Oracle, check: Check) -> None:
    paged = Paged((1, 2, 2, queries, 90, 16), (16, 16), torch.float32)
    both = torch.stack([paged.k_arena, paged.v_arena], dim=2)
    got = attend_pages(paged.q, both[:, :, 0], both[:, :, 1], paged.frames, scale=1.0)
    check(got, oracle(paged.q, paged.k, paged.v, scale=1.0), torch.float32)


def test_no_pages(oracle: Oracle, check: Check) -> None:
    paged = Paged((1, 2, 2, 3, 4, 4), (16, 8), torch.float32)
    got = attend_pages(paged.q, paged.k_arena, paged.v_arena, paged.frames[:, :, :0], scale=1.0)
    check(got, oracle(paged.q, paged.k[:, :, :0], paged.v[:, :, :0], scale=1.0), torch.float32)


def test_a_frame_beyond_the_arena_is_refused() -> None:
    paged = Paged((1, 2, 2, 1, 4, 4), (16, 16), torch.float32)
    with pytest.raises((IndexError, InputError)):
        attend_pages(paged.q, paged.k_arena, paged.v_arena, paged.frames + len(paged.k_arena), scale=1.0)


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "v_shape", "frames_shape", "keys"),
    [
        ((4, 1, 8), (9, 4, 8), (9, 4, 8), (1, 2, 3), None),
        ((1, 4, 1, 8), (9, 4, 7), (9, 4, 8), (1, 2, 3), None),
        ((1, 4, 1, 8), (9, 4, 8), (9, 5, 8), (1, 2, 3), None),
        ((1, 4, 1, 8), (9, 4, 8), (9, 4, 8), (2, 2, 3), None),
        ((1, 4, 1, 8), (9, 4, 8), (9, 4, 8), (1, 3, 3), None),
        ((1, 4, 1, 8), (9, 4, 8), (9, 4, 8), (1, 2, 3), 3),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    frames_shape: tuple[int, ...],
    keys: int | None,
) -> None:
    visible = None
    if keys is not None:
        visible = Visibility(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, keys, dtype=torch.int64))
    frames = torch.zeros(frames_shape, dtype=torch.int64)
    with pytest.raises(InputError, match=r"attend_pages needs q \[B, Hq, Tq, Dk\].* got \["):
        attend_pages(
            torch.zeros(q_shape), torch.zeros(k_shape), torch.zeros(v_shape), frames, scale=1.0, visible=visible
        )
