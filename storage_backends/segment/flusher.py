"""What happens behind the puts: data synced within its bound, and the index told afterwards."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from kvtier.errors import StorageError
from kvtier.record import SegmentKind
from kvtier.storage_backends.segment.catalog import Catalog
from kvtier.storage_backends.segment.changes import Changes
from kvtier.storage_backends.segment.index import SegmentIndex, remove_index
from kvtier.storage_backends.segment.options import Geometry, SegmentOptions
from kvtier.storage_backends.segment.pool import Segment, SegmentPool

__all__ = ["Flusher"]

_logger = logging.getLogger("kvtier.storage_backends.segment")


class Flusher:
    """A thread that syncs and indexes now and then, and on demand.

    Parameters
    ----------
    index : SegmentIndex
        Owned from here on.

    Attributes
    ----------
    problem : str
        Why data or index could not be written the last time; empty when they could.
    """

    def __init__(
        self, directory: Path, options: SegmentOptions, geometry: Geometry, catalog: Catalog, pool: SegmentPool,
        index: SegmentIndex,
    ) -> None:  # fmt: skip
        self._directory = directory
        self._options = options
        self._geometry = geometry
        self._catalog = catalog
        self._pool = pool
        self._index: SegmentIndex | None = index
        self.problem = ""
        self._unsynced: dict[int, Segment] = {}
        self._unsynced_bytes = 0
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-flush", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def wrote(self, segments: set[Segment], count: int) -> None:
        """Note bytes that were not synced; syncs them when they have become too many."""
        with self._catalog.lock:
            self._unsynced |= {segment.number: segment for segment in segments}
            self._unsynced_bytes += count
            due = self._unsynced_bytes >= self._options.sync_bytes
        if due:
            self._sync()

    def flush(self) -> None:
        """Sync data, then tell the index; what fails is noted in ``problem``."""
        with self._turn:
            changes = self._catalog.take_changes(list(self._pool.segments.values()), self._pool.next_epoch)
            self._sync()
            if not changes.empty:
                self._commit(changes)

    def sync_index(self) -> bool:
        """Make what the index was told durable; False when that failed."""
        with self._turn:
            try:
                if self._index is None:
                    return False
                self._index.sync()
            except StorageError as error:
                self.problem = str(error)
                return False
            return True

    def close(self) -> None:
        """Stop the thread, flush, and say in the index that it is complete."""
        self._stop.set()
        self._thread.join()
        self.flush()
        if self._index is None:
            return
        try:
            self._index.commit(self._catalog.take_changes(list(self._pool.segments.values()), self._pool.next_epoch))
            self._index.finish()
        except StorageError as error:
            _logger.warning("the index is not complete (%s); the next opening looks through the segments", error)
        self._index.close()

    def _run(self) -> None:
        while not self._stop.wait(min(self._options.sync_seconds, self._options.index_seconds)):
            self.flush()

    def _sync(self) -> None:
        with self._catalog.lock:
            segments, self._unsynced = list(self._unsynced.values()), {}
            self._unsynced_bytes = 0
        self.problem = ""
        for segment in segments:
            if segment.kind is not SegmentKind.CACHE:
                continue
            try:
                segment.sync.wait()
            except OSError as error:
                self._catalog.counters.failed += 1
                self.problem = f"the medium does not sync: {error.strerror or error}"

    def _commit(self, changes: Changes) -> None:
        """Write to the index; one that refuses is written anew, or else done without."""
        try:
            if self._index is not None:
                self._index.commit(changes)
                return
            self._index = self._write_anew()
        except StorageError as error:
            _logger.warning("the index is written anew: %s", error)
            if self._index is not None:
                self._index.close()
                self._index = None
            try:
                self._index = self._write_anew()
            except (StorageError, OSError) as failure:
                self.problem = f"no index ({failure}); the next opening looks through all segments"

    def _write_anew(self) -> SegmentIndex:
        remove_index(self._directory)
        index = SegmentIndex(self._directory, self._geometry)
        try:
            index.begin(self._pool.store)
            index.commit(self._everything())
        except BaseException:
            index.close()
            remove_index(self._directory)
            raise
        return index

    def _everything(self) -> Changes:
        """All that there is, as changes."""
        catalog = self._catalog
        with catalog.lock:
            changes = catalog.take_changes(list(self._pool.segments.values()), self._pool.next_epoch)
            changes.rows = [catalog.rows(catalog.table.live())]
            changes.graves, changes.dropped = [], []
            changes.tombstones = [(number, at) for number, places in catalog.tombstones.items() for at in places]
            changes.tenants = list(enumerate(catalog.tenants.values))
            changes.namespaces = list(enumerate(catalog.namespaces.values))
            return changes
