"""What happens behind the puts: data synced within its bound, and the index told afterwards."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from kvtier.errors import StorageError
from kvtier.storage_backends.segment.catalog import Catalog
from kvtier.storage_backends.segment.changes import Changes
from kvtier.storage_backends.segment.draft import Draft
from kvtier.storage_backends.segment.index import SegmentIndex, remove_index
from kvtier.storage_backends.segment.options import Geometry, SegmentOptions
from kvtier.storage_backends.segment.pool import Segment, SegmentPool

__all__ = ["Flusher"]

_RETRY_SECONDS = 30.0
_logger = logging.getLogger("kvtier.storage_backends.segment")


class Flusher:
    """A thread that syncs and indexes now and then, and on demand.

    Parameters
    ----------
    index : SegmentIndex, optional
        Owned from here on; written anew when None.
    """

    def __init__(
        self, directory: Path, options: SegmentOptions, geometry: Geometry, catalog: Catalog, pool: SegmentPool,
        index: SegmentIndex | None,
    ) -> None:  # fmt: skip
        self._directory = directory
        self._options = options
        self._geometry = geometry
        self._catalog = catalog
        self._pool = pool
        self._index = index
        self._again_at = 0.0
        self._unindexed = ""
        self._unsynced_problem = ""
        self._unsynced: dict[int, Segment] = {}
        self._unsynced_bytes = 0
        self._syncing_bytes = 0
        self._turn = threading.Lock()
        self._syncing = threading.Lock()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-flush", daemon=True)

    def start(self) -> None:
        """Tell the index what was found, and begin to work."""
        self.flush()
        self._thread.start()

    @property
    def problem(self) -> str:
        """Why data or index could not be written the last time; empty when they could."""
        return "; ".join(filter(None, (self._unsynced_problem, self._unindexed)))

    def wrote(self, drafts: Sequence[Draft]) -> None:
        """Note records that were written and not synced, before they are shown.

        The thread syncs from half of ``sync_bytes`` on, beside the next puts; a put that reaches ``sync_bytes``, with
        what is being synced, waits until everything is on the medium.
        """
        with self._catalog.lock:
            for draft in drafts:
                if draft.segment is not None:
                    self._unsynced[draft.segment.number] = draft.segment
                    self._unsynced_bytes += draft.record_bytes
            unsynced, syncing = self._unsynced_bytes, self._syncing_bytes
        if unsynced + syncing >= self._options.sync_bytes:
            self._sync()
        elif unsynced >= self._options.sync_bytes // 2:
            self._wake.set()

    def flush(self) -> None:
        """Sync data, then tell the index; what fails is noted in `problem`."""
        with self._turn:
            changes = self._catalog.take_changes(list(self._pool.segments.values()), self._pool.next_epoch)
            self._sync()
            if self._index is None or not changes.empty:
                self._commit(changes)

    def sync_index(self) -> bool:
        """Make what the index was told durable; False when that failed."""
        with self._turn:
            if self._index is None:
                return False
            try:
                self._index.sync()
            except StorageError as error:
                _logger.warning("the index is not synced: %s", error)
                return False
            return True

    def rewrite(self) -> None:
        """Write the index anew from what is known."""
        with self._turn:
            self._abandon()
            self._again_at = 0.0
            self._commit(Changes())

    def close(self) -> None:
        """Stop the thread, flush, and say in the index that it is complete."""
        self._stop.set()
        self._wake.set()
        self._thread.join()
        self._again_at = 0.0
        with self._turn:
            changes = self._catalog.take_changes(list(self._pool.segments.values()), self._pool.next_epoch)
            self._sync()
            self._commit(changes)
            if self._index is None:
                return
            try:
                self._index.finish(self._catalog.heat())
            except StorageError as error:
                _logger.warning("the index is not complete (%s); the next opening looks through the segments", error)
            self._index.close()

    def _run(self) -> None:
        period = min(self._options.sync_seconds, self._options.index_seconds)
        due = time.monotonic() + period
        while True:
            self._wake.wait(max(0.0, due - time.monotonic()))
            self._wake.clear()
            if self._stop.is_set():
                return
            if time.monotonic() < due:
                self._sync()
            else:
                self.flush()
                due = time.monotonic() + period

    def _sync(self) -> None:
        """Wait until all that was written before is on the medium, also what another thread is syncing already."""
        with self._syncing:
            with self._catalog.lock:
                segments, self._unsynced = list(self._unsynced.values()), {}
                self._syncing_bytes, self._unsynced_bytes = self._unsynced_bytes, 0
            problem = ""
            for segment in segments:
                try:
                    segment.sync.wait()
                except OSError as error:
                    self._catalog.counters.failed += 1
                    problem = f"the medium does not sync: {error.strerror or error}"
            self._syncing_bytes = 0
            self._unsynced_problem = problem

    def _commit(self, changes: Changes) -> None:
        """Write to the index; one that refuses is written anew, or else done without for a while."""
        try:
            if self._index is not None:
                self._index.commit(changes)
                return
        except StorageError as error:
            _logger.warning("the index is written anew: %s", error)
            self._abandon()
        if time.monotonic() >= self._again_at:
            try:
                self._index = self._write_anew()
            except (StorageError, OSError) as failure:
                self._again_at = time.monotonic() + _RETRY_SECONDS
                _logger.warning("no index can be written: %s", failure)
        self._unindexed = "" if self._index else "the index cannot be written; the next opening reads everything"

    def _abandon(self) -> None:
        """Do without the index: one that lacks rows must not be found by the next opening."""
        if self._index is not None:
            self._index.close()
            self._index = None
        with contextlib.suppress(OSError):
            remove_index(self._directory)

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
