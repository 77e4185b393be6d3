"""The first block of a saved session: where the parts of the file are, and what proves them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from kvtier.errors import RecordFormatError
from kvtier.record import BLOCK_BYTES, DEFAULT_EXTENT_BYTES, DIGEST_BYTES, MAX_EXTENT_BYTES, Buffer, check_start, sealed
from kvtier.storage_backends.memory import round_up

__all__ = ["SavedHeader", "check_part", "parse_saved_header"]

SAVED_MAGIC = b"KVTSESSN"
SAVED_VERSION = 1

_FIXED = struct.Struct("<8sQHHIQQQ16s16s")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedHeader:
    """The parts lie one after the other, in whole blocks: this header, payload, digests of its extents, description.

    Parameters
    ----------
    payload_bytes, description_bytes : int
        Whole blocks, padding included.
    created_us : int
        Microseconds since 1970.
    digests_digest, description_digest : bytes
        xxh3-128 of those parts, padding included.
    extent_bytes : int
        Bytes of the payload that one digest covers.
    """

    payload_bytes: int
    description_bytes: int
    created_us: int
    digests_digest: bytes
    description_digest: bytes
    extent_bytes: int = DEFAULT_EXTENT_BYTES

    @property
    def digests_at(self) -> int:
        """Where the digests begin."""
        return BLOCK_BYTES + self.payload_bytes

    @property
    def digests_bytes(self) -> int:
        """Bytes of the digests, padded to whole blocks."""
        return round_up(-(-self.payload_bytes // self.extent_bytes) * DIGEST_BYTES, BLOCK_BYTES)

    @property
    def description_at(self) -> int:
        """Where the description begins."""
        return self.digests_at + self.digests_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.description_at + self.description_bytes

    def pack(self) -> bytes:
        """The block."""
        fixed = _FIXED.pack(
            SAVED_MAGIC, 0, SAVED_VERSION, 0, self.extent_bytes, self.created_us, self.payload_bytes,
            self.description_bytes, self.digests_digest, self.description_digest,
        )  # fmt: skip
        return sealed(fixed.ljust(BLOCK_BYTES, b"\0"), seed=0)


def parse_saved_header(block: Buffer, file_bytes: int) -> SavedHeader:
    """Read the first block of a file of ``file_bytes``.

    Raises
    ------
    RecordFormatError
        It is no saved session, is damaged or cut short, or of a version that this code does not know.
    """
    if len(block) < BLOCK_BYTES:
        raise RecordFormatError(f"a saved session has at least {BLOCK_BYTES} bytes, got {len(block)}")
    view = memoryview(block)[:BLOCK_BYTES]
    magic, _, version, reserved, extent, created, payload, description, digests, described = _FIXED.unpack_from(view)
    check_start(view, magic, SAVED_MAGIC, version, SAVED_VERSION, seed=0)
    if reserved or any(view[_FIXED.size :]):
        raise RecordFormatError("bytes without a meaning must be 0; the file is of a version from the future")
    if extent % BLOCK_BYTES or not 0 < extent <= MAX_EXTENT_BYTES or (payload | description) % BLOCK_BYTES:
        raise RecordFormatError(
            f"extents of {extent}, a payload of {payload} and a description of {description} bytes make no sense"
        )
    header = SavedHeader(
        payload_bytes=payload,
        description_bytes=description,
        created_us=created,
        digests_digest=digests,
        description_digest=described,
        extent_bytes=extent,
    )
    if header.file_bytes != file_bytes:
        raise RecordFormatError(f"the file must have {header.file_bytes} bytes, got {file_bytes}: cut or extended")
    return header


def check_part(what: str, part: Buffer, digest: bytes) -> None:
    """Refuse a part whose xxh3-128 is another.

    Raises
    ------
    RecordFormatError
    """
    if xxhash.xxh3_128_digest(part) != digest:
        raise RecordFormatError(f"{what} is damaged: its digest does not match")
