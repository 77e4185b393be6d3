"""Typed chunks and the bytes under them: payloads ordered [layer][KV head][page][K then V]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch

from kvtier.errors import InputError
from kvtier.kernels.split_rows import CopyHeads, plan_split
from kvtier.storage_backends.memory import ByteRows
from kvtier.storage_backends.records import ByteRange
from kvtier.types import DTYPE_BYTES, KVLayout, LayerLayout

__all__ = ["ChunkCodec", "DecodingStep", "KVChunk", "LayerTensors"]

LayerTensors: TypeAlias = "torch.Tensor | Sequence[torch.Tensor]"
"""[L, Hk, C, D] in one tensor, or a sequence of L tensors [Hk, C, D]: ``x[layer]`` is the same."""


_HostRows: TypeAlias = "ByteRows | list[ByteRows]"
"""Bytes of a chunk's keys or values by page, [L, Hk, N, P, bytes of D], or [1, Hk, N, P, bytes of D] a layer."""

_Like: TypeAlias = "tuple[tuple[int, ...], torch.dtype]"
"""Shape and dtype of one layer's keys or values."""

_Bytes = TypeVar("_Bytes", torch.Tensor, ByteRows)

_STEP_BYTES = 1 << 20  # copied, then verified in the cache; each step costs some 5 us beside


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


class _Step(NamedTuple):
    """Bytes ``start`` to ``stop`` of a payload: some layers, or some heads of one.

    ``places`` says which layers of the chunk, ``heads`` which of their heads, ``layer`` what they are like.
    """

    start: int
    stop: int
    places: slice
    heads: slice
    layer: LayerLayout

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return (self.places.stop - self.places.start, self.heads.stop - self.heads.start)

    def numbers(self, *, together: bool) -> tuple[int, int]:
        """Its first head and the one after its last, counted through the layers of the chunk, or in its own layer."""
        before = self.places.start * self.layer.num_kv_heads if together else 0
        last = (self.places.stop - self.places.start - 1) * self.layer.num_kv_heads
        return before + self.heads.start, before + last + self.heads.stop

    def of(self, tensors: LayerTensors) -> torch.Tensor:
        """Its part of a chunk, [L, Hk, C, D]."""
        if isinstance(tensors, torch.Tensor):
            return tensors[self.places, self.heads]
        layer: torch.Tensor = tensors[self.places.start]
        return layer[self.heads].unsqueeze(0)

    def on_host(self, rows: _HostRows) -> ByteRows:
        """Its part of the bytes of a chunk, [L, Hk, N, P, bytes of D]."""
        return rows[self.places, self.heads] if isinstance(rows, np.ndarray) else rows[self.places.start][:, self.heads]


class DecodingStep(NamedTuple):
    """One part of a payload into its place: ``copy`` reads bytes before ``stop``, as far as no step before it did."""

    stop: int
    copy: Callable[[], None]


class _OnHost(NamedTuple):
    """A payload and a chunk as numpy sees them."""

    payload: ByteRows
    keys: _HostRows
    values: _HostRows


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
        tokens = layout.chunk_tokens
        self._wanted = {
            "k": [_like(layer, tokens, layer.key_dim) for layer in layout.layers],
            "v": [_like(layer, tokens, layer.value_dim) for layer in layout.layers],
        }
        # What all layers are like, where they are.
        self._alike = {kind: wanted[0] if len(set(wanted)) == 1 else None for kind, wanted in self._wanted.items()}
        self._plans: dict[tuple[tuple[int, ...], bool], list[_Step]] = {}

    def check(self, chunk: KVChunk, layers: Sequence[int], name: str) -> None:
        """Refuse a chunk whose tensors are not those of ``layers``.

        Raises
        ------
        InputError
            Another number of layers, another shape or dtype.
        """
        for kind, tensors in (("k", chunk.k), ("v", chunk.v)):
            if isinstance(tensors, torch.Tensor) and self._fits(kind, tensors, len(layers)):
                continue
            if len(tensors) != len(layers):
                raise InputError(f"{name}.{kind} must have {len(layers)} layers, got {len(tensors)}")
            if isinstance(tensors, torch.Tensor):
                alike = [(tuple(tensors.shape[1:]), tensors.dtype)] * len(layers)
            else:
                alike = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
            for place, (layer, got) in enumerate(zip(layers, alike, strict=True)):
                if got != self._wanted[kind][layer]:
                    raise InputError(
                        f"{name}.{kind}[{place}] must be {_spoken(self._wanted[kind][layer])} "
                        f"(KV heads, chunk_tokens, dim) for layer {layer}, got {_spoken(got)}"
                    )

    def _fits(self, kind: str, tensor: torch.Tensor, layers: int) -> bool:
        """Whether a tensor is that of so many layers, where all are alike; the quick answer for most chunks."""
        alike = self._alike[kind]
        return alike is not None and tensor.shape == (layers, *alike[0]) and tensor.dtype == alike[1]

    def encode(self, chunk: KVChunk, into: torch.Tensor) -> None:
        """Lay a checked chunk into uint8 [payload_bytes]."""
        host = self._on_host(into, chunk)
        for step in self._steps(range(len(self.layout.layers)), chunk):
            if host is not None:
                pages = self._pages(host.payload, step)
                pages[0][...], pages[1][...] = step.on_host(host.keys), step.on_host(host.values)
                continue
            keys, values = self._pages(into, step)
            _write(step.of(chunk.k), keys)
            _write(step.of(chunk.v), values)

    def decode(self, payload: torch.Tensor, layers: Sequence[int], into: KVChunk) -> None:
        """Fill a checked chunk of ``layers`` from the bytes that `ranges` asks for."""
        for step in self.decoding(payload, layers, into):
            step.copy()

    def decoding(self, payload: torch.Tensor, layers: Sequence[int], into: KVChunk) -> list[DecodingStep]:
        """The same in steps that a cache holds, to be taken in order; nothing is copied yet."""
        steps: list[DecodingStep] = []
        split: CopyHeads | None = None
        together = _together(into)
        for step in self._steps(layers, into):
            if split is None or (not together and step.heads.start == 0):
                split = self._split(payload, step, into)
            steps.append(DecodingStep(step.stop, partial(split, *step.numbers(together=together))))
        return steps

    def _split(self, payload: torch.Tensor, step: _Step, into: KVChunk) -> CopyHeads:
        """How heads are copied out of a payload: those of all layers, or of the layer that a step begins."""
        k, v, page_tokens = into.k, into.v, self.layout.page_tokens
        if isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor):
            return plan_split(payload, k, v, page_tokens=page_tokens)
        rows = payload[step.start : step.start + step.layer.token_bytes * self.layout.chunk_tokens]
        keys, values = (tensors[step.places.start].unsqueeze(0) for tensors in into)
        return plan_split(rows, keys, values, page_tokens=page_tokens)

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
        return KVChunk(*(self._empty(layers, kind) for kind in ("k", "v")))

    def _empty(self, layers: Sequence[int], kind: str) -> LayerTensors:
        wanted = [self._wanted[kind][index] for index in layers]
        if len(set(wanted)) == 1:
            (shape, dtype) = wanted[0]
            return torch.empty((len(wanted), *shape), dtype=dtype)
        return [torch.empty(shape, dtype=dtype) for shape, dtype in wanted]

    def _steps(self, layers: Sequence[int], chunk: KVChunk) -> list[_Step]:
        """Copies that a chunk of ``layers`` takes: of several small layers that lie together, or some heads of one."""
        together = _together(chunk)
        key = (tuple(layers), together)
        if key not in self._plans:
            self._plans = {key: _steps_of(self.layout, key[0], together=together)}  # the last one is enough
        return self._plans[key]

    def _on_host(self, payload: torch.Tensor, chunk: KVChunk) -> _OnHost | None:
        """Everything as numpy sees it, whose views cost a tenth of torch's; None where it cannot see it."""
        keys, values = (_host_rows(tensors, self.layout.page_tokens) for tensors in chunk)
        if keys is None or values is None or not payload.is_cpu:
            return None
        return _OnHost(payload.numpy(), keys, values)

    def _pages(self, payload: _Bytes, step: _Step) -> tuple[_Bytes, _Bytes]:
        """Views of a step's bytes, pages of keys [L, Hk, N, P, bytes of Dk] and values [L, Hk, N, P, bytes of Dv]."""
        page, size = self.layout.page_tokens, DTYPE_BYTES[step.layer.dtype]
        key_bytes, value_bytes = step.layer.key_dim * size, step.layer.value_dim * size
        shape = (*step.shape, self.layout.chunk_tokens // page, page)
        rows = payload[step.start : step.stop].reshape(*shape[:3], page * (key_bytes + value_bytes))
        keys, values = rows[..., : page * key_bytes], rows[..., page * key_bytes :]
        return keys.reshape(*shape, key_bytes), values.reshape(*shape, value_bytes)


def _together(chunk: KVChunk) -> bool:
    """Whether all layers are in one tensor."""
    return isinstance(chunk.k, torch.Tensor) and isinstance(chunk.v, torch.Tensor)


def _spoken(like: _Like) -> str:
    shape, dtype = like
    return f"{dtype} {list(shape)}"


def _like(layer: LayerLayout, tokens: int, dim: int) -> _Like:
    return ((layer.num_kv_heads, tokens, dim), getattr(torch, layer.dtype))


def _steps_of(layout: KVLayout, layers: tuple[int, ...], *, together: bool) -> list[_Step]:
    """See `ChunkCodec._steps`; ``together``: a chunk's layers are one tensor."""
    steps: list[_Step] = []
    at = 0
    for place, index in enumerate(layers):
        layer = layout.layers[index]
        head_bytes = layer.token_bytes * layout.chunk_tokens // layer.num_kv_heads
        heads = max(1, min(layer.num_kv_heads, _STEP_BYTES // head_bytes))
        last = steps[-1] if steps and together else None
        size = head_bytes * layer.num_kv_heads
        if last is not None and last.layer == layer and last.stop - last.start + size <= _STEP_BYTES:
            steps[-1] = last._replace(stop=at + size, places=slice(last.places.start, place + 1))
            at += size
            continue
        for first in range(0, layer.num_kv_heads, heads):
            some = slice(first, min(first + heads, layer.num_kv_heads))
            stop = at + head_bytes * (some.stop - some.start)
            steps.append(_Step(at, stop, slice(place, place + 1), some, layer))
            at = stop
    return steps


def _host_rows(tensors: LayerTensors, page_tokens: int) -> _HostRows | None:
    """Views of the bytes of a chunk's keys or values; None where they do not lie in host memory row by row."""
    whole = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    if not all(tensor.is_cpu and tensor.stride(-1) == 1 for tensor in whole):
        return None
    rows: list[ByteRows] = []
    for tensor in whole:
        heads, tokens, dim = tensor.shape[-3:]
        shape = (-1, heads, tokens // page_tokens, page_tokens, dim * tensor.element_size())
        rows.append(tensor.detach().view(torch.uint8).view(shape).numpy())
    return rows[0] if isinstance(tensors, torch.Tensor) else rows


def _write(tensor: torch.Tensor, pages: torch.Tensor) -> None:
    """Copy [L, Hk, C, D] to its bytes [L, Hk, N, P, bytes of D]."""
    rows = tensor.detach()
    if rows.stride(-1) != 1:
        rows = rows.clone(memory_format=torch.contiguous_format)
    pages.copy_(_bytes_by_page(rows, pages))


def _bytes_by_page(rows: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """[L, Hk, C, D] as bytes [L, Hk, N, P, bytes of D], a view."""
    return rows.view(torch.uint8).view(pages.shape)


def _narrow(tensors: LayerTensors, start: int, length: int) -> LayerTensors:
    if isinstance(tensors, torch.Tensor):
        return tensors.narrow(-2, start, length)
    return [tensor.narrow(-2, start, length) for tensor in tensors]
