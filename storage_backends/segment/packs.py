"""Rows of the index as blobs with digests: those of records by segment, and those of deleted ones."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash

from kvtier.storage_backends.segment.changes import Changes
from kvtier.storage_backends.segment.rows import GRAVE, ROW

__all__ = [
    "RECORDS",
    "TOMBSTONE",
    "TOMBSTONES",
    "GravePack",
    "Pack",
    "graves_digest",
    "pack_digest",
    "packs_of",
    "to_blob",
    "to_number",
]

RECORDS, TOMBSTONES = 0, 1
TOMBSTONE = np.dtype("<u8")


class Pack(NamedTuple):
    """Rows of one segment."""

    segment: int
    epoch: int
    kind: int
    rows: bytes
    digest: bytes


class GravePack(NamedTuple):
    """Rows of deleted records, all with sequence numbers below ``before``."""

    before: bytes
    rows: bytes
    digest: bytes


def packs_of(changes: Changes, epochs: dict[int, int], most: int) -> Iterator[Pack | GravePack]:
    """Blobs of rows, those of records by segment; rows of segments that are gone are left out."""
    rows = np.concatenate(changes.rows) if changes.rows else np.empty(0, dtype=ROW)
    for segment in np.unique(rows["at"]["segment"]).tolist():
        mine = rows[rows["at"]["segment"] == segment]
        for at in range(0, len(mine), most):
            if segment in epochs:
                yield _pack(segment, epochs[segment], RECORDS, mine[at : at + most].tobytes())
    for segment, offset in changes.tombstones:
        if segment in epochs:
            yield _pack(segment, epochs[segment], TOMBSTONES, np.asarray([offset], dtype=TOMBSTONE).tobytes())
    graves = np.concatenate(changes.graves) if changes.graves else np.empty(0, dtype=GRAVE)
    for at in range(0, len(graves), most):
        some = graves[at : at + most]
        before, packed = to_blob(int(some["before"].max())), some.tobytes()
        yield GravePack(before, packed, graves_digest(before, packed))


def _pack(segment: int, epoch: int, kind: int, rows: bytes) -> Pack:
    return Pack(segment, epoch, kind, rows, pack_digest(segment, epoch, kind, rows))


def pack_digest(segment: int, epoch: int, kind: int, rows: bytes) -> bytes:
    """Digest of a pack and of what it says of itself."""
    hasher = xxhash.xxh3_64(struct.pack("<QQQ", segment, epoch, kind))
    hasher.update(rows)
    return hasher.digest()


def graves_digest(before: bytes, rows: bytes) -> bytes:
    """Digest of a pack of graves."""
    return xxhash.xxh3_64_digest(before + rows)


def to_blob(number: int) -> bytes:
    """Numbers of 64 bits without a sign, which SQLite's integers are not; blobs compare like the numbers."""
    return number.to_bytes(8, "big")


def to_number(blob: bytes) -> int:
    """What `to_blob` made a blob of."""
    return int.from_bytes(blob, "big")
