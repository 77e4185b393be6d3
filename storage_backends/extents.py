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
    "VerifiedCopy",
    "copy_vectors",
    "copy_with_digests",
    "digest_bytes",
    "ranges_within",
    "verified",
]

EXTENT_BYTES = 64 << 10
"""Bytes under one digest; the last extent of a payload may be shorter."""

DIGEST_BYTES = 16
"""Bytes of a digest, xxh3-128."""

_BLOCK_EXTENTS = 8  # copied, then digested while they are in the cache

# An array is a buffer, though its type says so from Python 3.12 on only; to make a memoryview costs more than the call.
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
    for start in range(0, nbytes, _BLOCK_EXTENTS * EXTENT_BYTES):
        stop = min(start + _BLOCK_EXTENTS * EXTENT_BYTES, nbytes)
        copy_vectors(_slices(sources, start, stop), _slices(targets, start, stop))
        digests.append(_digests(targets, start, stop))
    return b"".join(digests)


def verified(sources: Sequence[ByteRows], digests: bytes, start: int, stop: int) -> bool:
    """Whether extents of a payload are what they were: whole ones from ``start`` on, up to ``stop`` or its end."""
    return _digests(sources, start, stop) == _part(digests, start, stop)


class VerifiedCopy:
    """A copy out of a payload that is verified as it goes; what Python can do before a byte moves is done here.

    Copying puts all that Python works with out of the caches, so it should find little to do between two copies.

    Parameters
    ----------
    sources : sequence of ByteRows
        The payload as vectors laid end to end; more may follow behind it.
    digests : bytes
        Of all its extents.
    nbytes : int
        Of the payload.
    ranges : iterable of ByteRange
        Laid into ``into``, one after the other.
    into : ByteRows
    """

    __slots__ = ("_digests", "_into", "_nbytes", "_rest", "_runs", "_sources")

    def __init__(
        self, sources: Sequence[ByteRows], digests: bytes, nbytes: int, ranges: Iterable[ByteRange], into: ByteRows
    ) -> None:
        self._sources, self._digests, self._nbytes, self._into = sources, digests, nbytes, into
        self._runs: list[tuple[ByteRows, ByteRows, bytes]] = []  # whole extents [n, bytes], from and to, and digests
        self._rest: list[tuple[int, int, int]] = []  # where in ``into``, from which byte of the payload to which
        at = 0
        for start, length in ranges:
            stop, shift = start + length, at - start
            first, last = -(-start // EXTENT_BYTES) * EXTENT_BYTES, stop // EXTENT_BYTES * EXTENT_BYTES
            if first >= last or len(sources) > 1:
                first = last = stop
            else:
                source, target = sources[0][first:last], into[first + shift : last + shift]
                rows = source.reshape(-1, EXTENT_BYTES), target.reshape(-1, EXTENT_BYTES)
                self._runs.append((*rows, _part(digests, first, last)))
            if start < first:
                self._rest.append((at, start, first))
            if last < stop:
                self._rest.append((last + shift, last, stop))
            at += length

    def run(self) -> bool:
        """Copy; False when a byte is not what it was: then nothing of ``into`` may be used.

        Extents that are wanted whole are verified where they were copied to, others where they lie.
        """
        for source, target, digests in self._runs:
            found: list[bytes] = []
            for at in range(0, len(source), _BLOCK_EXTENTS):
                block = target[at : at + _BLOCK_EXTENTS]
                block[:] = source[at : at + _BLOCK_EXTENTS]
                found += map(_digest, block)
            if b"".join(found) != digests:
                return False
        return all(self._copy_singly(*part) for part in self._rest)

    def _copy_singly(self, at: int, start: int, stop: int) -> bool:
        """Copy extents one by one, from byte ``start`` of the payload to byte ``stop``, and verify them."""
        while start < stop:
            extent = start // EXTENT_BYTES * EXTENT_BYTES
            end = min(extent + EXTENT_BYTES, self._nbytes)
            upto = min(stop, end)
            target = self._into[at : at + upto - start]
            copy_vectors(_slices(self._sources, start, upto), [target])
            whole = start == extent and upto == end
            found = _digests([target], 0, target.size) if whole else _digests(self._sources, extent, end)
            if found != _part(self._digests, extent, end):
                return False
            at, start = at + target.size, upto
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
