"""How large everything in a segment directory may be, so that its files never hold more than the capacity."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvtier.errors import ConfigError, StorageError
from kvtier.record import BLOCK_BYTES, DEFAULT_EXTENT_BYTES, MAX_EXTENT_BYTES, SUPERBLOCK_BYTES
from kvtier.types import format_bytes

__all__ = ["SEGMENT_NAME", "Durability", "Geometry", "SegmentOptions", "options_of"]

SEGMENT_NAME = re.compile(r"segment-(\d{8})\.kvt")
"""Names of segment files."""

Durability = Literal["durable", "relaxed"]

_DEFAULT_SEGMENT_BYTES = 1 << 30
_LEAST_SEGMENT_BYTES = 64 << 10
_LEAST_SEGMENTS = 3  # one that is written, one that is cleared, one that is kept
_FIXED_BYTES = 64 << 10  # lock file, directory blocks
_LEAST_INDEX_BYTES = 512 << 10
_MOST_LOG_BYTES = 4 << 20
_LEAST_CAPACITY = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentOptions:
    """Settings of a segment directory.

    Parameters
    ----------
    capacity : int
        Bytes; the hard bound on what all files of the directory hold, index and log included.
    segment_bytes : int, optional
        Size of a segment; 1 GiB when None. At most an eighth of the capacity: a larger one is reduced to that.
    durability : "durable" | "relaxed"
        Durable: a record that was put survives a power loss. Relaxed: it may be lost until ``sync_bytes`` more bytes or
        ``sync_seconds`` have gone by.
    extent_bytes : int
        Unit of digests and of reads.
    index_seconds : float
        How far the index may lie behind; the time to open after a crash grows with it.
    """

    capacity: int
    segment_bytes: int | None = None
    durability: Durability = "durable"
    sync_bytes: int = 256 << 20
    sync_seconds: float = 1.0
    extent_bytes: int = DEFAULT_EXTENT_BYTES
    index_seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.durability not in ("durable", "relaxed"):
            raise ConfigError(f'durability must be "durable" or "relaxed", got {self.durability!r}')
        if self.sync_bytes < 1 or self.sync_seconds <= 0 or self.index_seconds <= 0:
            raise ConfigError("sync_bytes, sync_seconds and index_seconds must be above 0")
        extent = self.extent_bytes
        if not BLOCK_BYTES <= extent <= MAX_EXTENT_BYTES or extent & (extent - 1):
            raise ConfigError(f"extent_bytes must be a power of two from 4096 to {MAX_EXTENT_BYTES}, got {extent}")

    def geometry(self) -> Geometry:
        """Divide the capacity.

        Raises
        ------
        ConfigError
            The capacity is too small for three segments and the index, or a segment is.
        """
        index = max(_LEAST_INDEX_BYTES, self.capacity // 64)
        wanted = _DEFAULT_SEGMENT_BYTES if self.segment_bytes is None else self.segment_bytes
        if self.segment_bytes is not None and self.segment_bytes < _LEAST_SEGMENT_BYTES:
            raise ConfigError(f"segment_bytes must be at least {_LEAST_SEGMENT_BYTES}, got {self.segment_bytes}")
        segment = max(_LEAST_SEGMENT_BYTES, min(wanted, self.capacity // 8) // BLOCK_BYTES * BLOCK_BYTES)
        geometry = Geometry(self.capacity, segment, index)
        if geometry.segments < _LEAST_SEGMENTS:
            least = index + _FIXED_BYTES + _LEAST_SEGMENTS * geometry.segment_cost(segment)
            raise ConfigError(
                f"required room for {_LEAST_SEGMENTS} segments of {format_bytes(segment)} and an index of "
                f"{format_bytes(index)}, got a capacity of {format_bytes(self.capacity)}; give at least "
                f"{format_bytes(least)}"
            )
        return geometry


@dataclass(frozen=True, slots=True)
class Geometry:
    """The capacity, divided: segments, index, and what file systems add."""

    capacity: int
    segment_bytes: int
    index_bytes: int

    @property
    def for_segments(self) -> int:
        """Bytes that segments may hold."""
        return self.capacity - self.index_bytes - _FIXED_BYTES

    @property
    def segments(self) -> int:
        """Most segments at once."""
        return max(0, self.for_segments) // self.segment_cost(self.segment_bytes)

    @staticmethod
    def segment_cost(segment_bytes: int) -> int:
        """What a segment is reckoned at: its size and the file system's own tables for it."""
        return segment_bytes + max(16 << 10, segment_bytes // 1024)

    @property
    def log_bytes(self) -> int:
        """Most bytes of the index's write-ahead log."""
        return min(_MOST_LOG_BYTES, self.index_bytes * 3 // 8)

    @property
    def database_bytes(self) -> int:
        """Most bytes of the index without its log."""
        return self.index_bytes - self.log_bytes

    @property
    def most_record_bytes(self) -> int:
        """Largest record, header included."""
        return self.segment_bytes - 2 * SUPERBLOCK_BYTES


def options_of(directory: Path) -> SegmentOptions:
    """Settings that fit a directory as it is: for looking at it, and for repairs, without its configuration.

    Raises
    ------
    StorageError
        There is no such directory, or no store in it.
    """
    try:
        files = {path.name: path.stat().st_size for path in directory.iterdir()}
    except OSError as error:
        raise StorageError(f"cannot look into {directory}: {error.strerror}; is the path right?") from error
    sizes = [size for name, size in files.items() if SEGMENT_NAME.fullmatch(name)]
    if not sizes and "lock" not in files:
        raise StorageError(f"required a store in {directory}, got no segment and no lock; is the path right?")
    needed = sum(Geometry.segment_cost(size) for size in sizes) + _FIXED_BYTES
    return SegmentOptions(capacity=max(_LEAST_CAPACITY, needed * 64 // 63 + _LEAST_INDEX_BYTES))
