"""Chunks as bytes: the order of a payload by an explicit oracle, any strides, layer ranges, layers that differ."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.chunks import ChunkCodec, KVChunk
from kvtier.errors import InputError
from kvtier.types import DTypeName, KVLayout, LayerLayout

DTYPES: list[DTypeName] = ["float64", "float32", "float16", "bfloat16"]


def layer(heads: int, key_dim: int, value_dim: int, dtype: DTypeName = "float32") -> LayerLayout:
    return LayerLayout(num_query_heads=heads, num_kv_heads=heads, key_dim=key_dim, value_dim=value_dim, dtype=dtype)


LAYERS = st.builds(layer, st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.sampled_from(DTYPES))
LAYOUTS = st.builds(
    lambda layers, page, pages: KVLayout(
        layers=tuple(layers), page_tokens=page, block_tokens=page, chunk_tokens=page * pages
    ),
    st.lists(LAYERS, min_size=1, max_size=4) | st.builds(lambda one, n: [one] * n, LAYERS, st.integers(1, 4)),
    st.sampled_from([1, 2, 8]),
    st.integers(1, 3),
)
MIXED = KVLayout(layers=(layer(2, 4, 6), layer(1, 3, 5), layer(2, 4, 6)), page_tokens=4, block_tokens=4, chunk_tokens=8)


def noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random bytes, NaN and all."""
    size = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).view(shape)


def random_chunk(layout: KVLayout) -> KVChunk:
    """Keys and values as separate tensors of each layer."""
    tokens = layout.chunk_tokens
    shapes = [(one, getattr(torch, one.dtype)) for one in layout.layers]
    return KVChunk(
        [noise(one.num_kv_heads, tokens, one.key_dim, dtype=dtype) for one, dtype in shapes],
        [noise(one.num_kv_heads, tokens, one.value_dim, dtype=dtype) for one, dtype in shapes],
    )


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def oracle(layout: KVLayout, chunk: KVChunk) -> list[bytes]:
    """Bytes of each layer: [KV head][page][K then V], a token's row at a time."""
    layers = []
    for index, one in enumerate(layout.layers):
        parts = []
        for head in range(one.num_kv_heads):
            for start in range(0, layout.chunk_tokens, layout.page_tokens):
                for tensors in (chunk.k, chunk.v):
                    tokens = range(start, start + layout.page_tokens)
                    parts += [as_bytes(tensors[index][head, token]) for token in tokens]
        layers.append(b"".join(parts))
    return layers


def encoded(codec: ChunkCodec, chunk: KVChunk) -> bytes:
    into = torch.full((codec.payload_bytes,), 0xEE, dtype=torch.uint8)
    codec.encode(chunk, into)
    return into.numpy().tobytes()


def same(one: KVChunk, two: KVChunk) -> bool:
    return all(
        len(left) == len(right) and all(as_bytes(left[i]) == as_bytes(right[i]) for i in range(len(left)))
        for left, right in zip(one, two, strict=True)
    )


@given(layout=LAYOUTS, data=st.data())
def test_payloads_are_ordered_by_layer_head_and_page(layout: KVLayout, data: st.DataObject) -> None:
    codec, chunk = ChunkCodec(layout), random_chunk(layout)
    layers = oracle(layout, chunk)
    payload = encoded(codec, chunk)
    assert payload == b"".join(layers)

    chosen = sorted(data.draw(st.sets(st.integers(0, len(layers) - 1), min_size=1), label="layers"))
    ranges = codec.ranges(chosen)
    wanted = b"".join(payload[offset : offset + length] for offset, length in ranges)
    assert wanted == b"".join(layers[index] for index in chosen)
    assert len(wanted) == codec.bytes_of(chosen)
    assert all(one.offset + one.length < two.offset for one, two in pairwise(ranges))

    into = codec.empty(chosen)
    codec.check(into, chosen, "into")
    codec.decode(torch.frombuffer(bytearray(wanted), dtype=torch.uint8), chosen, into)
    assert same(into, KVChunk([chunk.k[i] for i in chosen], [chunk.v[i] for i in chosen]))


def test_layers_that_are_alike_come_in_one_tensor() -> None:
    layout = replace(MIXED, layers=MIXED.layers[:1] * 3)
    chunk = ChunkCodec(layout).empty(range(3))

    assert isinstance(chunk.k, torch.Tensor)
    assert isinstance(chunk.v, torch.Tensor)
    assert (chunk.k.shape, chunk.v.shape) == ((3, 2, 8, 4), (3, 2, 8, 6))
    assert isinstance(ChunkCodec(MIXED).empty(range(3)).k, list)


def test_tensors_may_have_any_strides() -> None:
    layout = replace(MIXED, layers=MIXED.layers[:1] * 2)
    codec = ChunkCodec(layout)
    k, v = torch.randn(2, 2, 20, 4), torch.randn(2, 2, 20, 6)
    chunks = KVChunk.split(k, v, 8)
    turned = KVChunk(
        k[..., 8:16, :].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        [v[0, :, 8:16].transpose(0, 1).contiguous().transpose(0, 1), v[1, :, 8:16]],
    )

    assert len(chunks) == 2
    assert chunks[1].k.data_ptr() == k[:, :, 8:].data_ptr(), "splitting copies nothing"  # type: ignore[union-attr]
    payload = encoded(codec, chunks[1])
    assert encoded(codec, turned) == payload == b"".join(oracle(layout, chunks[1]))

    into = KVChunk(torch.zeros(2, 2, 40, 4)[:, :, ::2][:, :, 4:12], torch.zeros(6, 8, 2, 2).permute(3, 2, 1, 0))
    codec.decode(torch.frombuffer(bytearray(payload), dtype=torch.uint8), range(2), into)
    assert same(into, chunks[1])


@pytest.mark.parametrize("step_bytes", [1, 400, 900, 1 << 20])
@pytest.mark.parametrize("together", [True, False])
def test_decoding_reads_no_further_than_it_says(
    step_bytes: int, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of some heads, of a layer, of several: what is not announced may not be verified yet."""
    monkeypatch.setattr("kvtier.core.chunks._STEP_BYTES", step_bytes)
    layout = replace(MIXED, layers=MIXED.layers[:1] * 3)
    codec, chunk = ChunkCodec(layout), random_chunk(layout)
    payload = encoded(codec, chunk)
    arrived = torch.full((len(payload),), 0xEE, dtype=torch.uint8)
    joined = codec.empty(range(3))
    into = joined if together else KVChunk(list(joined.k), list(joined.v))

    stops = []
    for stop, copy in codec.decoding(arrived, range(3), into):
        stops.append(stop)
        arrived[:stop] = torch.frombuffer(bytearray(payload[:stop]), dtype=torch.uint8)
        copy()

    assert same(into, chunk)
    assert stops == sorted(set(stops))
    assert stops[-1] == len(payload)
    assert (len(stops) == 1) == (together and step_bytes == 1 << 20)


def test_gradients_do_not_matter() -> None:
    layout = replace(MIXED, layers=MIXED.layers[:1])
    k, v = torch.randn(1, 2, 8, 4, requires_grad=True), torch.randn(1, 2, 8, 6)

    assert encoded(ChunkCodec(layout), KVChunk(k, v)) == encoded(ChunkCodec(layout), KVChunk(k.detach(), v))


@pytest.mark.parametrize("tokens", [0, 7])
def test_less_than_a_chunk_is_no_chunk(tokens: int) -> None:
    assert KVChunk.split(torch.zeros(1, 2, tokens, 4), torch.zeros(1, 2, tokens, 6), 8) == []


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        ((2, 2, 8, 4), (3, 2, 8, 6), r"c\.k must have 3 layers, got 2"),
        ((3, 2, 8, 4), (2, 2, 8, 6), r"c\.v must have 3 layers, got 2"),
        ((3, 2, 7, 4), (3, 2, 8, 6), r"c\.k\[0\] must be torch\.float32 \[2, 8, 4\] .* layer 0, got .* \[2, 7, 4\]"),
        ((3, 1, 8, 4), (3, 2, 8, 6), r"c\.k\[0\] must be .* got torch\.float32 \[1, 8, 4\]"),
        ((3, 2, 8, 4), (3, 2, 8, 4), r"c\.v\[0\] must be torch\.float32 \[2, 8, 6\]"),
    ],
)
def test_other_shapes_are_refused(k: tuple[int, ...], v: tuple[int, ...], message: str) -> None:
    codec = ChunkCodec(replace(MIXED, layers=MIXED.layers[:1] * 3))
    with pytest.raises(InputError, match=message):
        codec.check(KVChunk(torch.zeros(k), torch.zeros(v)), range(3), "c")


def test_other_dtypes_are_refused() -> None:
    codec = ChunkCodec(replace(MIXED, layers=MIXED.layers[:1]))
    chunk = KVChunk(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 6, dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"c\.v\[0\] must be torch\.float32 .* got torch\.bfloat16"):
        codec.check(chunk, [0], "c")


@pytest.mark.gpu
def test_chunks_may_lie_on_a_gpu() -> None:
    layout = replace(MIXED, layers=MIXED.layers[:1] * 2)
    codec = ChunkCodec(layout)
    k, v = torch.randn(2, 2, 8, 4), torch.randn(2, 2, 8, 6)
    payload = encoded(codec, KVChunk(k.cuda(), v.cuda()))
    assert payload == encoded(codec, KVChunk(k, v))

    into = KVChunk(torch.zeros_like(k).cuda(), torch.zeros_like(v).cuda())
    codec.decode(torch.frombuffer(bytearray(payload), dtype=torch.uint8), range(2), into)
    assert same(KVChunk(into.k.cpu(), into.v.cpu()), KVChunk(k, v))  # type: ignore[union-attr]
