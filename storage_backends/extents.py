"""Copies between vectors of bytes, with a digest for every extent of 64 KiB: what is verified is what was copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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

_BLOCK_BYTES = 4 * EXTENT_BYTES  # copied, then digested while it is in the cache


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
    if into.dtype != torch.uint8 or into.ndim != 1 or not into.is_contiguous() or into.device.type != "cpu":
        raise InputError(
            f"into must be a contiguous uint8 vector on the CPU, got {into.dtype} {list(into.shape)} on {into.device}"
        )
    ranges = (ByteRange(0, payload_bytes),) if request.ranges is None else request.ranges
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
        for start, stop in _blocks(offset, offset + length):
            target = [into[at : at + stop - start]]
            copy_vectors(_slices(sources, start, stop), target)
            first = -(-start // EXTENT_BYTES) * EXTENT_BYTES
            last = stop if stop == nbytes else stop // EXTENT_BYTES * EXTENT_BYTES
            if first < last and _digests(target, first - start, last - start) != _part(digests, first, last):
                return False
            edges = {edge // EXTENT_BYTES * EXTENT_BYTES for edge in (start, stop) if edge % EXTENT_BYTES}
            for edge in edges:
                end = min(edge + EXTENT_BYTES, nbytes)
                whole = first <= edge and end <= last
                if not whole and _digests(sources, edge, end) != _part(digests, edge, end):
                    return False
            at += stop - start
    return True


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the multiples of a block."""
    while start < stop:
        end = min(stop, (start // _BLOCK_BYTES + 1) * _BLOCK_BYTES)
        yield start, end
        start = end


def _digests(vectors: Sequence[ByteRows], start: int, stop: int) -> bytes:
    """Digests of the extents from ``start`` to ``stop`` of vectors laid end to end, joined."""
    if len(vectors) == 1:
        whole = stop - (stop - start) % EXTENT_BYTES
        # Rows of an array cost less than slices of a memoryview.
        digests = [xxhash.xxh3_128_digest(row.data) for row in vectors[0][start:whole].reshape(-1, EXTENT_BYTES)]
        if whole < stop:
            digests.append(xxhash.xxh3_128_digest(vectors[0][whole:stop].data))
        return b"".join(digests)
    joined = []
    for at in range(start, stop, EXTENT_BYTES):
        state = xxhash.xxh3_128()
        for part in _slices(vectors, at, min(at + EXTENT_BYTES, stop)):
            state.update(part.data)
        joined.append(state.digest())
    return b"".join(joined)


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
