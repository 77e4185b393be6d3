"""Attention over encoded blocks is attention over what they decode to; frames that are not named are never read."""

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.encoded_attention import attend_encoded, blocked, reference
from kvtier.kernels.encoded_attention.formats import BitPlanes, BlockFormat, Fp8, Int8, KiviKeys, KiviValues, Kv4
from kvtier.kernels.gather_attention import blocked as gather_blocked
from kvtier.kernels.gather_attention import reference as dense
from kvtier.kernels.merge_partials import merge_partials
from kvtier.testing.attention_problems import assert_near
from kvtier.testing.encoded_problems import EncodedProblem
from kvtier.types import Visibility

CPU = torch.device("cpu")
SCALE = 0.2
LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def formats(slots: int, dims: tuple[int, int]) -> dict[str, tuple[BlockFormat, BlockFormat]]:
    keys, values = {"slots": slots, "dim": dims[0]}, {"slots": slots, "dim": dims[1]}
    return {
        "kivi 4": (KiviKeys(**keys, group=16), KiviValues(**values, group=8)),
        "kivi 2": (KiviKeys(**keys, bits=2, group=8), KiviValues(**values, bits=2, group=8)),
        "kv4": (Kv4(**keys), Kv4(**values)),
        "int8": (Int8(**keys), Int8(**values)),
        "fp8": (Fp8(**keys), Fp8(**values)),
        "planes and kv4": (BitPlanes(**keys, stored=6, planes=3), Kv4(**values)),
        "values by channel": (KiviValues(**keys, group=8), KiviKeys(**values, group=16)),
    }


def run(implementation: ModuleType | None, problem: EncodedProblem) -> None:
    options = {"scale": SCALE, "softcap": problem.softcap, "visible": problem.visible(), "lengths": problem.lengths()}
    call: Any = attend_encoded if implementation is None else implementation.attend_encoded
    got = call(*problem.tensors(), k_format=problem.k_format, v_format=problem.v_format, **options)
    if problem.dtype == torch.float64:
        expected = problem.expected(SCALE)
        torch.testing.assert_close(got.out, expected.out, rtol=0, atol=1e-11)
        torch.testing.assert_close(got.lse, expected.lse, rtol=0, atol=1e-11)
    else:
        assert_near(got, problem.expected(SCALE))


@pytest.mark.parametrize("implementation", [blocked, reference], ids=["blocked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", formats(16, (16, 16)))
@pytest.mark.parametrize(
    ("sizes", "slots", "dims"),
    [((1, 1, 1, 1, 1), 16, (8, 16)), ((2, 2, 4, 1, 5), 32, (64, 32)), ((1, 3, 1, 30, 3), 16, (24, 40))],
    ids=str,
)
def test_every_format(
    implementation: ModuleType,
    dtype: torch.dtype,
    pair: str,
    sizes: tuple[int, int, int, int, int],
    slots: int,
    dims: tuple[int, int],
) -> None:
    k_format, v_format = formats(slots, dims)[pair]
    run(
        implementation,
        EncodedProblem(sizes=sizes, k_format=k_format, v_format=v_format, dtype=dtype, device=CPU),
    )


def test_the_reference_is_a_softmax_over_decoded_keys() -> None:
    k_format, v_format = formats(16, (16, 24))["kivi 4"]
    problem = EncodedProblem(
        sizes=(2, 2, 2, 3, 4), k_format=k_format, v_format=v_format, dtype=torch.float64, device=CPU, ragged=True
    )
    q, k_arena, v_arena, frames = problem.tensors()
    seen = problem.visible()
    assert seen is not None
    expected = problem.expected(SCALE)
    for b, h in [(0, 0), (0, 3), (1, 2)]:
        k, v = (
            torch.cat([layout.decode(arena[frame], dtype=torch.float64) for frame in frames[b, h // 2]])
            for layout, arena in ((k_format, k_arena), (v_format, v_arena))
        )
        logits = (q[b, h] @ k.T * SCALE).masked_fill(seen.k_pos[b, h // 2] > seen.q_pos[b, :, None], -torch.inf)
        torch.testing.assert_close(expected.lse[b, h], logits.logsumexp(-1))
        torch.testing.assert_close(expected.out[b, h], logits.softmax(-1).nan_to_num() @ v)


@st.composite
def problems(draw: st.DrawFn, *, even: bool = False) -> EncodedProblem:
    dims = (draw(st.sampled_from([8, 24, 64])), draw(st.sampled_from([8, 24])))
    k_format, v_format = formats(draw(st.sampled_from([16, 32])), dims)[
        draw(st.sampled_from(list(formats(16, (8, 8)))))
    ]
    return EncodedProblem(
        sizes=tuple(draw(st.integers(low, high)) for low, high in ((1, 2), (1, 3), (1, 4), (1, 20), (1, 6))),  # type: ignore[arg-type]
        k_format=k_format,
        v_format=v_format,
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        device=CPU,
        seed=draw(st.integers(0, 2**20)),
        ragged=draw(st.booleans()),
        uneven=not even and draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 60)),
        softcap=draw(st.none() | st.just(2.0)),
    )


@given(problems(), st.booleans())
def test_any_problem_in_blocks(problem: EncodedProblem, tiny: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if tiny:
            patch.setattr(gather_blocked, "CACHE_BYTES", 4096)
            patch.setattr(gather_blocked, "BLOCK", 16)
            patch.setattr(gather_blocked, "FUSED_ROWS", 16)
        run(blocked, problem)


@given(problems(even=True), st.data())
def test_any_order_and_any_split_of_the_blocks_merges_to_the_whole(
    problem: EncodedProblem, data: st.DataObject
) -> None:
    q, k_arena, v_arena, frames = problem.tensors()
    slots, count = problem.k_format.slots, frames.shape[2]
    order = torch.tensor(data.draw(st.permutations(range(count))))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    visible = problem.visible()
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
        chosen = order[start:stop]
        seen = None
        if visible is not None:
            k_pos = visible.k_pos.unflatten(2, (count, slots))[:, :, chosen].flatten(2)
            seen = Visibility(visible.q_pos, k_pos, visible.window)
        parts.append(
            attend_encoded(
                q,
                k_arena,
                v_arena,
                frames[:, :, chosen],
                k_format=problem.k_format,
                v_format=problem.v_format,
                scale=SCALE,
                softcap=problem.softcap,
                visible=seen,
            )
        )
    merged, expected = merge_partials(data.draw(st.permutations(parts))), problem.expected(SCALE)
    torch.testing.assert_close(merged.out.double(), expected.out, rtol=0, atol=LIMITS[problem.dtype])
    torch.testing.assert_close(merged.lse.double(), expected.lse, rtol=0, atol=LIMITS[problem.dtype])


def test_a_good_format_is_near_the_raw_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, count, 64, generator=generator) for heads, count in ((4, 1), (2, 128), (2, 128)))
    raw = dense.attend_run(q, k, v, scale=0.125, softcap=None, visible=None)
    limits = {"int8": 0.01, "fp8": 0.05, "kivi 4": 0.1, "kv4": 0.1}
    for name, limit in limits.items():
        k_format, v_format = formats(32, (64, 64))[name]
        arenas = [layout.encode(run.view(2, 4, 32, 64)).flatten(0, 1) for layout, run in ((k_format, k), (v_format, v))]
        frames = torch.arange(8).view(1, 2, 4)
        got = attend_encoded(q, arenas[0], arenas[1], frames, k_format=k_format, v_format=v_format, scale=0.125)
        assert float((got.out - raw.out).abs().max()) < limit, name


def test_no_blocks_and_no_queries() -> None:
    k_format, v_format = formats(16, (8, 16))["kv4"]
    problem = EncodedProblem(
        sizes=(1, 2, 2, 3, 2), k_format=k_format, v_format=v_format, dtype=torch.float32, device=CPU
    )
    q, k_arena, v_arena, frames = problem.tensors()
    options: Any = {"k_format": k_format, "v_format": v_format, "scale": 1.0}
    nothing = attend_encoded(q, k_arena, v_arena, frames[:, :, :0], **options)
    assert not nothing.out.any()
    assert nothing.lse.isneginf().all()
    assert attend_encoded(q[:, :, :0], k_arena, v_arena, frames, **options).out.shape == (1, 4, 0, 16)


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "v_shape", "frames_shape", "keys"),
    [
        ((4, 1, 16), (9, 192), (9, 192), (1, 2, 3), None),
        ((1, 4, 1, 8), (9, 192), (9, 192), (1, 2, 3), None),
        ((1, 4, 1, 16), (9, 191), (9, 192), (1, 2, 3), None),
        ((1, 4, 1, 16), (9, 192), (8, 192), (1, 2, 3), None),
        ((1, 4, 1, 16), (9, 192), (9, 192), (2, 2, 3), None),
        ((1, 4, 1, 16), (9, 192), (9, 192), (1, 3, 3), None),
        ((1, 4, 1, 16), (9, 192), (9, 192), (1, 2, 3), 3),
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
    arenas = [torch.zeros(shape, dtype=torch.uint8) for shape in (k_shape, v_shape)]
    with pytest.raises(InputError, match=r"attend_encoded needs q \[B, Hq, Tq, 16\].* got \["):
        attend_encoded(
            torch.zeros(q_shape),
            arenas[0],
            arenas[1],
            torch.zeros(frames_shape, dtype=torch.int64),
            k_format=Kv4(slots=16, dim=16),
            v_format=Kv4(slots=16, dim=16),
            scale=1.0,
            visible=visible,
        )


@pytest.mark.parametrize(
    "lengths",
    [torch.tensor([[1, 17]]), torch.tensor([[-1, 16]]), torch.tensor([16, 16])],
    ids=["more", "less", "shape"],
)
def test_other_lengths_are_refused(lengths: torch.Tensor) -> None:
    layout = Kv4(slots=16, dim=16)
    problem = EncodedProblem(sizes=(1, 2, 2, 1, 1), k_format=layout, v_format=layout, dtype=torch.float32, device=CPU)
    with pytest.raises(InputError, match="lengths must"):
        attend_encoded(*problem.tensors(), k_format=layout, v_format=layout, scale=1.0, lengths=lengths)


def test_frames_between_two_multiples_of_16_bytes_are_refused() -> None:
    layout = Kv4(slots=16, dim=16)
    arena = torch.zeros(9, 200, dtype=torch.uint8)
    frames = torch.zeros(1, 1, 1, dtype=torch.int64)
    with pytest.raises(InputError, match="frames at multiples of 16 bytes"):
        attend_encoded(
            torch.zeros(1, 1, 1, 16),
            arena[:, :192],
            arena[:, :192],
            frames,
            k_format=layout,
            v_format=layout,
            scale=1.0,
        )
