"""Sizes as text, shapes of layers and models, budgets: what is wrong is refused with what was required."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.types import DTYPE_BYTES, Budgets, KVLayout, LayerLayout, format_bytes, parse_bytes

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"k": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
LAYER: dict[str, Any] = {"num_query_heads": 8, "num_kv_heads": 2, "key_dim": 64, "value_dim": 32, "dtype": "bfloat16"}


@given(count=st.integers(1, 10**15), decimals=st.integers(0, 999), unit=st.sampled_from(sorted(UNITS)), data=st.data())
def test_sizes_are_exact_numbers_of_units_rounded_down(
    count: int, decimals: int, unit: str, data: st.DataObject
) -> None:
    case = data.draw(st.sampled_from([str.lower, str.upper, str]))
    space = data.draw(st.sampled_from(["", " "]))

    size = parse_bytes(f"{space}{count}.{decimals:03d}{space}{case(unit)}{space}")

    assert size == int((count + Fraction(decimals, 1000)) * UNITS[unit])


@given(st.integers(1, 2**70))
def test_integers_are_bytes(count: int) -> None:
    assert parse_bytes(count) == parse_bytes(str(count)) == count


@pytest.mark.parametrize(
    "size", ["", "much", "1.5.5MB", "-1", "1e6", "5 parsecs", "MiB", "1,5GB", "0x10", True, 1.5, None, b"1MB"]
)
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(ConfigError, match=r"an integer of bytes or text such as '64MiB' or '1\.5GB', got"):
        parse_bytes(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -7, "0.2B", "0GiB"])
def test_a_size_is_at_least_one_byte(size: int | str) -> None:
    with pytest.raises(ConfigError, match="at least 1 byte, got"):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 50, "5120.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(1, 2**60))
def test_a_written_size_reads_back_within_its_digits(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= max(0, count * 0.05)


def test_a_layer_knows_its_group_and_its_bytes() -> None:
    layer = LayerLayout(**LAYER)

    assert layer.group_size == 4
    assert layer.token_bytes == 2 * (64 + 32) * 2
    assert DTYPE_BYTES == {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_query_heads": 0}, "num_query_heads must be at least 1, got 0"),
        ({"num_kv_heads": -2}, "num_kv_heads must be at least 1, got -2"),
        ({"key_dim": 0}, "key_dim must be at least 1, got 0"),
        ({"value_dim": 0}, "value_dim must be at least 1, got 0"),
        ({"num_kv_heads": 3}, "num_query_heads must be a multiple of num_kv_heads, got 8 and 3"),
        ({"dtype": "int8"}, "dtype must be one of float64, float32, float16, bfloat16, got 'int8'"),
        ({"window": 0}, "window must be at least 1 token or None, got 0"),
    ],
)
def test_layers_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerLayout(**LAYER | change)


def test_a_layout_adds_up_its_layers() -> None:
    wide = LayerLayout(**LAYER | {"key_dim": 128, "window": 512})
    layout = KVLayout(layers=(LayerLayout(**LAYER), wide))

    assert layout.token_bytes == 2 * (64 + 32) * 2 + 2 * (128 + 32) * 2
    assert (layout.page_tokens, layout.block_tokens, layout.chunk_tokens) == (16, 64, 256)


def test_a_uniform_layout_has_equal_layers() -> None:
    layout = KVLayout.uniform(num_layers=3, num_kv_heads=4, key_dim=8, value_dim=6, dtype="float16", page_tokens=32)

    assert (
        layout.layers == (LayerLayout(num_query_heads=4, num_kv_heads=4, key_dim=8, value_dim=6, dtype="float16"),) * 3
    )
    assert layout.page_tokens == 32
    grouped = KVLayout.uniform(
        num_layers=1, num_kv_heads=4, num_query_heads=12, key_dim=8, value_dim=8, dtype="float16"
    )
    assert grouped.layers[0].group_size == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "at least one layer, got none"),
        ({"page_tokens": 0}, "page_tokens must be at least 1, got 0"),
        ({"block_tokens": 24}, r"block_tokens must be a positive multiple of page_tokens \(16\), got 24"),
        ({"block_tokens": 0}, r"block_tokens must be a positive multiple of page_tokens \(16\), got 0"),
        ({"chunk_tokens": 96}, r"chunk_tokens must be a positive multiple of block_tokens \(64\), got 96"),
        ({"chunk_tokens": -64}, r"chunk_tokens must be a positive multiple of block_tokens \(64\), got -64"),
    ],
)
def test_layouts_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVLayout(**{"layers": (LayerLayout(**LAYER),)} | change)


@pytest.mark.parametrize(("name", "unit"), [("keep", "tokens"), ("read", "tokens"), ("device", "bytes")])
def test_a_budget_is_positive_or_left_out(name: str, unit: str) -> None:
    assert getattr(Budgets(), name) is None
    assert getattr(Budgets(**{name: 1}), name) == 1
    with pytest.raises(ConfigError, match=rf"{name} must be at least 1 \({unit}\), got 0; leave it out for no bound"):
        Budgets(**{name: 0})
