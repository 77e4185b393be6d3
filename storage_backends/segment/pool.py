"""The segments of a directory: preallocated files that are taken and given back whole, within a hard bound of bytes."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvtier.record import SUPERBLOCK_BYTES, SegmentKind, Superblock
from kvtier.storage_backends import failpoints
from kvtier.storage_backends.engines import EngineFile, IOEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned
from kvtier.storage_backends.segment.options import SEGMENT_NAME, Geometry
from kvtier.storage_backends.segment.sync import GroupSync

__all__ = ["Segment", "SegmentPool", "sync_directory"]

failpoints.NAMES |= {
    "segment.create.before-allocate",
    "segment.create.after-allocate",
    "segment.create.after-directory-sync",
    "superblock.before-write",
    "superblock.before-sync",
    "superblock.after-sync",
}

_logger = logging.getLogger("kvtier.storage_backends.segment")


@dataclass(eq=False, slots=True)
class Segment:
    """An open segment. Who uses it keeps what changes here under one lock.

    Attributes
    ----------
    epoch : int
        The life it is in.
    cursor : int
        Where the next record goes.
    in_flight : set of int
        Offsets of records that are being written.
    min_sequence : int
        Lowest sequence number of a record that was ever written in this life.
    pins : int
        Readers that are at it; it is not given back before they leave.
    leaving : bool
        It is being cleared: nothing new goes in.
    """

    number: int
    file: EngineFile
    size: int
    kind: SegmentKind = SegmentKind.FREE
    epoch: int = 0
    cursor: int = SUPERBLOCK_BYTES
    in_flight: set[int] = field(default_factory=set)
    min_sequence: int = 1 << 63
    pins: int = 0
    leaving: bool = False
    sync: GroupSync = field(init=False)

    def __post_init__(self) -> None:
        self.sync = GroupSync(self.file.sync)

    @property
    def end(self) -> int:
        """Where records must end: the last block says again what the first one does."""
        return self.size - SUPERBLOCK_BYTES

    @property
    def settled(self) -> int:
        """Everything below this offset was written, or given up."""
        return min(self.in_flight, default=self.cursor)


class SegmentPool:
    """Takes, begins and gives back segments.

    Parameters
    ----------
    engine : IOEngine
    directory : Path
    geometry : Geometry
    store : bytes
        16 bytes that name the store; segments of others are not its own.

    Notes
    -----
    Not thread-safe: the owner lets one thread at a time change it. Failures of the medium are OSErrors.
    """

    def __init__(self, engine: IOEngine, directory: Path, geometry: Geometry, store: bytes) -> None:
        self._engine = engine
        self._directory = directory
        self._geometry = geometry
        self.store = store
        self.segments: dict[int, Segment] = {}
        self._free: list[Segment] = []
        self.unopened: list[str] = []
        self.next_epoch = 1

    @property
    def held_bytes(self) -> int:
        """Bytes that the files hold, as the file system counts them."""
        return sum(segment.file.allocated_bytes for segment in list(self.segments.values()))

    @property
    def reckoned_bytes(self) -> int:
        """Bytes that the files are reckoned at: never less than they hold."""
        return sum(
            max(self._geometry.segment_cost(segment.size), segment.file.allocated_bytes)
            for segment in list(self.segments.values())
        )

    @property
    def available(self) -> int:
        """How many segments can be taken without giving one back."""
        room = self._geometry.for_segments - self.reckoned_bytes
        return len(self._free) + max(0, room) // self._geometry.segment_cost(self._geometry.segment_bytes)

    @property
    def over_capacity(self) -> bool:
        """Whether what was found is more than may be."""
        return self.reckoned_bytes > self._geometry.for_segments

    def load(self, *, writable: bool) -> list[Segment]:
        """Open the segments that are there, in no life yet."""
        for path in sorted(self._directory.iterdir()):
            match = SEGMENT_NAME.fullmatch(path.name)
            if match is None:
                continue
            try:
                file = self._engine.open(path, writable=writable)
                size = file.size
            except OSError as error:
                _logger.warning("segment %s cannot be opened (%s): left alone", path, error.strerror)
                self.unopened.append(path.name)
                continue
            number = int(match[1])
            self.segments[number] = Segment(number, file, size)
        return list(self.segments.values())

    def adopt(self, segment: Segment, superblock: Superblock | None) -> None:
        """Go on with a life that was found, or with none."""
        if superblock is None or superblock.kind is not SegmentKind.CACHE:
            self._free.append(segment)
            return
        segment.kind = superblock.kind
        segment.epoch = superblock.epoch
        segment.size = min(segment.size, superblock.segment_bytes)

    def take(self, kind: SegmentKind) -> Segment | None:
        """Begin a new life of a free segment, durably; None when the capacity is used up.

        Raises
        ------
        OSError
            No space, or the medium failed; nothing was taken.
        """
        segment = self._next_free()
        if segment is None:
            return None
        try:
            self._begin(segment, kind)
        except OSError:
            self._free.append(segment)
            raise
        return segment

    def give(self, segment: Segment) -> None:
        """End the life of a segment, so that nothing in it is ever found again."""
        try:
            self._begin(segment, SegmentKind.FREE)
        except OSError as error:
            _logger.warning("segment %s is given up: %s", segment.file.path, error)
            self.discard(segment)
            return
        if segment.size == self._geometry.segment_bytes:
            self._free.append(segment)
        else:
            self.discard(segment)

    def settle(self, segment: Segment) -> None:
        """End whatever life a free segment may have been in, for good."""
        if segment in self._free:
            self._free.remove(segment)
            if segment.size == self._geometry.segment_bytes:
                self.give(segment)
            else:
                self.discard(segment)

    def discard(self, segment: Segment) -> None:
        """Remove a file."""
        del self.segments[segment.number]
        segment.file.close()
        with contextlib.suppress(OSError):
            segment.file.path.unlink()
            sync_directory(self._directory)

    def shrink(self) -> bool:
        """Remove one free segment; False when there is none."""
        if not self._free:
            return False
        self.discard(self._free.pop())
        return True

    def inscribe(self, segment: Segment, superblock: Superblock, offsets: Sequence[int]) -> None:
        """Write a superblock at each of these offsets and wait until all are on the medium."""
        block = empty_aligned(SUPERBLOCK_BYTES)
        block.numpy()[:] = np.frombuffer(superblock.pack(), dtype=np.uint8)
        failpoints.reach("superblock.before-write")
        for error in self._engine.write([Transfer(segment.file, offset, block) for offset in offsets]):
            if error is not None:
                raise error
        failpoints.reach("superblock.before-sync")
        segment.file.sync()
        failpoints.reach("superblock.after-sync")

    def close(self) -> None:
        """Close all files."""
        for segment in self.segments.values():
            segment.file.close()

    def _next_free(self) -> Segment | None:
        while self._free:
            segment = self._free.pop(0)
            if segment.size == self._geometry.segment_bytes:
                return segment
            self.discard(segment)
        cost = self._geometry.segment_cost(self._geometry.segment_bytes)
        if self.reckoned_bytes + cost > self._geometry.for_segments:
            return None
        return self._create()

    def _create(self) -> Segment:
        number = 1
        while number in self.segments or self._path(number).exists():  # there may be one that cannot be opened
            number += 1
        path = self._path(number)
        file = self._engine.open(path, writable=True, create=True)
        try:
            failpoints.reach("segment.create.before-allocate")
            file.allocate(self._geometry.segment_bytes)
            failpoints.reach("segment.create.after-allocate")
            sync_directory(self._directory)
        except OSError:
            file.close()
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        failpoints.reach("segment.create.after-directory-sync")
        segment = Segment(number, file, self._geometry.segment_bytes)
        self.segments[number] = segment
        return segment

    def _path(self, number: int) -> Path:
        return self._directory / f"segment-{number:08d}.kvt"

    def _begin(self, segment: Segment, kind: SegmentKind) -> None:
        """Write the superblocks of a new life and wait until they are on the medium."""
        epoch = self.next_epoch
        self.next_epoch += 1
        superblock = Superblock(
            kind=kind, epoch=epoch, store=self.store, segment_bytes=segment.size, created_us=time.time_ns() // 1000
        )
        self.inscribe(segment, superblock, (0, segment.end))
        segment.cursor = SUPERBLOCK_BYTES
        segment.min_sequence = 1 << 63
        segment.leaving = False
        segment.epoch = epoch
        segment.kind = kind


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
