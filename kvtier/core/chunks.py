"""Typed chunks and the bytes under them: payloads ordered [layer][KV head][page][K then V]."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch

from kvtier.errors import InputError
from kvtier.storage_backends.records import ByteRange
from kvtier.types import DTYPE_BYTES, KVLayout, LayerLayout

__all__ = ["ChunkCodec", "KVChunk", "LayerTensors"]

LayerTensors: TypeAlias = "torch.Tensor | Sequence[torch.Tensor]"
"""[L, Hk, C, D] in one tensor, or a sequence of L tensors [Hk, C, D]: ``x[layer]`` is the same."""


class KVChunk(NamedTuple):
    """Keys and values of one chunk in every layer, on any device: k [L, Hk, C, Dk] and v [L, Hk, C, Dv].

    Where layers differ in their heads or dimensions, k and v are sequences of tensors, one [Hk, C, D] a layer.
    """

    k: LayerTensors
    v: LayerTensors

    @classmethod
    def split(cls, k: LayerTensors, v: LayerTensors, chunk_tokens: int) -> list[KVChunk]:
        """The full chunks of keys and values of T tokens, [L, Hk, T, D] each; views, without a copy."""
        tokens = k[0].shape[-2] if len(k) else 0
        return [
            cls(_narrow(k, at, chunk_tokens), _narrow(v, at, chunk_tokens))
            for at in range(0, tokens - chunk_tokens + 1, chunk_tokens)
        ]


class ChunkCodec:
    """Bytes of chunks of one layout.

    Attributes
    ----------
    payload_bytes : int
        Of one chunk.
    """

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        sizes = [layer.token_bytes * layout.chunk_tokens for layer in layout.layers]
        self._starts = [0, *accumulate(sizes)]
        self.payload_bytes = self._starts[-1]

    def check(self, chunk: KVChunk, layers: Sequence[int], name: str) -> None:
        """Refuse a chunk whose tensors are not those of ``layers``.

        Raises
        ------
        InputError
            Another number of layers, another shape or dtype.
        """
        for kind, tensors in (("k", chunk.k), ("v", chunk.v)):
            if len(tensors) != len(layers):
                raise InputError(f"{name}.{kind} must have {len(layers)} layers, got {len(tensors)}")
            for place, layer in enumerate(layers):
                self._check_layer(tensors[place], layer, f"{name}.{kind}[{place}]", kind)

    def encode(self, chunk: KVChunk, into: torch.Tensor) -> None:
        """Lay a checked chunk into uint8 [payload_bytes]."""
        for index, layer in enumerate(self.layout.layers):
            keys, values = self._pages(into[self._starts[index] : self._starts[index + 1]], layer)
            _write(chunk.k[index], keys)
            _write(chunk.v[index], values)

    def decode(self, payload: torch.Tensor, layers: Sequence[int], into: KVChunk) -> None:
        """Fill a checked chunk of ``layers`` from the bytes that `ranges` asks for."""
        at = 0
        for place, index in enumerate(layers):
            size = self._starts[index + 1] - self._starts[index]
            keys, values = self._pages(payload[at : at + size], self.layout.layers[index])
            _read(keys, into.k[place])
            _read(values, into.v[place])
            at += size

    def ranges(self, layers: Sequence[int]) -> tuple[ByteRange, ...]:
        """Where ascending ``layers`` lie in a payload; neighbours are one range."""
        ranges: list[ByteRange] = []
        for index in layers:
            start, end = self._starts[index], self._starts[index + 1]
            if ranges and sum(ranges[-1]) == start:
                ranges[-1] = ByteRange(ranges[-1].offset, end - ranges[-1].offset)
            else:
                ranges.append(ByteRange(start, end - start))
        return tuple(ranges)

    def bytes_of(self, layers: Sequence[int]) -> int:
        """Bytes of some layers of a payload."""
        return sum(self._starts[index + 1] - self._starts[index] for index in layers)

    def empty(self, layers: Sequence[int]) -> KVChunk:
        """A chunk on the CPU to decode into: one tensor each for k and v where the layers are alike."""
        shapes = [self.layout.layers[index] for index in layers]
        return KVChunk(*(self._empty(shapes, kind) for kind in ("k", "v")))

    def _empty(self, shapes: Sequence[LayerLayout], kind: str) -> LayerTensors:
        tokens = self.layout.chunk_tokens
        wanted = [((layer.num_kv_heads, tokens, _dim(layer, kind)), getattr(torch, layer.dtype)) for layer in shapes]
        if len(set(wanted)) == 1:
            (shape, dtype) = wanted[0]
            return torch.empty((len(wanted), *shape), dtype=dtype)
        return [torch.empty(shape, dtype=dtype) for shape, dtype in wanted]

    def _pages(self, payload: torch.Tensor, layer: LayerLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one layer's bytes, pages of keys [Hk, N, P, bytes of Dk] and values [Hk, N, P, bytes of Dv]."""
        page, size = self.layout.page_tokens, DTYPE_BYTES[layer.dtype]
        key_bytes, value_bytes = layer.key_dim * size, layer.value_dim * size
        rows = payload.view(layer.num_kv_heads, -1, page * (key_bytes + value_bytes))
        keys, values = rows[..., : page * key_bytes], rows[..., page * key_bytes :]
        return keys.view(*rows.shape[:2], page, key_bytes), values.view(*rows.shape[:2], page, value_bytes)

    def _check_layer(self, tensor: torch.Tensor, index: int, name: str, kind: str) -> None:
        layer = self.layout.layers[index]
        shape = (layer.num_kv_heads, self.layout.chunk_tokens, _dim(layer, kind))
        dtype = getattr(torch, layer.dtype)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise InputError(
                f"{name} must be {dtype} {list(shape)} (KV heads, chunk_tokens, dim) for layer {index}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )


def _dim(layer: LayerLayout, kind: str) -> int:
    return layer.key_dim if kind == "k" else layer.value_dim


def _write(tensor: torch.Tensor, pages: torch.Tensor) -> None:
    """Copy [Hk, C, D] to its bytes [Hk, N, P, bytes of D]."""
    rows = tensor.detach()
    if rows.stride(-1) != 1:
        rows = rows.clone(memory_format=torch.contiguous_format)
    _copy(_bytes_by_page(rows, pages), pages)


def _read(pages: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy bytes [Hk, N, P, bytes of D] to [Hk, C, D]."""
    rows = tensor.detach()
    if rows.stride(-1) == 1:
        _copy(pages, _bytes_by_page(rows, pages))
    else:
        straight = torch.empty(rows.shape, dtype=rows.dtype)
        _copy(pages, _bytes_by_page(straight, pages))
        rows.copy_(straight)


def _bytes_by_page(rows: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """[Hk, C, D] as bytes [Hk, N, P, bytes of D], a view."""
    return rows.view(torch.uint8).view(pages.shape)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.is_cpu and target.is_cpu:
        # numpy stays in this thread; torch would start a pool of OpenMP threads in every thread that calls it.
        target.numpy()[...] = source.numpy()
    else:
        target.copy_(source)


def _narrow(tensors: LayerTensors, start: int, length: int) -> LayerTensors:
    if isinstance(tensors, torch.Tensor):
        return tensors.narrow(-2, start, length)
    return [tensor.narrow(-2, start, length) for tensor in tensors]
