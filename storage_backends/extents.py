"""Copies between memory and vectors, with a digest for every extent of 64 KiB: what is verified is what was copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import xxhash

from kvtier.errors import InputError
from kvtier.storage_backends.memory import ByteRows
from kvtier.storage_backends.records import ByteRange, ReadRequest

__all__ = ["DIGEST_BYTES", "EXTENT_BYTES", "copy_verified", "copy_with_digests", "digest_bytes", "ranges_within"]

EXTENT_BYTES = 64 << 10
"""Bytes under one digest; the last extent of a payload may be shorter."""

DIGEST_BYTES = 16
"""Bytes of a digest, xxh3-128."""


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


def copy_with_digests(sources: Sequence[ByteRows], targets: Sequence[ByteRows], nbytes: int) -> bytes:
    """Copy ``nbytes`` from vectors to vectors, each list in its order; the digests of the extents, joined.

    Each extent is digested where it was copied to, while it is in the cache.
    """
    digests = []
    for offset in range(0, nbytes, EXTENT_BYTES):
        length = min(EXTENT_BYTES, nbytes - offset)
        written = _slices(targets, offset, length)
        _copy(_slices(sources, offset, length), written)
        digests.append(_digest(written))
    return b"".join(digests)


def copy_verified(
    sources: Sequence[ByteRows], digests: bytes, nbytes: int, ranges: Iterable[ByteRange], into: ByteRows
) -> bool:
    """Lay ranges of a payload of ``nbytes`` into ``into``, one after the other; False when a byte is not what it was.

    An extent that is wanted whole is verified where it was copied to, another one where it lies.
    """
    at = 0
    for offset, length in ranges:
        for start in range(offset // EXTENT_BYTES * EXTENT_BYTES, offset + length, EXTENT_BYTES):
            end = min(start + EXTENT_BYTES, nbytes)
            first, last = max(start, offset), min(end, offset + length)
            target = into[at : at + last - first]
            _copy(_slices(sources, first, last - first), [target])
            whole = (first, last) == (start, end)
            found = _digest([target] if whole else _slices(sources, start, end - start))
            place = start // EXTENT_BYTES * DIGEST_BYTES
            if found != digests[place : place + DIGEST_BYTES]:
                return False
            at += last - first
    return True


def _digest(parts: Sequence[ByteRows]) -> bytes:
    if len(parts) == 1:
        return xxhash.xxh3_128_digest(parts[0].data)
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part.data)
    return state.digest()


def _slices(vectors: Sequence[ByteRows], offset: int, length: int) -> list[ByteRows]:
    """The bytes from ``offset`` on of vectors laid end to end."""
    if len(vectors) == 1:
        return [vectors[0][offset : offset + length]]
    return list(_walk(vectors, offset, length))


def _walk(vectors: Sequence[ByteRows], offset: int, length: int) -> Iterator[ByteRows]:
    for vector in vectors:
        if length == 0:
            return
        part = vector[offset : offset + length] if offset < vector.size else vector[:0]
        offset = max(0, offset - vector.size)
        length -= part.size
        if part.size:
            yield part


def _copy(sources: Sequence[ByteRows], targets: Sequence[ByteRows]) -> None:
    """Copy between lists of vectors of the same total length."""
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
