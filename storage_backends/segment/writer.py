"""Records onto a segment: headers and payloads in one batch of transfers, digests computed in the I/O threads."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import xxhash

from kvtier.errors import CapacityError
from kvtier.record import BLOCK_BYTES, RecordHeader, RecordKind, digest_extents, header_bytes, header_seed
from kvtier.storage_backends.engines import IOEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned, round_up
from kvtier.storage_backends.segment.pool import Segment

__all__ = ["Draft", "write_drafts"]


_NO_SPARE = torch.empty(0, dtype=torch.uint8)


@dataclass(slots=True, kw_only=True)
class Draft:
    """A record on its way to the medium.

    Attributes
    ----------
    payload_bytes, header_bytes, record_bytes : int
        Sizes; the last two in whole blocks.
    segment, offset
        Its place, once it has one.
    header : RecordHeader, optional
        Known when the digests are.
    error : OSError, optional
        Why it did not get there.
    """

    key: bytes
    namespace: bytes
    tenant: str
    meta: bytes
    buffers: Sequence[torch.Tensor]
    extent_bytes: int
    created_us: int
    kind: RecordKind = RecordKind.RECORD
    codec: int = 0
    sequence: int = 0
    segment: Segment | None = None
    offset: int = 0
    header: RecordHeader | None = None
    error: OSError | None = None
    payload_bytes: int = field(init=False)
    header_bytes: int = field(init=False)
    record_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.payload_bytes = sum(buffer.numel() for buffer in self.buffers)
        tenant = len(self.tenant.encode())
        self.header_bytes = header_bytes(self.payload_bytes, tenant, len(self.meta), self.extent_bytes)
        self.record_bytes = self.header_bytes + round_up(self.payload_bytes, BLOCK_BYTES)

    def seal(self, epoch: int) -> RecordHeader:
        """Compute the digests and build the header."""
        self.header = RecordHeader(
            key=self.key,
            namespace=self.namespace,
            payload_bytes=self.payload_bytes,
            sequence=self.sequence,
            epoch=epoch,
            digests=_digests(self.buffers, self.extent_bytes),
            tenant=self.tenant,
            meta=self.meta,
            kind=self.kind,
            codec=self.codec,
            created_us=self.created_us,
            extent_bytes=self.extent_bytes,
        )
        return self.header


def write_drafts(engine: IOEngine, drafts: Sequence[Draft], store: bytes) -> None:
    """Write drafts that have places; each says in ``error`` whether it failed."""
    try:
        _write(engine, drafts, store)
    except CapacityError as error:
        for draft in drafts:
            draft.error = OSError(errno.ENOMEM, str(error))


def _write(engine: IOEngine, drafts: Sequence[Draft], store: bytes) -> None:
    memory = empty_aligned(sum(draft.header_bytes + BLOCK_BYTES for draft in drafts))
    transfers: list[Transfer] = []
    owners: list[Draft] = []
    headers: dict[int, tuple[Draft, Segment, torch.Tensor]] = {}
    at = 0
    for draft in drafts:
        segment = draft.segment
        if segment is None:
            continue
        head = memory[at : at + draft.header_bytes]
        spare = memory[at + draft.header_bytes :][:BLOCK_BYTES] if draft.payload_bytes % BLOCK_BYTES else _NO_SPARE
        at += draft.header_bytes + BLOCK_BYTES
        headers[len(transfers)] = (draft, segment, head)
        offset = draft.offset
        for part in (head, *_padded(draft.buffers, spare)):
            transfers.append(Transfer(segment.file, offset, part))
            owners.append(draft)
            offset += part.numel()

    seeds = {segment.number: header_seed(store, segment.epoch) for _, segment, _ in headers.values()}

    def seal(index: int) -> None:
        if index in headers:
            draft, segment, head = headers[index]
            draft.seal(segment.epoch).pack_into(head.numpy().data, seeds[segment.number])

    for draft, error in zip(owners, engine.write(transfers, before=seal), strict=True):
        draft.error = draft.error or error


def _padded(buffers: Sequence[torch.Tensor], spare: torch.Tensor) -> list[torch.Tensor]:
    """The payload in parts of whole blocks; ``spare`` [4096], zeroed, takes what is left of the last."""
    if len(buffers) == 1 and buffers[0].numel() and not buffers[0].numel() % BLOCK_BYTES:
        return [buffers[0]]
    parts = [buffer for buffer in buffers if buffer.numel()]
    if any(part.numel() % BLOCK_BYTES for part in parts[:-1]):
        joined = empty_aligned(sum(part.numel() for part in parts))
        torch.cat(parts, out=joined)
        parts = [joined]
    if parts and (rest := parts[-1].numel() % BLOCK_BYTES):
        last = parts.pop()
        spare[:rest] = last[-rest:]
        parts += [last[:-rest], spare] if last.numel() > rest else [spare]
    return parts


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
