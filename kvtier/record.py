"""The bytes on a medium: segment superblocks, record headers, tombstones. `docs/format.md` is their specification.

Everything is little-endian, of fixed layout, and checked before anything is allocated: a parser here sees bytes that
may be torn, stale, foreign or made up.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

import xxhash

from kvtier.errors import InputError, RecordFormatError, RecordVersionError

__all__ = [
    "BLOCK_BYTES",
    "DEFAULT_EXTENT_BYTES",
    "DIGEST_BYTES",
    "HEADER_EPOCH",
    "KEY_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_META_BYTES",
    "MAX_PAYLOAD_BYTES",
    "MAX_TENANT_BYTES",
    "SUPERBLOCK_BYTES",
    "Buffer",
    "Grave",
    "RecordHeader",
    "RecordKind",
    "SegmentKind",
    "Superblock",
    "check_start",
    "digest_extents",
    "header_bytes",
    "header_seed",
    "pack_graves",
    "parse_graves",
    "parse_header",
    "parse_superblock",
    "peek_header_bytes",
    "sealed",
]

Buffer: TypeAlias = bytes | bytearray | memoryview

BLOCK_BYTES = 4096
"""Headers, payloads and extents start and end at multiples of it; no current device asks direct transfers for more."""

SUPERBLOCK_BYTES = BLOCK_BYTES
KEY_BYTES = 32
"""Bytes of a key and of a namespace digest."""

DIGEST_BYTES = 16
"""Bytes of the xxh3-128 of an extent, in its canonical (big-endian) form."""

MAX_META_BYTES = 1024
"""Most bytes of opaque metadata that travel in a record's header."""

MAX_TENANT_BYTES = 64
"""Most bytes of a tenant's name in UTF-8."""

DEFAULT_EXTENT_BYTES = 64 << 10
MAX_EXTENT_BYTES = 16 << 20
MAX_PAYLOAD_BYTES = (1 << 32) - BLOCK_BYTES
MAX_HEADER_BYTES = 4 << 20

RECORD_MAGIC = b"KVTRECRD"
SEGMENT_MAGIC = b"KVTSEGMT"
RECORD_VERSION = SEGMENT_VERSION = 1
HEADER_EPOCH = slice(24, 32)  # bytes of a header that say its epoch

_CHECKED_FROM = 16  # the checksum covers everything behind itself
_HEADER = struct.Struct("<8sQHHIQQQQII32s32sIHHQ")
_SUPERBLOCK = struct.Struct("<8sQHHIQ16sQQ")
_GRAVE = struct.Struct("<32sQ")
_CHECKSUM_AT = 8
_CHECKSUM = struct.Struct("<Q")


class RecordKind(IntEnum):
    """What a header stands before."""

    RECORD = 1
    TOMBSTONE = 2


class SegmentKind(IntEnum):
    """What a segment holds."""

    FREE = 0
    CACHE = 1
    SPILL = 2


class Grave(NamedTuple):
    """One row of a tombstone: records under ``key`` with a sequence number below ``before`` are deleted."""

    key: bytes
    before: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """The first block of a segment.

    Parameters
    ----------
    kind : SegmentKind
    epoch : int
        Which life of the segment this is; grows with every one that any segment of the store begins.
    store : bytes
        16 bytes that name the store.
    segment_bytes : int
        Size of the segment, this block included.
    created_us : int
        Microseconds since 1970 when this life began.
    """

    kind: SegmentKind
    epoch: int
    store: bytes
    segment_bytes: int
    created_us: int = 0

    def pack(self) -> bytes:
        """The block, 4096 bytes."""
        fixed = _SUPERBLOCK.pack(
            SEGMENT_MAGIC, 0, SEGMENT_VERSION, self.kind, 0, self.epoch, self.store, self.segment_bytes, self.created_us
        )
        return sealed(fixed.ljust(SUPERBLOCK_BYTES, b"\0"), seed=0)


def parse_superblock(block: Buffer) -> Superblock:
    """Read the first block of a segment.

    Raises
    ------
    RecordFormatError
        These are not the bytes of a superblock, or (`RecordVersionError`) of a version that this code does not know.
    """
    if len(block) < SUPERBLOCK_BYTES:
        raise RecordFormatError(f"a superblock has {SUPERBLOCK_BYTES} bytes, got {len(block)}")
    view = memoryview(block)[:SUPERBLOCK_BYTES]
    magic, _, version, kind, _, epoch, store, size, created = _SUPERBLOCK.unpack_from(view)
    check_start(view, magic, SEGMENT_MAGIC, version, SEGMENT_VERSION, seed=0)
    if kind not in tuple(SegmentKind) or size % BLOCK_BYTES or size <= SUPERBLOCK_BYTES:
        raise RecordFormatError(f"a superblock of kind {kind} for {size} bytes makes no sense")
    return Superblock(kind=SegmentKind(kind), epoch=epoch, store=store, segment_bytes=size, created_us=created)


class RecordHeader(NamedTuple):
    """What stands before a payload; a tuple, since one is made for every record that is written or read.

    Parameters
    ----------
    key, namespace : bytes
        32 bytes each.
    payload_bytes : int
    sequence : int
        Position in the order of all puts and deletes of the store.
    epoch : int
        The life of the segment that the record was written into.
    digests : bytes
        16 bytes for each extent of the payload; the last extent may be short.
    tenant : str
    meta : bytes
    kind : RecordKind
    codec : int
        How the payload is encoded; 0 says that only its owner knows.
    created_us : int
        Microseconds since 1970.
    extent_bytes : int
    """

    key: bytes
    namespace: bytes
    payload_bytes: int
    sequence: int
    epoch: int
    digests: bytes
    tenant: str = "default"
    meta: bytes = b""
    kind: RecordKind = RecordKind.RECORD
    codec: int = 0
    created_us: int = 0
    extent_bytes: int = DEFAULT_EXTENT_BYTES

    @property
    def header_bytes(self) -> int:
        """Bytes of the header, whole blocks."""
        return header_bytes(self.payload_bytes, len(self.tenant.encode()), len(self.meta), self.extent_bytes)

    @property
    def record_bytes(self) -> int:
        """Bytes of header and payload, whole blocks."""
        return self.header_bytes + _whole_blocks(self.payload_bytes)

    def digest(self, extent: int) -> bytes:
        """Digest of one extent."""
        return self.digests[extent * DIGEST_BYTES : (extent + 1) * DIGEST_BYTES]

    def pack(self, seed: int) -> bytes:
        """The header, ``header_bytes`` long, sealed with a seed of `header_seed`.

        Raises
        ------
        InputError
            A field is longer or larger than the format can say.
        """
        packed = bytearray(self.header_bytes)
        self.pack_into(memoryview(packed), seed)
        return bytes(packed)

    def pack_into(self, block: memoryview, seed: int) -> None:
        """Write the header over zeros, ``header_bytes`` long; see `pack`."""
        tenant, meta, digests = self.tenant.encode(), self.meta, self.digests
        if not _can_be_said(self, len(tenant), block.nbytes):
            _refuse_fields(self, len(tenant))
        meta_at = _HEADER.size + len(tenant)
        digests_at = meta_at + len(meta)
        _HEADER.pack_into(
            block, 0, RECORD_MAGIC, 0, RECORD_VERSION, self.kind, block.nbytes, self.epoch, self.sequence,
            self.created_us, self.payload_bytes, self.extent_bytes, len(digests) // DIGEST_BYTES, self.key,
            self.namespace, self.codec, len(tenant), len(meta), 0,
        )  # fmt: skip
        block[_HEADER.size : digests_at + len(digests)] = b"".join((tenant, meta, digests))
        _CHECKSUM.pack_into(block, _CHECKSUM_AT, xxhash.xxh3_64_intdigest(block[_CHECKED_FROM:], seed))


def header_bytes(payload_bytes: int, tenant_bytes: int, meta_bytes: int, extent_bytes: int) -> int:
    """Bytes of a header, whole blocks."""
    extents = -(-payload_bytes // extent_bytes)
    return _whole_blocks(_HEADER.size + tenant_bytes + meta_bytes + extents * DIGEST_BYTES)


def header_seed(store: bytes, epoch: int) -> int:
    """Seed of the header checksums in one life of a segment: headers of other lives, stores or payloads do not pass."""
    return xxhash.xxh3_64_intdigest(store + _CHECKSUM.pack(epoch))


def peek_header_bytes(block: Buffer) -> int | None:
    """Length that a header claims, from its first block; None when that block starts no header."""
    if len(block) < _HEADER.size or bytes(memoryview(block)[: len(RECORD_MAGIC)]) != RECORD_MAGIC:
        return None
    size: int = _HEADER.unpack_from(block)[4]
    return size if size % BLOCK_BYTES == 0 and 0 < size <= MAX_HEADER_BYTES else None


def parse_header(data: Buffer, seed: int) -> RecordHeader:
    """Read a header of which all bytes are there.

    Raises
    ------
    RecordFormatError
        It is no header, is damaged, was written in another life of the segment, or has a version from the future.
    """
    size = peek_header_bytes(data)
    if size is None or size > len(data):
        raise RecordFormatError(f"no record header, or one longer than the {len(data)} bytes that are there")
    view = memoryview(data)[:size]
    (
        magic, _, version, kind, _, epoch, sequence, created, payload, extent, extents, key, namespace, codec,
        tenant_bytes, meta_bytes, reserved,
    ) = _HEADER.unpack_from(view)  # fmt: skip
    check_start(view, magic, RECORD_MAGIC, version, RECORD_VERSION, seed)
    _check_sizes(size, kind, payload, extent, extents, tenant_bytes, meta_bytes)
    meta_at = _HEADER.size + tenant_bytes
    digests_at = meta_at + meta_bytes
    padding = view[digests_at + extents * DIGEST_BYTES :]
    if reserved or padding != bytes(padding.nbytes):
        raise RecordFormatError("bytes without a meaning must be 0; the record is of a version from the future")
    try:
        tenant = str(view[_HEADER.size : meta_at], "utf-8")
    except UnicodeDecodeError as error:
        raise RecordFormatError(f"the tenant's name is not UTF-8 ({error})") from error
    return RecordHeader(
        key=key,
        namespace=namespace,
        payload_bytes=payload,
        sequence=sequence,
        epoch=epoch,
        digests=bytes(view[digests_at : digests_at + extents * DIGEST_BYTES]),
        tenant=tenant,
        meta=bytes(view[meta_at:digests_at]),
        kind=RecordKind(kind),
        codec=codec,
        created_us=created,
        extent_bytes=extent,
    )


def digest_extents(payload: Buffer, extent_bytes: int) -> bytes:
    """Digests of consecutive extents, 16 bytes each; the last may be short."""
    view = memoryview(payload)
    if 0 < view.nbytes <= extent_bytes:
        return xxhash.xxh3_128_digest(view)
    return b"".join(xxhash.xxh3_128_digest(view[at : at + extent_bytes]) for at in range(0, view.nbytes, extent_bytes))


def pack_graves(graves: Iterable[Grave]) -> bytes:
    """Payload of a tombstone."""
    return b"".join(_GRAVE.pack(key, before) for key, before in graves)


def parse_graves(payload: Buffer) -> list[Grave]:
    """Rows of a tombstone's payload.

    Raises
    ------
    RecordFormatError
        Its length is not a multiple of a row's.
    """
    if len(payload) % _GRAVE.size:
        raise RecordFormatError(f"a tombstone has rows of {_GRAVE.size} bytes, got {len(payload)} bytes")
    return [Grave(*row) for row in _GRAVE.iter_unpack(payload)]


def _whole_blocks(count: int) -> int:
    return -(-count // BLOCK_BYTES) * BLOCK_BYTES


def sealed(block: bytes, seed: int) -> bytes:
    """The block with the xxh3-64 of everything from byte 16 on in bytes 8 to 15."""
    checksum = xxhash.xxh3_64_intdigest(memoryview(block)[_CHECKED_FROM:], seed)
    return block[:_CHECKSUM_AT] + _CHECKSUM.pack(checksum) + block[_CHECKED_FROM:]


def check_start(view: memoryview, magic: bytes, expected: bytes, version: int, known: int, seed: int) -> None:
    """Refuse a structure of another kind, bytes that are not those that were sealed, and versions not known."""
    if magic != expected:
        raise RecordFormatError(f"required the magic {expected!r}, got {magic!r}")
    checksum = _CHECKSUM.unpack_from(view, _CHECKSUM_AT)[0]
    if xxhash.xxh3_64_intdigest(view[_CHECKED_FROM:], seed) != checksum:
        raise RecordFormatError("the checksum does not match: damaged, or of another place")
    if version != known:
        raise RecordVersionError(f"required version {known}, got {version}; read it with the release that wrote it")


def _check_sizes(
    size: int, kind: int, payload: int, extent: int, extents: int, tenant_bytes: int, meta_bytes: int
) -> None:
    """Refuse lengths that contradict each other, before any of them is used."""
    right = (
        kind in tuple(RecordKind)
        and payload <= MAX_PAYLOAD_BYTES
        and extent % BLOCK_BYTES == 0
        and 0 < extent <= MAX_EXTENT_BYTES
        and extents == -(-payload // extent)
        and 0 < tenant_bytes <= MAX_TENANT_BYTES
        and meta_bytes <= MAX_META_BYTES
        and size == header_bytes(payload, tenant_bytes, meta_bytes, extent)
    )
    if not right:
        raise RecordFormatError(
            f"a header of {size} bytes, kind {kind}, with {payload} bytes in {extents} extents of {extent}, a tenant "
            f"of {tenant_bytes} and meta of {meta_bytes} bytes contradicts itself"
        )


def _can_be_said(header: RecordHeader, tenant_bytes: int, size: int) -> bool:
    """Whether `parse_header` would take the fields back from a header of ``size`` bytes."""
    extent = header.extent_bytes
    return (
        len(header.key) == len(header.namespace) == KEY_BYTES
        and 0 < tenant_bytes <= MAX_TENANT_BYTES
        and len(header.meta) <= MAX_META_BYTES
        and 0 <= header.payload_bytes <= MAX_PAYLOAD_BYTES
        and BLOCK_BYTES <= extent <= MAX_EXTENT_BYTES
        and extent % BLOCK_BYTES == 0
        and len(header.digests) == -(-header.payload_bytes // extent) * DIGEST_BYTES
        and size <= MAX_HEADER_BYTES
    )


def _refuse_fields(header: RecordHeader, tenant_bytes: int) -> None:
    """Say which field cannot be said."""
    lengths: Sequence[tuple[str, int, int]] = (
        ("key", len(header.key), KEY_BYTES),
        ("namespace", len(header.namespace), KEY_BYTES),
        ("digests", len(header.digests), -(-header.payload_bytes // header.extent_bytes) * DIGEST_BYTES),
    )
    for name, got, required in lengths:
        if got != required:
            raise InputError(f"{name} must be {required} bytes, got {got}")
    bounds: Sequence[tuple[str, int, int, int]] = (
        ("tenant", tenant_bytes, 1, MAX_TENANT_BYTES),
        ("meta", len(header.meta), 0, MAX_META_BYTES),
        ("payload", header.payload_bytes, 0, MAX_PAYLOAD_BYTES),
        ("extent", header.extent_bytes, BLOCK_BYTES, MAX_EXTENT_BYTES),
        ("header", header.header_bytes, 0, MAX_HEADER_BYTES),
    )
    for name, got, least, most in bounds:
        if not least <= got <= most:
            raise InputError(f"{name} must have {least} to {most} bytes, got {got}")
    raise InputError(f"extent_bytes must be a multiple of {BLOCK_BYTES}, got {header.extent_bytes}")
