"""Opening a segment directory: index, segments, recovery, in an order that a crash at any point leaves openable."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvtier.errors import StorageError
from kvtier.record import SegmentKind
from kvtier.storage_backends.engines import IOEngine
from kvtier.storage_backends.segment.catalog import Catalog
from kvtier.storage_backends.segment.drive import PROBE_NAME, Drive, measure_drive
from kvtier.storage_backends.segment.index import INDEX_NAME, IndexContents, SegmentIndex, remove_index
from kvtier.storage_backends.segment.options import Geometry
from kvtier.storage_backends.segment.pool import Segment, SegmentPool
from kvtier.storage_backends.segment.recovery import Progress, RecoveryReport, recover
from kvtier.storage_backends.segment.superblocks import FoundSegment, adopt, choose_store, judge, mend, read_superblocks

__all__ = ["Opened", "open_directory"]

_logger = logging.getLogger("kvtier.storage_backends.segment")


@dataclass(frozen=True, slots=True)
class Opened:
    """What was found in a directory; without an ``index`` where none could be had, or none is to be written."""

    pool: SegmentPool
    index: SegmentIndex | None
    report: RecoveryReport
    drive: Drive


def open_directory(
    engine: IOEngine,
    directory: Path,
    geometry: Geometry,
    catalog: Catalog,
    progress: Progress | None,
    *,
    writable: bool,
) -> Opened:
    """Find out what a directory holds and make it ready; the caller has its lock.

    Raises
    ------
    StorageError
        The directory cannot be read, or no index can be had in it.
    """
    pool = SegmentPool(engine, directory, geometry, b"")
    try:
        if writable:
            (directory / PROBE_NAME).unlink(missing_ok=True)
        found = read_superblocks(engine, pool.load(writable=writable))
        index, contents = _open_index(directory, geometry, _epochs(found), writable=writable)
        store = choose_store(found)
        if contents is not None and store is not None and contents.store != store:
            _logger.warning("the index in %s belongs to another store; it is rebuilt", directory)
            _remove(index, directory)
            index, contents = None, None
        pool.store = store or (contents.store if contents is not None else uuid.uuid4().bytes)
        judge(found, engine, pool.store, contents)
        adopt(pool, found)
        if contents is not None:
            contents.forget({one.segment.number for one in found if one.segment.kind is not SegmentKind.CACHE})
        index = _begun(index, directory, pool.store)
        report = _report(recover(catalog, pool, engine, contents, progress), catalog, pool, found)
        if writable:
            mend(pool, found)
            _keep_capacity(pool, catalog)
        return Opened(pool, index, report, measure_drive(engine, directory, pool, writable=writable))
    except OSError as error:
        pool.close()
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot open {directory}: {error.strerror or error}; check the disk below it") from error


def newest_segment(pool: SegmentPool) -> Segment | None:
    """The segment that was appended to last."""
    cache = [segment for segment in pool.segments.values() if segment.kind is SegmentKind.CACHE]
    return max(cache, key=lambda segment: segment.epoch, default=None)


def _epochs(found: Sequence[FoundSegment]) -> dict[int, int | None]:
    """Epochs as the first superblocks have them; None where only the index may know."""
    return {one.segment.number: block.epoch if (block := one.first.superblock) else None for one in found}


def _report(
    report: RecoveryReport, catalog: Catalog, pool: SegmentPool, found: Sequence[FoundSegment]
) -> RecoveryReport:
    """Name the segments that are damaged, and count them."""
    lost = (*pool.unopened, *(one.name for one in found if one.lost))
    restored = tuple(one.name for one in found if one.restored)
    catalog.counters.damaged += len(lost) + len(restored)
    return replace(report, lost_segments=lost, restored_segments=restored)


def _open_index(
    directory: Path, geometry: Geometry, epochs: dict[int, int | None], *, writable: bool
) -> tuple[SegmentIndex | None, IndexContents | None]:
    """The index and what it says; a fresh one and nothing where it cannot be trusted."""
    if not writable:
        return None, _read_copy(directory, geometry, epochs)
    index: SegmentIndex | None = None
    try:
        index = SegmentIndex(directory, geometry)
        return index, index.load(epochs)
    except StorageError as error:
        _logger.warning("the index in %s is rebuilt: %s", directory, error)
        _remove(index, directory)
        return None, None


def _begun(index: SegmentIndex | None, directory: Path, store: bytes) -> SegmentIndex | None:
    """The index, marked as one that is behind from here on; none where it does not take that."""
    if index is None:
        return None
    try:
        index.begin(store)
    except StorageError as error:
        _logger.warning("the index in %s is written anew: %s", directory, error)
        _remove(index, directory)
        return None
    return index


def _remove(index: SegmentIndex | None, directory: Path) -> None:
    """Remove an index; another is written when all is known."""
    if index is not None:
        index.close()
    remove_index(directory)


def _read_copy(directory: Path, geometry: Geometry, epochs: dict[int, int | None]) -> IndexContents | None:
    """What the index says, read from a copy: SQLite itself would write beside it."""
    with tempfile.TemporaryDirectory(prefix="kvtier-index-") as name:
        copy = Path(name)
        try:
            for suffix in ("", "-wal"):
                if (source := directory / f"{INDEX_NAME}{suffix}").exists():
                    shutil.copyfile(source, copy / source.name)
            index = SegmentIndex(copy, geometry)
            try:
                return index.load(epochs)
            finally:
                index.close()
        except (StorageError, OSError) as error:
            _logger.warning("the index in %s cannot be read (%s): all segments are looked through", directory, error)
            return None


def _keep_capacity(pool: SegmentPool, catalog: Catalog) -> None:
    """Let go of segments, the oldest first, that a smaller capacity has no room for."""
    while pool.over_capacity:
        if pool.shrink():
            continue
        cache = [segment for segment in pool.segments.values() if segment.kind is SegmentKind.CACHE]
        if not cache:
            return
        oldest = min(cache, key=lambda segment: segment.epoch)
        rows = catalog.table.lying_at(oldest.number)
        catalog.counters.evicted += rows.size
        catalog.remove(np.asarray(rows), forever=False)
        catalog.drop_segment(oldest.number)
        pool.discard(oldest)
