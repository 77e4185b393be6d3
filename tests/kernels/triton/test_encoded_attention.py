"""Attention over encoded blocks in Triton, against the reference in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import InputError
from kvtier.kernels.encoded_attention import triton as kernel
from kvtier.kernels.encoded_attention.formats import BitPlanes, BlockFormat, Fp8, Int8, KiviKeys, KiviValues, Kv4
from kvtier.kernels.encoded_attention.side import Side, cut_blocks
from kvtier.kernels.gather_attention.table import SPLITS
from kvtier.kernels.tiles import DEBUG_VARIABLE
from kvtier.testing.attention_problems import assert_near
from kvtier.testing.encoded_problems import EncodedProblem

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALE = 0.1


def pairs(slots: int, dims: tuple[int, int]) -> dict[str, tuple[BlockFormat, BlockFormat]]:
    """Of 64 and of 80 channels: whole tiles, and tiles with columns beyond the last."""
    keys, values = {"slots": slots, "dim": dims[0]}, {"slots": slots, "dim": dims[1]}
    return {
        "kivi 4": (KiviKeys(**keys, group=16), KiviValues(**values, group=dims[1] // 2)),
        "kivi 2": (KiviKeys(**keys, bits=2, group=16), KiviValues(**values, bits=2, group=dims[1])),
        "kv4": (Kv4(**keys), Kv4(**values)),
        "int8": (Int8(**keys), Int8(**values)),
        "fp8": (Fp8(**keys), Fp8(**values)),
        "planes": (BitPlanes(**keys, stored=6, planes=3), BitPlanes(**values)),
        "values by channel": (KiviValues(**keys, group=dims[0] // 2), KiviKeys(**values, group=16)),
    }


def attend(problem: EncodedProblem) -> None:
    sides = Side.of(problem.k_format), Side.of(problem.v_format)
    assert None not in sides, "the kernel, not torch, must be what is tested"
    got = kernel.attend_encoded(
        *problem.tensors(),
        k_format=problem.k_format,
        v_format=problem.v_format,
        scale=SCALE,
        softcap=problem.softcap,
        visible=problem.visible(),
        lengths=problem.lengths(),
    )
    assert_near(got, problem.expected(SCALE))


@pytest.mark.parametrize("pair", pairs(16, (64, 64)))
@pytest.mark.parametrize(
    ("dtype", "sizes", "slots", "dims"),
    [
        (torch.bfloat16, (1, 2, 3, 1, 2), 32, (64, 64)),
        (torch.float16, (2, 1, 1, 2, 1), 16, (64, 32)),
        (torch.float32, (1, 1, 2, 1, 3), 16, (32, 64)),
    ],
    ids=str,
)
def test_every_format(
    pair: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int],
    slots: int,
    dims: tuple[int, int],
    device: torch.device,
) -> None:
    k_format, v_format = pairs(slots, dims)[pair]
    attend(EncodedProblem(sizes=sizes, k_format=k_format, v_format=v_format, dtype=dtype, device=device))


@settings(max_examples=10)
@given(st.data())
def test_any_split_of_any_problem(device: torch.device, data: st.DataObject) -> None:
    bounds = ((1, 2), (1, 2), (1, 3), (1, 12), (1, 5))
    dims = (data.draw(st.sampled_from([32, 64, 80])), data.draw(st.sampled_from([32, 64])))
    names = sorted(pairs(16, (64, 64)))
    k_format, v_format = (pairs(16, dims)[data.draw(st.sampled_from(names))][side] for side in (0, 1))
    if Side.of(k_format) is None or Side.of(v_format) is None:
        k_format, v_format = Kv4(slots=16, dim=dims[0]), Kv4(slots=16, dim=dims[1])
    problem = EncodedProblem(
        sizes=tuple(data.draw(st.integers(low, high)) for low, high in bounds),  # type: ignore[arg-type]
        k_format=k_format,
        v_format=v_format,
        dtype=data.draw(st.sampled_from(DTYPES)),
        device=device,
        seed=data.draw(st.integers(0, 2**20)),
        ragged=data.draw(st.booleans()),
        uneven=data.draw(st.booleans()),
        window=data.draw(st.none() | st.integers(1, 60)),
        softcap=data.draw(st.none() | st.just(2.0)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "SPLITS", SPLITS._replace(least_keys=20))
        patch.setattr(kernel, "processors", lambda _: data.draw(st.sampled_from([1, 64]), label="processors"))
        attend(problem)


def test_a_long_prompt(device: torch.device) -> None:
    k_format, v_format = pairs(32, (32, 32))["kivi 4"]
    attend(
        EncodedProblem(
            sizes=(1, 1, 2, 45, 3),
            k_format=k_format,
            v_format=v_format,
            dtype=torch.bfloat16,
            device=device,
            ragged=True,
            window=50,
        )
    )


def test_tiles_stay_within_a_block_and_within_a_group_of_tokens() -> None:
    def tile(k_format: BlockFormat, v_format: BlockFormat) -> int:
        sides = Side.of(k_format), Side.of(v_format)
        assert sides[0] is not None
        assert sides[1] is not None
        return cut_blocks(sides[0], sides[1], heads=8, rows=4, keys=4096, processors=132, splits=SPLITS).tile.keys

    wide, sizes = {"slots": 128, "dim": 128}, {"slots": 16, "dim": 128}
    assert tile(Int8(**wide), Int8(**wide)) == 64
    assert tile(Int8(**sizes), Int8(**sizes)) == 16
    assert tile(KiviKeys(**wide), Int8(**wide)) == 32
    assert tile(Int8(**wide), KiviKeys(**wide, group=16)) == 16


def test_what_has_no_whole_tiles_goes_to_torch(device: torch.device) -> None:
    narrow = KiviValues(slots=16, dim=32, group=8)
    assert Side.of(narrow) is None
    for layout, dtype in ((narrow, torch.float32), (Int8(slots=16, dim=32), torch.float64)):
        problem = EncodedProblem(sizes=(1, 2, 2, 1, 2), k_format=layout, v_format=layout, dtype=dtype, device=device)
        got = kernel.attend_encoded(
            *problem.tensors(), k_format=layout, v_format=layout, scale=SCALE, softcap=None, visible=None, lengths=None
        )
        torch.testing.assert_close(got.out.double().cpu(), problem.expected(SCALE).out, rtol=0, atol=1e-5)


def test_no_blocks_and_no_queries(device: torch.device) -> None:
    layout = Kv4(slots=16, dim=32)
    problem = EncodedProblem(
        sizes=(1, 2, 2, 3, 2), k_format=layout, v_format=layout, dtype=torch.float32, device=device
    )
    q, k_arena, v_arena, frames = problem.tensors()

    def attended(q: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kernel.attend_encoded(
            q,
            k_arena,
            v_arena,
            frames,
            k_format=layout,
            v_format=layout,
            scale=1.0,
            softcap=None,
            visible=None,
            lengths=None,
        )

    out, lse = attended(q, frames[:, :, :0])
    assert not out.any()
    assert lse.isneginf().all()
    assert attended(q[:, :, :0], frames)[0].shape == (1, 4, 0, 32)


@pytest.mark.parametrize("wrong", [-1, 100])
def test_debug_mode_names_frames_out_of_range(
    wrong: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    layout = Kv4(slots=16, dim=32)
    problem = EncodedProblem(
        sizes=(1, 2, 2, 1, 3), k_format=layout, v_format=layout, dtype=torch.float32, device=device
    )
    q, k_arena, v_arena, frames = problem.tensors()
    frames[0, 1, 2] = wrong
    with pytest.raises(InputError, match=r"frames must lie in \[0, 13\)"):
        kernel.attend_encoded(
            q,
            k_arena,
            v_arena,
            frames,
            k_format=layout,
            v_format=layout,
            scale=1.0,
            softcap=None,
            visible=None,
            lengths=None,
        )
