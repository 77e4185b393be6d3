"""The two superblocks of a segment, and which life is believed where one is damaged (docs/format.md, section 2)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.errors import RecordFormatError, RecordVersionError, StorageError
from kvtier.record import BLOCK_BYTES, SUPERBLOCK_BYTES, SegmentKind, Superblock, parse_superblock
from kvtier.storage_backends.engines import IOEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned
from kvtier.storage_backends.segment.index import IndexContents
from kvtier.storage_backends.segment.pool import Segment, SegmentPool
from kvtier.storage_backends.segment.scan import latest_life

__all__ = ["FoundSegment", "adopt", "choose_store", "judge", "mend", "read_superblocks"]

_logger = logging.getLogger("kvtier.storage_backends.segment")


@dataclass(frozen=True, slots=True)
class _Block:
    """What lies in a superblock's place: one that is whole, zeros, or ``damaged``, which is anything else."""

    superblock: Superblock | None = None
    damaged: bool = False


@dataclass(eq=False, slots=True)
class FoundSegment:
    """A segment file, what its superblocks say, and what is believed of it.

    Attributes
    ----------
    believed : Superblock, optional
        What holds; None until it is judged, and where nothing is known for sure.
    latest : int
        Greatest epoch of which a header was found; looked for only where the first superblock is not whole.
    lost : bool
        Something was in it, and nothing says for sure what.
    """

    segment: Segment
    first: _Block
    copy: _Block
    believed: Superblock | None = None
    latest: int = 0
    lost: bool = False

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.segment.file.path.name

    @property
    def copy_at(self) -> int | None:
        """Where the copy belongs; None where the file ends before, or a record of an older release lies there."""
        size = self.segment.size if self.believed is None else self.believed.segment_bytes
        at = size - SUPERBLOCK_BYTES
        return at if max(self.segment.cursor, SUPERBLOCK_BYTES) <= at <= self.segment.file.size - BLOCK_BYTES else None

    @property
    def restored(self) -> bool:
        """Whether one of the two is damaged, and what it said is known all the same."""
        return self.believed is not None and (
            self.first.superblock is None or (self.copy.damaged and self.copy_at is not None)
        )


def read_superblocks(engine: IOEngine, segments: Sequence[Segment]) -> list[FoundSegment]:
    """Read the first block and the last.

    Raises
    ------
    StorageError
        One is of a version that this release does not know: it must neither be used nor written over.
    """
    found = []
    for segment in segments:
        first = _read(engine, segment, 0)
        size = segment.size if first.superblock is None else first.superblock.segment_bytes
        at = size // BLOCK_BYTES * BLOCK_BYTES - SUPERBLOCK_BYTES
        found.append(FoundSegment(segment, first, _read(engine, segment, at) if at > 0 else _Block()))
    return found


def choose_store(found: Sequence[FoundSegment]) -> bytes | None:
    """The store that most segments belong to."""
    said = [one.first.superblock or one.copy.superblock for one in found]
    stores = Counter(superblock.store for superblock in said if superblock is not None)
    return stores.most_common(1)[0][0] if stores else None


def judge(found: Sequence[FoundSegment], engine: IOEngine, store: bytes, contents: IndexContents | None) -> None:
    """Find out which life of ``store`` each segment is in; one that is not proven to be the last is not believed.

    A first superblock that is whole says it. Where it is not, its copy does, as long as neither the index nor any
    header knows of a later life. Without a copy, an index does that was closed after the last write.
    """
    for one in found:
        if one.first.superblock is not None:
            one.believed = one.first.superblock if one.first.superblock.store == store else None
            continue
        one.latest = latest_life(engine, one.segment, store)
        one.believed = _from_copy(one, store, contents) or _from_index(one, found, store, contents)
        known = contents is not None and one.segment.number in contents.marks
        one.lost = one.believed is None and (one.first.damaged or one.copy.damaged or known or one.latest > 0)
        if one.lost:
            _logger.warning("segment %s: both superblocks are damaged, what it held is lost", one.segment.file.path)
        elif one.believed is not None:
            _logger.warning("segment %s: the first block is damaged, nothing is lost", one.segment.file.path)


def adopt(pool: SegmentPool, found: Sequence[FoundSegment]) -> None:
    """Go on with the lives that are believed; other segments hold nothing. New lives are later than any that was."""
    for one in found:
        pool.adopt(one.segment, one.believed)
        epochs = [block.superblock.epoch for block in (one.first, one.copy) if block.superblock is not None]
        pool.next_epoch = max(pool.next_epoch, one.latest + 1, *(epoch + 1 for epoch in epochs))


def mend(pool: SegmentPool, found: Sequence[FoundSegment]) -> None:
    """Have both superblocks say what is believed, before anything is written that would make one of them wrong.

    A crash can leave two that differ, and an older release writes no copy. What is lost is given back for good: were it
    readable the next time, deleted records would be in it.
    """
    for one in found:
        if one.lost:
            pool.settle(one.segment)
        if one.believed is None:
            continue
        places = [0] if one.first.superblock != one.believed else []
        if one.copy.superblock != one.believed and one.copy_at is not None:
            places.append(one.copy_at)
        if not places:
            continue
        try:
            pool.inscribe(one.segment, one.believed, places)
        except OSError as error:
            _logger.warning("the superblock of segment %s is not mended: %s", one.segment.file.path, error)


def _from_copy(one: FoundSegment, store: bytes, contents: IndexContents | None) -> Superblock | None:
    """What the copy says, unless anything shows that it is of an earlier life."""
    copy = one.copy.superblock
    if copy is None or copy.store != store or copy.epoch < one.latest:
        return None
    if contents is not None:
        mark = contents.marks.get(one.segment.number)
        if mark is not None and mark.epoch > copy.epoch:
            return None
        complete = contents.clean and contents.epoch > copy.epoch
        if complete and copy.kind is SegmentKind.CACHE and (mark is None or mark.epoch != copy.epoch):
            return None
    return copy


def _from_index(
    one: FoundSegment, found: Sequence[FoundSegment], store: bytes, contents: IndexContents | None
) -> Superblock | None:
    """What the index says, if it was closed after the last write and no segment is in a later life than it knows."""
    if contents is None or not contents.clean or one.segment.size <= 2 * SUPERBLOCK_BYTES:
        return None
    mark = contents.marks.get(one.segment.number)
    others = [other.first.superblock.epoch for other in found if other.first.superblock is not None]
    if mark is None or mark.epoch < one.latest or max(others, default=0) >= contents.epoch:
        return None
    size = one.segment.size // BLOCK_BYTES * BLOCK_BYTES
    return Superblock(kind=SegmentKind.CACHE, epoch=mark.epoch, store=store, segment_bytes=size)


def _read(engine: IOEngine, segment: Segment, at: int) -> _Block:
    """What lies in a block."""
    if segment.size < at + SUPERBLOCK_BYTES:
        return _Block()
    block = empty_aligned(SUPERBLOCK_BYTES)
    (error,) = engine.read([Transfer(segment.file, at, block)])
    if error is not None:
        _logger.warning("segment %s: block %d cannot be read: %s", segment.file.path, at // BLOCK_BYTES, error)
        return _Block(damaged=True)
    if not block.any():
        return _Block()
    try:
        return _Block(parse_superblock(block.numpy().data))
    except RecordVersionError as error:
        raise StorageError(f"{segment.file.path} is of another release of kvtier: {error}") from error
    except RecordFormatError:
        return _Block(damaged=True)
