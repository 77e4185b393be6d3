"""Attention in Triton, over pages and runs, against the reference in fp64."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.gather_attention import triton as kernel
from kvtier.kernels.gather_attention.extras import Extras
from kvtier.kernels.gather_attention.plan import plan
from kvtier.kernels.gather_attention.table import SPLITS
from kvtier.kernels.tiles import DEBUG_VARIABLE
from kvtier.testing.attention_problems import Problem, assert_near
from kvtier.types import Visibility

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALE = 0.3
SMALL_SPLITS = SPLITS._replace(least_keys=40)


def options_of(problem: Problem) -> dict[str, Any]:
    return {"scale": SCALE, "softcap": problem.softcap, "visible": problem.visible(), "extras": problem.extras()}


def over_pages(problem: Problem) -> None:
    assert_near(kernel.attend_pages(*problem.tensors(), **options_of(problem)), problem.expected(SCALE))


def over_run(problem: Problem) -> None:
    q, k_arena, v_arena, frames = problem.tensors()
    absent = (frames < 0)[..., None, None]
    k, v = (arena[frames.clamp_min(0)].masked_fill(absent, torch.nan).flatten(2, 3) for arena in (k_arena, v_arena))
    assert_near(kernel.attend_run(q, k, v, **options_of(problem)), problem.expected(SCALE))


@pytest.mark.parametrize("attend", [over_pages, over_run])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "dims"),
    [
        ((1, 1, 1, 1, 1, 1), (8, 8)),
        ((2, 2, 4, 1, 9, 16), (64, 64)),
        ((1, 3, 2, 1, 13, 7), (40, 24)),
        ((1, 2, 7, 3, 5, 16), (24, 40)),
    ],
    ids=str,
)
def test_decode(
    attend: object, dtype: torch.dtype, sizes: tuple[int, ...], dims: tuple[int, int], device: torch.device
) -> None:
    attend(Problem(sizes=sizes, dims=dims, dtype=dtype, device=device))  # type: ignore[operator, arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_long_prompts_skip_and_mask(
    dtype: torch.dtype, window: int | None, softcap: float | None, device: torch.device
) -> None:
    sizes = (2, 2, 2, 45, 9, 16)
    over_run(
        Problem(
            sizes=sizes, dims=(16, 24), dtype=dtype, device=device, ragged=True, window=window, softcap=softcap, seed=3
        )
    )


# NumPy, which the interpreter computes with, tells of what the kernel itself notices.
overflows = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")


@overflows
@settings(max_examples=12)
@given(st.data())
def test_any_split_of_any_problem(device: torch.device, data: st.DataObject) -> None:
    bounds = ((1, 2), (1, 3), (1, 4), (1, 20), (1, 12), (1, 17))
    problem = Problem(
        sizes=tuple(data.draw(st.integers(low, high)) for low, high in bounds),  # type: ignore[arg-type]
        dims=(data.draw(st.sampled_from([8, 24])), data.draw(st.sampled_from([8, 24]))),
        dtype=data.draw(st.sampled_from(DTYPES)),
        device=device,
        seed=data.draw(st.integers(0, 2**20)),
        ragged=data.draw(st.booleans()),
        window=data.draw(st.none() | st.integers(1, 60)),
        softcap=data.draw(st.none() | st.just(2.0)),
        bias=data.draw(st.sampled_from([None, "kv", "query"])),
        uneven=data.draw(st.booleans()),
        drafts=data.draw(st.sampled_from([0, 1])),
        unified_max=data.draw(st.sampled_from([None, 0.0, 3.0, -300.0, 300.0])),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "SPLITS", SMALL_SPLITS)
        patch.setattr(kernel, "processors", lambda _: data.draw(st.sampled_from([1, 8, 64]), label="processors"))
        over_pages(problem)


@pytest.mark.parametrize("attend", [over_pages, over_run])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", ["kv", "query"])
def test_bias_ragged_heads_and_a_tree(
    attend: Callable[[Problem], None], dtype: torch.dtype, bias: Literal["kv", "query"], device: torch.device
) -> None:
    sizes = (2, 3, 2, 5, 9, 16)
    attend(Problem(sizes=sizes, dims=(24, 8), dtype=dtype, device=device, bias=bias, uneven=True, drafts=64, seed=1))


@overflows
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unified_max", [0.0, 4, -200.0, 200.0, float("nan")])
def test_a_number_in_place_of_the_greatest_logit(
    dtype: torch.dtype, unified_max: float, many_splits: None, device: torch.device
) -> None:
    sizes = (1, 2, 4, 2, 12, 16)
    over_pages(Problem(sizes=sizes, dims=(16, 16), dtype=dtype, device=device, unified_max=unified_max))


def test_splits_change_nothing(many_splits: None, device: torch.device) -> None:
    problem = Problem(sizes=(1, 2, 4, 1, 30, 16), dims=(16, 16), dtype=torch.float32, device=device)
    cut = plan(heads=2, rows=4, keys=480, dim=16, element_bytes=4, processors=64, splits=SMALL_SPLITS)
    assert cut.splits > 5, "the fixture must cut this problem into splits"
    over_pages(problem)


def test_layers_of_one_step_share_a_plan(many_splits: None, device: torch.device) -> None:
    problem = Problem(sizes=(1, 2, 4, 1, 31, 16), dims=(16, 16), dtype=torch.float32, device=device)
    tensors = problem.tensors()
    before = plan.cache_info()
    for _ in range(3):
        kernel.attend_pages(*tensors, scale=SCALE, softcap=None, visible=None)
    after = plan.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)


def test_fp64_goes_to_torch(device: torch.device) -> None:
    q, k_arena, v_arena, frames = Problem(
        sizes=(1, 2, 2, 1, 3, 4), dims=(8, 8), dtype=torch.float64, device=device
    ).tensors()
    assert kernel.attend_pages(q, k_arena, v_arena, frames, scale=1.0, softcap=None, visible=None).out.dtype == (
        torch.float64
    )


def test_queries_of_another_type_than_the_keys(device: torch.device) -> None:
    problem = Problem(sizes=(1, 2, 2, 1, 3, 4), dims=(8, 8), dtype=torch.bfloat16, device=device)
    q, k_arena, v_arena, frames = problem.tensors()
    got = kernel.attend_pages(q.float(), k_arena, v_arena, frames, scale=SCALE, softcap=None, visible=None)
    assert_near(got, problem.expected(SCALE))


def test_no_keys_and_no_queries(device: torch.device) -> None:
    q, k_arena, v_arena, frames = Problem(
        sizes=(1, 2, 2, 3, 2, 4), dims=(8, 16), dtype=torch.float32, device=device
    ).tensors()
    nothing = kernel.attend_pages(q, k_arena, v_arena, frames[:, :, :0], scale=1.0, softcap=None, visible=None)
    assert not nothing.out.any()
    assert nothing.lse.isneginf().all()
    nobody = kernel.attend_pages(q[:, :, :0], k_arena, v_arena, frames, scale=1.0, softcap=None, visible=None)
    assert nobody.out.shape == (1, 4, 0, 16)


def test_keys_whose_channels_are_apart(device: torch.device) -> None:
    q = torch.randn(1, 2, 1, 8, device=device)
    k, v = (torch.randn(1, 2, 8, 20, device=device).mT for _ in range(2))
    got = kernel.attend_run(q, k, v, scale=1.0, softcap=None, visible=None)
    expected = kernel.attend_run(q, k.contiguous(), v.contiguous(), scale=1.0, softcap=None, visible=None)
    assert got.out.equal(expected.out)


@pytest.mark.parametrize("wrong", [-1, 100])
def test_debug_mode_names_frames_out_of_range(
    wrong: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    q, k_arena, v_arena, frames = Problem(
        sizes=(1, 2, 2, 1, 3, 4), dims=(8, 8), dtype=torch.float32, device=device
    ).tensors()
    frames[0, 1, 2] = wrong
    with pytest.raises(InputError, match=r"frames must lie in \[0, 13\)"):
        kernel.attend_pages(q, k_arena, v_arena, frames, scale=1.0, softcap=None, visible=None)


def test_debug_mode_looks_only_at_frames_that_are_read(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    problem = Problem(sizes=(1, 2, 2, 1, 5, 4), dims=(8, 8), dtype=torch.float32, device=device, uneven=True)
    over_pages(problem)
    q, k_arena, v_arena, frames = problem.tensors()
    extras = Extras(lengths=torch.tensor([[3, 21]], device=device))
    with pytest.raises(InputError, match=r"lengths must lie in \[0, 21\), got 3 to 21"):
        kernel.attend_pages(q, k_arena, v_arena, frames, scale=1.0, softcap=None, visible=None, extras=extras)


@pytest.mark.parametrize("queries", [1, 20])
def test_nothing_is_read_past_a_page(queries: int, device: torch.device) -> None:
    problem = Problem(sizes=(1, 2, 2, queries, 9, 7), dims=(24, 8), dtype=torch.float16, device=device)
    q, *arenas, frames = problem.tensors()
    rooms = [torch.full((len(a), 7 + 3, a.shape[2] + 5), torch.nan, dtype=a.dtype, device=device) for a in arenas]
    views = [room[:, 1:8, 2:-3].copy_(arena) for room, arena in zip(rooms, arenas, strict=True)]
    got = kernel.attend_pages(q, *views, frames, scale=SCALE, softcap=None, visible=None)
    assert_near(got, problem.expected(SCALE))


@pytest.mark.parametrize("how", ["bias", "lengths"])
def test_masked_heads_contribute_nothing(how: str, many_splits: None, device: torch.device) -> None:
    problem = Problem(sizes=(1, 3, 2, 1, 12, 16), dims=(8, 8), dtype=torch.float32, device=device)
    masked = torch.tensor([[True, False, True]], device=device)
    bias = torch.zeros(1, 3, 192, device=device).masked_fill(masked.unsqueeze(-1), -torch.inf)
    extras = Extras(bias) if how == "bias" else Extras(lengths=torch.where(masked, 0, 192))
    got = kernel.attend_pages(*problem.tensors(), scale=SCALE, softcap=None, visible=None, extras=extras)
    expected = problem.expected(SCALE)
    blind = masked.cpu().repeat_interleave(2, 1)
    expected.out[blind], expected.lse[blind] = 0.0, -torch.inf
    assert_near(got, expected)


def test_a_softcap_far_beyond_the_logits(device: torch.device) -> None:
    problem = Problem(sizes=(1, 1, 1, 1, 4, 8), dims=(8, 8), dtype=torch.float32, device=device, softcap=50.0)
    over_pages(problem)


@given(
    st.integers(1, 64), st.integers(1, 300), st.integers(1, 200_000), st.sampled_from([64, 128]), st.integers(1, 200)
)
def test_splits_cover_the_keys_exactly(heads: int, rows: int, keys: int, dim: int, processors: int) -> None:
    cut = plan(heads=heads, rows=rows, keys=keys, dim=dim, element_bytes=2, processors=processors, splits=SPLITS)
    assert (cut.splits - 1) * cut.split_keys < keys <= cut.splits * cut.split_keys
    assert cut.splits == 1 or cut.split_keys % cut.tile.keys == 0


def test_visibility_of_one_head_serves_all(device: torch.device) -> None:
    problem = Problem(sizes=(1, 2, 2, 2, 3, 8), dims=(8, 8), dtype=torch.float32, device=device)
    q, k_arena, v_arena, frames = problem.tensors()
    q_pos, k_pos = torch.tensor([[10, 11]], device=device), torch.arange(24, device=device)[None, None]
    one = kernel.attend_pages(
        q, k_arena, v_arena, frames, scale=1.0, softcap=None, visible=Visibility(q_pos, k_pos, None)
    )
    both = kernel.attend_pages(
        q, k_arena, v_arena, frames, scale=1.0, softcap=None, visible=Visibility(q_pos, k_pos.expand(1, 2, 24), None)
    )
    assert one.out.equal(both.out)
