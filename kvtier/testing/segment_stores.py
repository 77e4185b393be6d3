"""Segment stores as tests open them: small, so that everything in them happens often; and records to put into them."""
# ruff: noqa: S101 - helpers of tests check what they get

from __future__ import annotations

from pathlib import Path

from kvtier.storage_backends.engines import IOEngine
from kvtier.storage_backends.records import PutState
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
from kvtier.storage_backends.segment.options import Durability
from kvtier.testing.record_samples import fetch, sample_bytes, sample_record

__all__ = [
    "CAPACITY",
    "MIB",
    "RELAXED_BYTES",
    "RELAXED_LOSS_BYTES",
    "RELAXED_LOSS_SECONDS",
    "RELAXED_SECONDS",
    "SIZE",
    "durable",
    "open_store",
    "put",
    "relaxed",
    "served",
]

MIB = 1 << 20
CAPACITY = 8 * MIB
SIZE = 50_000

RELAXED_BYTES = 256 << 10
RELAXED_SECONDS = 0.5

RELAXED_LOSS_BYTES = RELAXED_BYTES
"""What a power loss may take of what was acknowledged: a put that would pass the bound waits before it returns."""

RELAXED_LOSS_SECONDS = RELAXED_SECONDS + 5.0
"""Age of what a power loss may take, with patience for a busy machine."""


def durable(directory: Path, capacity_bytes: int) -> SegmentRecords:
    """A store that loses nothing it acknowledged."""
    return SegmentRecords(directory, SegmentOptions(capacity=capacity_bytes, index_seconds=0.05))


def relaxed(directory: Path, capacity_bytes: int) -> SegmentRecords:
    """A store that may lose the last `RELAXED_BYTES`, or the last `RELAXED_SECONDS`."""
    options = SegmentOptions(
        capacity=capacity_bytes,
        durability="relaxed",
        sync_bytes=RELAXED_BYTES,
        sync_seconds=RELAXED_SECONDS,
        index_seconds=RELAXED_SECONDS,
    )
    return SegmentRecords(directory, options)


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
