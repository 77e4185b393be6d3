"""Keys of prefixes: golden vectors, an independent computation, and what must change them and what must not."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.prefix import ChunkMeta, Identity, canonical_bytes, chunk_keys, namespace_digest, token_bytes
from kvtier.errors import InputError
from kvtier.types import KVLayout

LAYOUT = KVLayout.uniform(num_layers=2, num_kv_heads=2, key_dim=16, value_dim=8, dtype="bfloat16")

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
IDENTITIES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


def digest(**changes: Any) -> bytes:
    return namespace_digest(**({"model": "m", "layout": LAYOUT, "salt": b"salt"} | changes))


def test_namespaces_are_these_bytes() -> None:
    """Stored data is found again by later versions: a change here needs another FORMAT_VERSION."""
    assert digest().hex() == "0c8a70a62bd29bc592e0b4a696164aadc10edb8a63127ae2764663454d3e311c"
    everything: Identity = {"b": [1, -2, 3.5, None, True, False], "a": b"\x00", "é": "ü"}
    other = digest(model={"weights": "w", "n": 7}, extra=everything, salt=b"", codec="kivi")
    assert other.hex() == "10393e28edcc295fc44c231aafa55a76af35c45e47b5fdf5fed27f39bbd7c75d"


def test_chunk_keys_are_these_bytes() -> None:
    keys = chunk_keys(bytes(range(32)), token_bytes([0, 1, 2, -1, 2**40, 5, 6]), 3)

    assert [key.hex() for key in keys] == [
        "01a67773e8cf2b9f8ee8120ca2f572517459cabd1a693b07f1c60c5e06ddbd45",
        "714b7175c8c9eaf09896c3bdd3908517e8fd92dca915b477054e88a7db02d43f",
    ]


def test_canonical_bytes_are_these() -> None:
    assert canonical_bytes({"k": [None, True, 1, "é", b"\x01", 0.5]}) == (
        b"m" + struct.pack("<Q", 1) + b"s" + struct.pack("<Q", 1) + b"k"
        b"l" + struct.pack("<Q", 6) + b"NT"
        b"i" + struct.pack("<Q", 1) + b"1"
        b"s" + struct.pack("<Q", 2) + "é".encode() + b"b" + struct.pack("<Q", 1) + b"\x01"
        b"f" + struct.pack("<Q", 8) + struct.pack("<d", 0.5)
    )


@given(
    tokens=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40),
    chunk_tokens=st.integers(1, 9),
    namespace=st.binary(min_size=32, max_size=32),
)
def test_keys_chain_what_came_before(tokens: list[int], chunk_tokens: int, namespace: bytes) -> None:
    expected = []
    parent = namespace
    for at in range(len(tokens) // chunk_tokens):
        chunk = tokens[at * chunk_tokens : (at + 1) * chunk_tokens]
        content = parent + struct.pack(f"<{chunk_tokens}q", *chunk)
        parent = hashlib.blake2b(content, digest_size=32, key=namespace, person=b"kvtier.chunk").digest()
        expected.append(parent)

    assert chunk_keys(namespace, token_bytes(tokens), chunk_tokens) == expected


@given(one=IDENTITIES, two=IDENTITIES)
def test_different_identities_have_different_bytes(one: Identity, two: Identity) -> None:
    def typed(value: Any) -> Any:
        """Like the value, but 1, 1.0 and True differ, and -0.0 and 0.0."""
        if isinstance(value, dict):
            return {key: typed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [typed(item) for item in value]
        return (type(value).__name__, repr(value))

    assert (canonical_bytes(one) == canonical_bytes(two)) == (typed(one) == typed(two))


@given(items=st.dictionaries(st.text(), SCALARS, min_size=2, max_size=5), seed=st.randoms())
def test_the_order_of_a_mapping_does_not_matter(items: dict[str, Any], seed: Any) -> None:
    shuffled = list(items.items())
    seed.shuffle(shuffled)

    assert canonical_bytes(dict(shuffled)) == canonical_bytes(items)
    assert canonical_bytes(tuple(items)) == canonical_bytes(list(items))


@pytest.mark.parametrize("value", [{1: "a"}, {"a": object()}, [{"b": {2}}], 1j])
def test_what_has_no_canonical_form_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"identity (must be|is made of)|keys of an identity must be text"):
        canonical_bytes(value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "n"},
        {"model": ["m"]},
        {"salt": b"other"},
        {"codec": "kivi"},
        {"extra": {"lora": "a"}},
        {"layout": replace(LAYOUT, page_tokens=32)},
        {"layout": replace(LAYOUT, chunk_tokens=512)},
        {"layout": replace(LAYOUT, layers=LAYOUT.layers * 2)},
        {"layout": replace(LAYOUT, layers=(replace(LAYOUT.layers[0], dtype="float16"), LAYOUT.layers[1]))},
        {"layout": replace(LAYOUT, layers=(LAYOUT.layers[0], replace(LAYOUT.layers[1], window=64)))},
        {"layout": replace(LAYOUT, layers=(replace(LAYOUT.layers[0], key_dim=8, value_dim=16), LAYOUT.layers[1]))},
    ],
)
def test_whatever_changes_the_bytes_changes_the_namespace(changes: dict[str, Any]) -> None:
    assert digest(**changes) != digest()


def test_what_does_not_change_the_bytes_does_not_matter() -> None:
    more_queries = replace(LAYOUT, layers=tuple(replace(layer, num_query_heads=8) for layer in LAYOUT.layers))
    assert digest(layout=more_queries) == digest(layout=replace(LAYOUT, block_tokens=128)) == digest()


@pytest.mark.parametrize(
    "tokens",
    [
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3], dtype=np.uint8),
        np.array([1, 2, 3], dtype=">i4"),
        torch.tensor([1, 2, 3], dtype=torch.int32),
        torch.tensor([[1, 2, 3]])[0],
    ],
)
def test_tokens_are_the_same_in_any_container(tokens: Any) -> None:
    assert token_bytes(tokens) == struct.pack("<3q", 1, 2, 3)
    assert token_bytes([]) == b""


@pytest.mark.parametrize(
    "tokens", [[[1, 2]], [1.5], torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64), ["a"], [2**63], [[1], [2, 3]]]
)
def test_tokens_are_one_row_of_integers(tokens: Any) -> None:
    with pytest.raises(InputError, match="token ids must"):
        token_bytes(tokens)


def test_a_chunk_says_where_it_belongs() -> None:
    meta = ChunkMeta(number=3, chunk_tokens=256, parent=bytes(range(32)))

    assert meta.pack() == b"\x01\0\0\0" + struct.pack("<II", 3, 256) + bytes(range(32))
    assert ChunkMeta.unpack(meta.pack()) == meta
    for other in (b"", meta.pack()[:-1], meta.pack() + b"\0", b"\x02" + meta.pack()[1:]):
        assert ChunkMeta.unpack(other) is None
