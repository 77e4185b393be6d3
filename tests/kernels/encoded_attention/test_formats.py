"""Bytes of encoded blocks against loops over single elements; what comes back is within half a step."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError, InputError
from kvtier.kernels.encoded_attention.formats import (
    BitPlanes,
    BlockFormat,
    Fp8,
    Int8,
    KiviKeys,
    KiviValues,
    Kv4,
)

SIZES = {"slots": 16, "dim": 32}
FORMATS = [
    KiviKeys(**SIZES, bits=2, group=8),
    KiviKeys(**SIZES, bits=4, group=16),
    KiviValues(**SIZES, bits=2, group=16),
    KiviValues(**SIZES, bits=4, group=32),
    KiviValues(**SIZES, bits=8, group=16),
    Kv4(**SIZES),
    Int8(**SIZES),
    Fp8(**SIZES),
    BitPlanes(**SIZES),
    BitPlanes(**SIZES, stored=5, planes=3),
    BitPlanes(**SIZES, stored=4, planes=1),
]


def told(layout: BlockFormat) -> str:
    return repr(layout).replace("slots=16, dim=32", "")


def e4m3(code: int) -> float:
    """The number that a code of fp8 stands for."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if sign else size


def stored_code(layout: BlockFormat, block: bytes, token: int, channel: int) -> int:
    """The bits of one element: of planes, the first is the highest."""
    code = 0
    for plane in range(layout.stored_planes):
        at = layout.codes_at + (plane * layout.slots + token) * layout.columns + channel % layout.columns
        code = code << layout.bits | block[at] >> channel // layout.columns * layout.bits & (1 << layout.bits) - 1
    return code


def number(layout: BlockFormat, code: int) -> float:
    """The number that a code stands for before it is scaled."""
    if isinstance(layout, Int8):
        return code - 256 * (code > 127)
    if isinstance(layout, Fp8):
        return e4m3(code)
    if not isinstance(layout, BitPlanes):
        return code
    open_bits = layout.stored - layout.read_planes
    size = (code & (1 << layout.stored - 1) - 1) >> open_bits << open_bits
    size += (2**open_bits - 1) / 2
    return -size if code >> layout.stored - 1 else size


def by_element(layout: BlockFormat, block: bytes) -> torch.Tensor:
    """A block decoded one element at a time."""
    kind = "<e" if layout.scale_dtype == torch.float16 else "<f"
    size = struct.calcsize(kind)
    rows, columns = layout.groups
    decoded = torch.empty(layout.slots, layout.dim, dtype=torch.float64)
    for token in range(layout.slots):
        for channel in range(layout.dim):
            group = token // layout.token_group * columns + channel // layout.channel_group
            (scale,) = struct.unpack_from(kind, block, group * size)
            minimum = struct.unpack_from(kind, block, (rows * columns + group) * size)[0] if layout.has_minima else 0.0
            unit = number(layout, stored_code(layout, block, token, channel))
            decoded[token, channel] = scale * unit + minimum
    return decoded


def values(seed: int, *, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(SIZES["slots"], SIZES["dim"], generator=generator)
    return (block + 4 * torch.randn(SIZES["dim"], generator=generator)) * spread


@pytest.mark.parametrize("layout", FORMATS, ids=told)
def test_a_block_is_decoded_as_it_is_laid_out(layout: BlockFormat) -> None:
    encoded = layout.encode(values(0))
    assert encoded.dtype == torch.uint8
    assert encoded.shape == (layout.block_bytes,)
    assert layout.block_bytes % 16 == layout.codes_at % 16 == 0
    expected = by_element(layout, bytes(encoded.numpy()))
    assert layout.decode(encoded, dtype=torch.float64).equal(expected)
    torch.testing.assert_close(layout.decode(encoded), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [layout for layout in FORMATS if layout.has_minima], ids=told)
def test_uniform_scales_and_codes_are_those_of_the_paper(layout: BlockFormat) -> None:
    block = values(1)
    encoded = bytes(layout.encode(block).numpy())
    rows, columns = layout.groups
    levels = 2**layout.bits - 1
    for row in range(rows):
        for column in range(columns):
            tokens = range(row * layout.token_group, (row + 1) * layout.token_group)
            channels = range(column * layout.channel_group, (column + 1) * layout.channel_group)
            members = np.array([[block[token, channel] for channel in channels] for token in tokens], dtype=np.float32)
            group = row * columns + column
            (scale,) = struct.unpack_from("<e", encoded, 2 * group)
            (minimum,) = struct.unpack_from("<e", encoded, 2 * (rows * columns + group))
            below, above = members.min() - minimum, scale - (members.max() - members.min()) / levels
            assert 0 <= below <= abs(members.min()) * 2**-10
            assert 0 <= above <= abs(members).max() * 2**-9
            codes = [[stored_code(layout, encoded, token, channel) for channel in channels] for token in tokens]
            steps = (members - np.float32(minimum)) / np.float32(scale)
            assert codes == np.rint(steps).astype(int).tolist()


def test_int8_and_fp8_codes_are_the_nearest() -> None:
    block = values(2)
    encoded = bytes(Int8(**SIZES).encode(block).numpy())
    for token in range(SIZES["slots"]):
        (scale,) = struct.unpack_from("<f", encoded, 4 * token)
        assert scale == float(block[token].abs().max() / 127)
        codes = [number(Int8(**SIZES), stored_code(Int8(**SIZES), encoded, token, channel)) for channel in range(32)]
        assert codes == [round(float(x) / scale) for x in block[token]]
    layout = Fp8(**SIZES)
    encoded = bytes(layout.encode(block).numpy())
    (scale,) = struct.unpack_from("<f", encoded, 0)
    numbers = sorted({e4m3(code) for code in range(256) if code & 0x7F != 0x7F})
    assert numbers[-1] == 448
    for token, channel in [(0, 0), (3, 7), (15, 31), (8, 16)]:
        got = e4m3(stored_code(layout, encoded, token, channel))
        x = float(block[token, channel]) / scale
        assert abs(got - x) <= min(abs(other - x) for other in numbers) + 1e-4


def test_planes_are_the_digits_of_the_magnitude() -> None:
    layout = BitPlanes(**SIZES, stored=6)
    block = values(3)
    encoded = bytes(layout.encode(block).numpy())
    for token in range(SIZES["slots"]):
        (step,) = struct.unpack_from("<f", encoded, 4 * token)
        for channel in range(SIZES["dim"]):
            x = float(block[token, channel])
            assert stored_code(layout, encoded, token, channel) == round(abs(x) / step) + 32 * (x < 0)


def steps_of(layout: BlockFormat, encoded: torch.Tensor) -> torch.Tensor:
    """The scale of each element [..., slots, dim]."""
    rows, columns = layout.groups
    scale = encoded[..., : rows * columns * layout.scale_dtype.itemsize].view(layout.scale_dtype).double()
    scale = scale.unflatten(-1, (rows, columns))
    return scale.repeat_interleave(layout.token_group, -2).repeat_interleave(layout.channel_group, -1)


@given(st.sampled_from(FORMATS), st.integers(0, 2**20), st.sampled_from([1e-7, 1e-3, 1.0, 300.0]))
def test_what_comes_back_is_within_half_a_step(layout: BlockFormat, seed: int, spread: float) -> None:
    block = values(seed, spread=spread)
    encoded = layout.encode(block)
    error = (layout.decode(encoded, dtype=torch.float64) - block.double()).abs()
    half = steps_of(layout, encoded) / 2
    if isinstance(layout, Fp8):  # steps of 1/8 of a power of two, of 2**-9 below 2**-6
        half = torch.maximum(block.double().abs() / 16, half * 2**-9)
    elif isinstance(layout, BitPlanes):
        half = half * 2 ** (layout.stored - layout.read_planes)
    slack = block.double().abs() * 1e-6
    assert bool((error <= half + slack).all())


@pytest.mark.parametrize("layout", [layout for layout in FORMATS if layout.name != "bit planes"], ids=told)
@pytest.mark.parametrize("value", [0.0, 0.7, -1234.567, 1e-6])
def test_a_block_without_range_comes_back(layout: BlockFormat, value: float) -> None:
    block = torch.full((SIZES["slots"], SIZES["dim"]), value)
    torch.testing.assert_close(layout.decode(layout.encode(block)), block, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", FORMATS, ids=told)
def test_extremes_stay_finite(layout: BlockFormat) -> None:
    block = values(4)
    block[3], block[5, 5], block[7, 7] = 0.0, 3e38, -3e38
    assert bool(layout.decode(layout.encode(block)).isfinite().all())


@pytest.mark.parametrize("layout", [layout for layout in FORMATS if layout.has_minima], ids=told)
def test_all_levels_are_used(layout: BlockFormat) -> None:
    levels = 2**layout.bits
    generator = torch.Generator().manual_seed(0)
    block = torch.randint(levels, (SIZES["slots"], SIZES["dim"]), generator=generator).float()
    grouped = block.view(-1, layout.token_group, layout.groups[1], layout.channel_group)
    grouped[:, 0, :, 0], grouped[:, -1, :, -1] = 0, levels - 1
    assert layout.decode(layout.encode(block)).equal(block)


def test_more_planes_are_never_worse() -> None:
    block = values(5)
    bounds = []
    for planes in range(1, 9):
        layout = BitPlanes(**SIZES, planes=planes)
        encoded = layout.encode(block)
        assert encoded.equal(BitPlanes(**SIZES).encode(block)), "what is read has no say in what is written"
        assert layout.read_bytes == layout.codes_at + planes * 16 * 4
        forgotten = encoded.clone()
        forgotten[layout.read_bytes :] = 0xFF
        assert layout.decode(forgotten).equal(layout.decode(encoded)), "planes that are not read do not matter"
        bounds.append(float((layout.decode(encoded) - block).abs().max()))
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_floating_type_and_any_batch_is_encoded(dtype: torch.dtype) -> None:
    blocks = torch.stack([values(seed) for seed in range(6)]).to(dtype).view(2, 3, 16, 32)
    layout = KiviKeys(**SIZES, bits=4, group=16)
    encoded = layout.encode(blocks)
    assert encoded.shape == (2, 3, layout.block_bytes)
    for row in range(2):
        for column in range(3):
            assert encoded[row, column].equal(layout.encode(blocks[row, column].float()))


def test_bits_per_element() -> None:
    sizes = {"slots": 128, "dim": 128}
    bits = {
        told(layout): layout.block_bytes * 8 / 128**2
        for layout in (
            KiviKeys(**sizes, bits=2, group=32),
            KiviKeys(**sizes, bits=4, group=32),
            KiviValues(**sizes, bits=4, group=64),
            Kv4(**sizes),
            Int8(**sizes),
        )
    }
    assert list(bits.values()) == [3.0, 5.0, 4.5, 4.25, 8.25]


@pytest.mark.parametrize(
    ("make", "told_of"),
    [
        (lambda: Kv4(slots=24, dim=32), "slots must be a power of two from 16 on, got 24"),
        (lambda: Kv4(slots=8, dim=32), "slots must be a power of two from 16 on, got 8"),
        (lambda: Kv4(slots=16, dim=31), "dim must fill whole bytes"),
        (lambda: KiviKeys(slots=16, dim=32, bits=3), "bits must be 2, 4 or 8, got 3"),
        (lambda: KiviKeys(slots=16, dim=32, group=32), "group must divide the 16 slots, got 32"),
        (lambda: KiviValues(slots=16, dim=32, group=12), "group must divide the 32 channels, got 12"),
        (lambda: BitPlanes(slots=16, dim=32, stored=9), "stored must be 2 to 8 planes, got 9"),
        (lambda: BitPlanes(slots=16, dim=32, stored=4, planes=5), "planes must be 1 to the 4 stored"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make: object, told_of: str) -> None:
    with pytest.raises(ConfigError, match=told_of):
        make()  # type: ignore[operator]


def test_other_blocks_are_refused() -> None:
    layout = Int8(**SIZES)
    with pytest.raises(InputError, match=r"a block must be \[..., 16, 32\], got \[16, 31\]"):
        layout.encode(torch.zeros(16, 31))
    with pytest.raises(InputError, match=r"blocks must be uint8 \[..., 576\], got torch.uint8 \[575\]"):
        layout.decode(torch.zeros(575, dtype=torch.uint8))


def test_equal_formats_are_equal_values() -> None:
    assert {KiviKeys(**SIZES, group=16), KiviKeys(**SIZES, group=16)} == {KiviKeys(slots=16, dim=32, bits=4, group=16)}
    assert KiviKeys(**SIZES, group=16) != KiviKeys(**SIZES, group=8)
    assert Kv4(**SIZES).read_bytes == Kv4(**SIZES).block_bytes
