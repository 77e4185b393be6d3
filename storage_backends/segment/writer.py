"""Records onto a segment: headers and payloads in one stream of transfers, made while others are under way."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence

import torch
import xxhash

from kvtier.errors import CapacityError
from kvtier.record import BLOCK_BYTES, digest_extents, header_seed
from kvtier.storage_backends.engines import IOEngine, Transfer
from kvtier.storage_backends.engines.bounce import BouncePool
from kvtier.storage_backends.memory import ByteRows, empty_aligned
from kvtier.storage_backends.segment.draft import Draft
from kvtier.storage_backends.segment.pool import Segment

__all__ = ["RecordWriter"]

_STAGE_BYTES = 8 << 20
_IDLE_STAGES = 2

_MOST_STAGED_BYTES = 256 << 10
"""Of a payload. Smaller ones are copied behind their headers, as they will lie in the file: what was copied is digested
in the cache, the kernel gets one range of memory instead of two, and buffers need neither be aligned nor one."""


def _ignore(_: Draft) -> None:
    """Nothing else is needed."""


class RecordWriter:
    """Writes drafts that have places.

    Parameters
    ----------
    engine : IOEngine
    store : bytes
        16 bytes that name the store.

    Notes
    -----
    Any number of threads. Each call borrows a stage: memory that is there, since fresh pages cost as much as a digest.
    """

    def __init__(self, engine: IOEngine, store: bytes) -> None:
        self._engine = engine
        self._store = store
        self._stages = BouncePool(_STAGE_BYTES, _IDLE_STAGES)

    def write(self, drafts: Sequence[Draft], sealed: Callable[[Draft], None] = _ignore) -> None:
        """Write drafts; each says in ``error`` whether it failed.

        ``sealed`` is told of each that has its header, while the medium is busy: the time for what all wait for later.
        """
        try:
            with self._stages.buffer() as stage:
                stream = _Stream(drafts, self._store, stage.numpy(), sealed)
                results = self._engine.write(iter(stream))
        except CapacityError as error:
            for draft in drafts:
                draft.error = OSError(errno.ENOMEM, str(error))
            return
        for draft, failure in zip(stream.owners, results, strict=True):
            draft.error = draft.error or failure

    def close(self) -> None:
        """Give the stages back to the system."""
        self._stages.clear()


class _Stream:
    """The transfers of drafts, each made when it is drawn, and the draft that each belongs to."""

    def __init__(self, drafts: Sequence[Draft], store: bytes, stage: ByteRows, sealed: Callable[[Draft], None]) -> None:
        self._drafts = drafts
        self._store = store
        self._sealed = sealed
        self._stage = stage
        self._bytes = stage.data
        self._used = 0
        self._seeds: dict[int, int] = {}
        self.owners: list[Draft] = []

    def __iter__(self) -> Iterator[Transfer]:
        drawn = 0
        for draft in self._drafts:
            segment = draft.segment
            if segment is None:
                continue
            if draft.payload_bytes <= _MOST_STAGED_BYTES and self._used + draft.record_bytes <= self._stage.size:
                self.owners.append(draft)
                yield self._staged(draft, segment)
                drawn += draft.record_bytes
                continue
            # Where little is under way, a payload goes ahead of its header: it is digested meanwhile.
            header_first = drawn >= draft.payload_bytes
            if header_first:
                self.owners.append(draft)
                yield self._header(draft, segment)
            offset = draft.offset + draft.header_bytes
            for part in self._payload(draft):
                self.owners.append(draft)
                yield Transfer(segment.file, offset, part)
                offset += part.numel()
            if not header_first:
                self.owners.append(draft)
                yield self._header(draft, segment)
            drawn += draft.record_bytes

    def _staged(self, draft: Draft, segment: Segment) -> Transfer:
        """Header, payload and padding in one piece of the stage."""
        stage, start = self._stage, self._used
        self._used = end = start + draft.record_bytes
        payload = at = start + draft.header_bytes
        for buffer in draft.buffers:
            stage[at : at + buffer.numel()] = buffer.numpy()
            at += buffer.numel()
        if at < end:
            stage[at:end] = 0
        digests = digest_extents(self._bytes[payload:at], draft.extent_bytes)
        self._seal(draft, segment, digests, self._bytes[start:payload])
        return Transfer(segment.file, draft.offset, torch.from_numpy(stage[start:end]))

    def _header(self, draft: Draft, segment: Segment) -> Transfer:
        """The header alone."""
        header = self._take(draft.header_bytes)
        self._seal(draft, segment, _digests(draft.buffers, draft.extent_bytes), header.data)
        return Transfer(segment.file, draft.offset, torch.from_numpy(header))

    def _payload(self, draft: Draft) -> list[torch.Tensor]:
        """The payload in parts of whole blocks, where it lies as far as that is possible."""
        parts = [buffer for buffer in draft.buffers if buffer.numel()]
        if any(part.numel() % BLOCK_BYTES for part in parts[:-1]):
            joined = empty_aligned(draft.payload_bytes)
            torch.cat(parts, out=joined)
            parts = [joined]
        if rest := parts[-1].numel() % BLOCK_BYTES:
            last = parts.pop()
            block = self._take(BLOCK_BYTES)
            block[:rest] = last[-rest:].numpy()
            block[rest:] = 0
            parts += [last[:-rest]] if last.numel() > rest else []
            parts.append(torch.from_numpy(block))
        return parts

    def _seal(self, draft: Draft, segment: Segment, digests: bytes, block: memoryview) -> None:
        seed = self._seeds.get(segment.epoch)
        if seed is None:
            seed = self._seeds[segment.epoch] = header_seed(self._store, segment.epoch)
        block[:] = bytes(block.nbytes)
        draft.seal(segment.epoch, digests).pack_into(block, seed)
        self._sealed(draft)

    def _take(self, size: int) -> ByteRows:
        """Aligned memory of the stage, whole blocks; of the system, once the stage is used up."""
        at = self._used
        if at + size > self._stage.size:
            fresh: ByteRows = empty_aligned(size).numpy()
            return fresh
        self._used = at + size
        return self._stage[at : at + size]


def _digests(buffers: Sequence[torch.Tensor], extent_bytes: int) -> bytes:
    """Digests of the extents of buffers that follow one another."""
    views = [buffer.numpy().data for buffer in buffers if buffer.numel()]
    if all(view.nbytes % extent_bytes == 0 for view in views[:-1]):
        return b"".join(digest_extents(view, extent_bytes) for view in views)
    digests: list[bytes] = []
    hasher, room = xxhash.xxh3_128(), extent_bytes
    for view in views:
        at = 0
        while at < view.nbytes:
            taken = view[at : at + room]
            hasher.update(taken)
            at += taken.nbytes
            room -= taken.nbytes
            if not room:
                digests.append(hasher.digest())
                hasher, room = xxhash.xxh3_128(), extent_bytes
    if room < extent_bytes:
        digests.append(hasher.digest())
    return b"".join(digests)
