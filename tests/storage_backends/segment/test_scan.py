"""Looking through a segment: gaps, torn records, remains of earlier lives and made-up headers are skipped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.record import BLOCK_BYTES, RecordHeader, digest_extents, header_seed
from kvtier.storage_backends.engines import PosixEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned
from kvtier.storage_backends.segment.pool import Segment
from kvtier.storage_backends.segment.scan import scan_segment

STORE = bytes(range(16))
EPOCH = 9
SIZE = 1 << 20

Part = tuple[str, int]
parts = st.lists(
    st.tuples(st.sampled_from(["record", "noise", "zeros", "torn", "stale", "cut"]), st.integers(0, 70_000)),
    max_size=12,
)


def packed(number: int, payload: bytes, epoch: int = EPOCH) -> bytes:
    header = RecordHeader(
        key=number.to_bytes(32, "little"),
        namespace=bytes(32),
        payload_bytes=len(payload),
        sequence=number + 1,
        epoch=epoch,
        digests=digest_extents(payload, 65_536),
    )
    return padded(header.pack(header_seed(STORE, epoch)) + payload)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK_BYTES)


def lay_out(layout: list[Part]) -> tuple[bytes, dict[int, int]]:
    """A segment's bytes, and where the good records are."""
    data, good = bytearray(BLOCK_BYTES), {}
    for number, (kind, size) in enumerate(layout):
        payload = np.random.default_rng(number).bytes(size)
        match kind:
            case "record":
                good[number] = len(data)
                data += packed(number, payload)
            case "noise":
                data += padded(payload)
            case "zeros":
                data += padded(bytes(size))
            case "torn" if size:
                torn = bytearray(packed(number, payload))
                torn[BLOCK_BYTES + size // 2] ^= 1
                data += torn
            case "stale":
                data += packed(number, payload, epoch=EPOCH - 1)
            case "cut":
                data += packed(number, payload)[:BLOCK_BYTES]
    return bytes(data), good


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(layout=parts)
def test_every_good_record_is_found_and_nothing_else(tmp_path: Path, layout: list[Part]) -> None:
    data, good = lay_out(layout)
    if len(data) > SIZE:
        return
    with PosixEngine(threads=2) as engine:
        segment = written(engine, tmp_path / "segment", data)
        told: list[int] = []
        records, scan = scan_segment(engine, segment, BLOCK_BYTES, STORE, told.append)
        segment.file.close()
    found = {record.header.sequence - 1: record.offset for record in records}
    # A header that was cut off before its payload is whole when there is no payload.
    whole = {number for number, (kind, size) in enumerate(layout) if kind == "cut" and size == 0}
    assert {number: at for number, at in found.items() if number not in whole} == good
    assert sum(told) >= SIZE - BLOCK_BYTES
    if good:
        assert scan.end >= max(good.values())


def test_a_record_larger_than_the_window_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.storage_backends.segment.scan._WINDOW_BYTES", 16 << 10)
    data, good = lay_out([("noise", 5000), ("record", 200_000), ("record", 10), ("record", 70_000)])
    with PosixEngine(threads=2) as engine:
        segment = written(engine, tmp_path / "segment", data)
        records, _ = scan_segment(engine, segment, BLOCK_BYTES, STORE, lambda _: None)
        segment.file.close()
    assert {record.header.sequence - 1: record.offset for record in records} == good


def test_a_header_inside_a_payload_is_not_a_record(tmp_path: Path) -> None:
    """Not even when the record around it is torn: its seed is not known to whoever makes payloads."""
    forged = bytearray(packed(7, b"forged"))
    forged[8:16] = bytes(8)
    outer = bytearray(packed(1, bytes(BLOCK_BYTES) + bytes(forged)))
    outer[BLOCK_BYTES] ^= 1
    with PosixEngine(threads=2) as engine:
        segment = written(engine, tmp_path / "segment", bytes(BLOCK_BYTES) + bytes(outer))
        records, scan = scan_segment(engine, segment, BLOCK_BYTES, STORE, lambda _: None)
        segment.file.close()
    assert records == []
    assert [header.sequence for header in scan.torn] == [2]


def written(engine: PosixEngine, path: Path, data: bytes) -> Segment:
    path.unlink(missing_ok=True)
    file = engine.open(path, writable=True, create=True)
    file.allocate(SIZE)
    buffer = empty_aligned(SIZE)
    buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    assert engine.write([Transfer(file, 0, buffer)]) == [None]
    return Segment(1, file, SIZE, epoch=EPOCH)
