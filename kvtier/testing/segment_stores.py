"""Segment stores as the crash and fault tests open them: small, so that everything in them happens often."""

from __future__ import annotations

from pathlib import Path

from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords

__all__ = ["RELAXED_BYTES", "RELAXED_LOSS_BYTES", "RELAXED_LOSS_SECONDS", "RELAXED_SECONDS", "durable", "relaxed"]

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
