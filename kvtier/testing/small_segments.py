"""Small segment stores for tests, and records in them that say what they are."""
# ruff: noqa: S101 - helpers of tests check what they get

from __future__ import annotations

from pathlib import Path

from kvtier.storage_backends.engines import IOEngine
from kvtier.storage_backends.records import PutState
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
from kvtier.storage_backends.segment.options import Durability
from kvtier.testing.record_samples import fetch, sample_bytes, sample_record

__all__ = ["CAPACITY", "MIB", "SIZE", "open_durable", "open_relaxed", "open_store", "put", "served"]

MIB = 1 << 20
CAPACITY = 8 * MIB
SIZE = 50_000


def open_store(
    directory: Path,
    *,
    capacity: int = CAPACITY,
    durability: Durability = "durable",
    engine: IOEngine | None = None,
    read_only: bool = False,
) -> SegmentRecords:
    """A store of eight segments of 1 MiB at most."""
    options = SegmentOptions(capacity=capacity, durability=durability)
    return SegmentRecords(directory, options, engine=engine, read_only=read_only)


def open_durable(directory: Path, capacity_bytes: int) -> SegmentRecords:
    """A durable store."""
    return SegmentRecords(directory, SegmentOptions(capacity=capacity_bytes))


def open_relaxed(directory: Path, capacity_bytes: int) -> SegmentRecords:
    """A store that may lose what it was given last: a mebibyte, or what came within a fifth of a second."""
    options = SegmentOptions(capacity=capacity_bytes, durability="relaxed", sync_bytes=MIB, sync_seconds=0.2)
    return SegmentRecords(directory, options)


def put(store: SegmentRecords, *numbers: int, size: int = SIZE, generation: int = 0) -> None:
    """Put records, one call each, all of them stored."""
    for number in numbers:
        (outcome,) = store.put([sample_record(number, size, generation=generation)])
        assert outcome.state is PutState.STORED, outcome


def served(store: SegmentRecords, number: int, size: int = SIZE, generation: int = 0) -> bool:
    """Whether a record is served, right; anything wrong fails the test."""
    payload = fetch(store, number, size)
    assert payload in (None, sample_bytes(number, generation, size)), f"wrong bytes of record {number}"
    return payload is not None
