"""What memory and the index know of a record: one row of fixed size, and the row of one that was removed."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvtier.record import BLOCK_BYTES, RecordHeader
from kvtier.storage_backends.record_table import Rows, join_keys

__all__ = ["FIELDS", "GRAVE", "HEAT", "ROW", "Rows", "join_keys", "pack_row", "record_bytes", "rows_of", "unpack"]

FIELDS = np.dtype(
    [
        ("sequence", "<u8"),
        ("segment", "<u4"),
        ("block", "<u4"),  # where the header starts, in blocks of 4096 bytes
        ("payload", "<u4"),  # bytes
        ("created", "<u4"),  # seconds since 1970
        ("tenant", "<u4"),
        ("namespace", "<u4"),
        ("hits", "<u4"),
        ("header", "<u2"),  # blocks
        ("extent", "u1"),  # logarithm of its bytes to base 2
        ("touched", "u1"),  # 1 when it was read since it was written here
    ]
)
ROW = np.dtype([("key", "<u8", (4,)), ("at", FIELDS)])
GRAVE = np.dtype([("key", "<u8", (4,)), ("before", "<u8")])
_FIELDS = struct.Struct("<QIIIIIIIHBB")
_ROW = struct.Struct("<32sQIIIIIIIHBB")
HEAT = np.dtype([("key", "<u8", (4,)), ("hits", "<u4")])


def pack_row(header: RecordHeader, segment: int, offset: int, tenant: int, namespace: int) -> bytes:
    """One element of an array of `ROW`, as `rows_of` takes it."""
    return _ROW.pack(
        header.key,
        header.sequence,
        segment,
        offset // BLOCK_BYTES,
        header.payload_bytes,
        header.created_us // 1_000_000,
        tenant,
        namespace,
        0,
        header.header_bytes // BLOCK_BYTES,
        header.extent_bytes.bit_length() - 1,
        0,
    )


def rows_of(packed: Iterable[bytes]) -> Rows:
    """An array of `ROW` [n]; filling it field by field from tuples takes many times as long."""
    return np.frombuffer(bytearray(b"".join(packed)), dtype=ROW)


def unpack(at: Rows) -> list[tuple[int, ...]]:
    """Rows of `FIELDS` as plain numbers; numpy's ``tolist`` takes twice as long."""
    return list(_FIELDS.iter_unpack(at.tobytes()))


def record_bytes(at: Rows) -> npt.NDArray[np.int64]:
    """Bytes on the medium of records `FIELDS` [n], header and padding included."""
    payload = (at["payload"].astype(np.int64) + (BLOCK_BYTES - 1)) // BLOCK_BYTES
    blocks: npt.NDArray[np.int64] = (payload + at["header"]) * BLOCK_BYTES
    return blocks
