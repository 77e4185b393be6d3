"""A record on its way to the medium: what it is, where it goes, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvtier.record import BLOCK_BYTES, RecordHeader, RecordKind, header_bytes
from kvtier.storage_backends.memory import round_up
from kvtier.storage_backends.segment.pool import Segment
from kvtier.storage_backends.segment.rows import pack_row

__all__ = ["Draft"]


@dataclass(slots=True, kw_only=True, eq=False)
class Draft:
    """A record on its way to the medium.

    Attributes
    ----------
    payload_bytes, header_bytes, record_bytes : int
        Sizes; the last two in whole blocks.
    tenant_number, namespace_number : int
        What its row says of them.
    segment, offset
        Its place, once it has one.
    header : RecordHeader, optional
        Known when the digests are.
    row : bytes
        One element of an array of `ROW`, once it was made.
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
    tenant_number: int = 0
    namespace_number: int = 0
    segment: Segment | None = None
    offset: int = 0
    header: RecordHeader | None = None
    row: bytes = b""
    error: OSError | None = None
    payload_bytes: int = field(init=False)
    header_bytes: int = field(init=False)
    record_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        payload = 0
        for buffer in self.buffers:
            payload += buffer.numel()
        self.payload_bytes = payload
        self.header_bytes = header_bytes(payload, len(self.tenant.encode()), len(self.meta), self.extent_bytes)
        self.record_bytes = self.header_bytes + round_up(payload, BLOCK_BYTES)

    @property
    def arrived(self) -> bool:
        """Whether it was written, as far as is known."""
        return self.header is not None and self.error is None

    def seal(self, epoch: int, digests: bytes) -> RecordHeader:
        """Build the header, for the life of a segment."""
        self.header = header = RecordHeader(
            self.key, self.namespace, self.payload_bytes, self.sequence, epoch, digests, self.tenant, self.meta,
            self.kind, self.codec, self.created_us, self.extent_bytes,
        )  # fmt: skip
        return header

    def make_row(self) -> None:
        """Make the row of a record that has its place and its header."""
        if self.segment is not None and self.header is not None:
            number = self.segment.number
            self.row = pack_row(self.header, number, self.offset, self.tenant_number, self.namespace_number)
