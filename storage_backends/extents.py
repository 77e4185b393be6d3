"""Copies between vectors of bytes, with a digest for every extent of 64 KiB: what is verified is what was copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import xxhash

from kvtier.errors import InputError
from kvtier.storage_backends.memory import ByteRows
from kvtier.storage_backends.records import ByteRange, ReadRequest

__all__ = [
    "DIGEST_BYTES",
    "EXTENT_BYTES",
    "copy_vectors",
    "copy_verified",
    "copy_with_digests",
    "digest_bytes",
    "ranges_within",
    "verified",
]

EXTENT_BYTES = 64 << 10
"""Bytes under one digest; the last extent of a payload may be shorter."""

DIGEST_BYTES = 16
"""Bytes of a digest, xxh3-128."""

_BLOCK_BYTES = 8 * EXTENT_BYTES  # copied, then digested while it is in the cache

# An array is a buffer, though its type says so from Python 3.12 on only; a memoryview of it would cost more than the call.
_digest = cast("Callable[[ByteRows], bytes]", xxhash.xxh3_128_digest)


def digest_bytes(payload_bytes: int) -> int:
    """Bytes of all digests of a payload."""
    return -(-payload_bytes // EXTENT_BYTES) * DIGEST_BYTES


def ranges_within(request: ReadRequest, payload_bytes: int) -> tuple[ByteRange, ...] | None:
    """What a request asks of a payload of that size; None when its ranges or its ``into`` do not fit it.

    Raises
    ------
    InputError
        An ``into`` that is no contiguous uint8 vector on the CPU.
    """
    into = request.into
    if into.dtype != torch.uint8 or into.ndim != 1 or not into.is_contiguous() or not into.is_cpu:
        raise InputError(
            f"into must be a contiguous uint8 vector on the CPU, got {into.dtype} {list(into.shape)} on {into.device}"
        )
    if request.ranges is None:
        return (ByteRange(0, payload_bytes),) if into.numel() == payload_bytes else None
    ranges = request.ranges
    end = 0
    for offset, length in ranges:
        if offset < end or length < 0 or offset + length > payload_bytes:
            return None
        end = offset + length
    return ranges if sum(length for _, length in ranges) == into.numel() else None


def copy_vectors(sources: Sequence[ByteRows], targets: Sequence[ByteRows]) -> None:
    """Copy between vectors of the same total length, each list in its order."""
    if len(sources) == len(targets) == 1:
        targets[0][:] = sources[0]
        return
    waiting = iter(targets)
    target = next(waiting, None)
    for source in sources:
        while source.size and target is not None:
            count = min(source.size, target.size)
            target[:count] = source[:count]
            source, target = source[count:], target[count:]
            if not target.size:
                target = next(waiting, None)


def copy_with_digests(sources: Sequence[ByteRows], targets: Sequence[ByteRows], nbytes: int) -> bytes:
    """Copy ``nbytes`` from vectors to vectors; the digests of the extents as they were written, joined."""
    digests = []
    for start in range(0, nbytes, _BLOCK_BYTES):
        stop = min(start + _BLOCK_BYTES, nbytes)
        copy_vectors(_slices(sources, start, stop), _slices(targets, start, stop))
        digests.append(_digests(targets, start, stop))
    return b"".join(digests)


def verified(sources: Sequence[ByteRows], digests: bytes, start: int, stop: int) -> bool:
    """Whether extents of a payload are what they were: whole ones from ``start`` on, up to ``stop`` or its end."""
    return _digests(sources, start, stop) == _part(digests, start, stop)


def copy_verified(
    sources: Sequence[ByteRows], digests: bytes, nbytes: int, ranges: Iterable[ByteRange], into: ByteRows
) -> bool:
    """Lay ranges of a payload of ``nbytes`` into ``into``, one after the other; False when a byte is not what it was.

    Extents that are wanted whole are verified where they were copied to, others where they lie.
    """
    at = 0
    for offset, length in ranges:
        end = offset + length
        first = -(-offset // EXTENT_BYTES) * EXTENT_BYTES
        last = end if end == nbytes else end // EXTENT_BYTES * EXTENT_BYTES
        start = offset
        while start < end:
            stop = min(end, (start // _BLOCK_BYTES + 1) * _BLOCK_BYTES)
            target = into[at : at + stop - start]
            copy_vectors(_slices(sources, start, stop), [target])
            low, high = max(first, start), min(last, stop)
            if low < high and _digests([target], low - start, high - start) != _part(digests, low, high):
                return False
            at += stop - start
            start = stop
        edges = {offset // EXTENT_BYTES * EXTENT_BYTES} if offset < first and length else set()
        edges |= {last} if last < end and length else set()
        if not all(verified(sources, digests, edge, min(edge + EXTENT_BYTES, nbytes)) for edge in edges):
            return False
    return True


def _digests(vectors: Sequence[ByteRows], start: int, stop: int) -> bytes:
    """Digests of the extents from ``start`` to ``stop`` of vectors laid end to end, joined."""
    if len(vectors) == 1:
        return b"".join(map(_digest, _rows(vectors[0], start, stop)))
    joined = []
    for at in range(start, stop, EXTENT_BYTES):
        state = xxhash.xxh3_128()
        for part in _slices(vectors, at, min(at + EXTENT_BYTES, stop)):
            state.update(part.data)
        joined.append(state.digest())
    return b"".join(joined)


def _rows(vector: ByteRows, start: int, stop: int) -> Iterable[ByteRows]:
    """The extents from ``start`` to ``stop`` of a vector."""
    whole = stop - (stop - start) % EXTENT_BYTES
    rows = vector[start:whole].reshape(-1, EXTENT_BYTES)
    return rows if whole == stop else [*rows, vector[whole:stop]]


def _part(digests: bytes, start: int, stop: int) -> bytes:
    """The digests of the extents from byte ``start`` to byte ``stop`` of a payload."""
    return digests[start // EXTENT_BYTES * DIGEST_BYTES : -(-stop // EXTENT_BYTES) * DIGEST_BYTES]


def _slices(vectors: Sequence[ByteRows], start: int, stop: int) -> list[ByteRows]:
    """The bytes from ``start`` to ``stop`` of vectors laid end to end."""
    if len(vectors) == 1:
        return [vectors[0][start:stop]]
    parts = []
    for vector in vectors:
        if start < vector.size and stop > 0:
            parts.append(vector[max(0, start) : stop])
        start, stop = start - vector.size, stop - vector.size
    return parts
