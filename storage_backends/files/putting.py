"""One put: claim keys, take space, write, sync if so promised, rename, and only then show."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvtier.record import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES
from kvtier.storage_backends import failpoints
from kvtier.storage_backends.engines import EngineFile, IOEngine
from kvtier.storage_backends.files.shelf import Shelf, sync_directories
from kvtier.storage_backends.files.unsynced import Unsynced
from kvtier.storage_backends.records import PutOutcome, PutState, Record
from kvtier.storage_backends.segment.draft import Draft
from kvtier.storage_backends.segment.pool import Segment
from kvtier.storage_backends.segment.writer import RecordWriter
from kvtier.storage_backends.workers import Workers
from kvtier.types import format_bytes

__all__ = ["STORE", "Putter"]

failpoints.NAMES |= {"files.written", "files.synced", "files.directory-synced"}

STORE = bytes(16)
"""Records in files belong to no store in particular: a file may be copied from one directory to another."""

_EXISTS = PutOutcome(PutState.EXISTS)
_STORED = PutOutcome(PutState.STORED)


@dataclass(slots=True)
class _Work:
    """A record on its way into its file."""

    draft: Draft
    part: Path
    file: EngineFile
    outcome: PutOutcome = _STORED


class Putter:
    """Puts records for a shelf; any number of threads.

    Attributes
    ----------
    degraded : str
        Why the medium did not take the last record; empty when it did.
    """

    def __init__(self, shelf: Shelf, engine: IOEngine, workers: Workers, last_sequence: int) -> None:
        self.degraded = ""
        self._unsynced = Unsynced(shelf, engine)
        self._shelf = shelf
        self._engine = engine
        self._writer = RecordWriter(engine, STORE)
        self._workers = workers
        self._claims: set[bytes] = set()
        self._changed = threading.Condition()
        self._last_sequence = last_sequence

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Store records; one outcome each."""
        first: dict[bytes, Record] = {}
        for record in records:
            first.setdefault(record.key, record)
        with self._claimed(first):
            outcomes = {key: _EXISTS for key in first if self._shelf.look(key)}
            outcomes |= self._put_new([record for key, record in first.items() if key not in outcomes])
        result = []
        for record in records:
            result.append(outcomes[record.key])
            if outcomes[record.key] is _STORED:  # a second record of the same key finds the first
                outcomes[record.key] = _EXISTS
        return result

    def sync_all(self) -> None:
        """Make relaxed puts survive a power loss; what cannot be synced is counted."""
        for error in self._unsynced.sync():
            self._failed(error)

    def close(self) -> None:
        """Sync, and let go of what writes need; nothing is put any more."""
        self.sync_all()
        self._writer.close()

    def _next_sequence(self) -> int:
        """A number that grows in this process and, as clocks agree, in others: nanoseconds, none of them twice."""
        with self._changed:
            self._last_sequence = max(self._last_sequence + 1, time.time_ns())
            return self._last_sequence

    @contextmanager
    def _claimed(self, keys: dict[bytes, Record]) -> Iterator[None]:
        """Wait for other threads that put one of the keys, then have them all."""
        with self._changed:
            self._changed.wait_for(lambda: self._claims.isdisjoint(keys))
            self._claims |= keys.keys()
        try:
            yield
        finally:
            with self._changed:
                self._claims -= keys.keys()
                self._changed.notify_all()

    def _put_new(self, records: Sequence[Record]) -> dict[bytes, PutOutcome]:
        outcomes: dict[bytes, PutOutcome] = {}
        works = []
        for record in records:
            started = self._start(record)
            if isinstance(started, _Work):
                works.append(started)
            else:
                outcomes[record.key] = started
        self._writer.write([work.draft for work in works])
        failpoints.reach("files.written")
        self._finish(works)
        for work in works:
            outcomes[work.draft.key] = work.outcome
        self._count(outcomes, works)
        return outcomes

    def _start(self, record: Record) -> _Work | PutOutcome:
        """Take space and open the file; or say why not."""
        draft = Draft(
            key=record.key,
            namespace=record.namespace,
            tenant=record.tenant,
            meta=record.meta,
            buffers=record.buffers,
            extent_bytes=self._shelf.options.extent_bytes,
            created_us=time.time_ns() // 1000,
            sequence=self._next_sequence(),
        )
        if draft.payload_bytes > MAX_PAYLOAD_BYTES or draft.header_bytes > MAX_HEADER_BYTES:
            size = format_bytes(draft.payload_bytes)
            return PutOutcome(PutState.REFUSED, f"a record of {size} is more than the format can say; split it")
        try:
            part = self._shelf.reserve(draft.record_bytes)
            if isinstance(part, str):
                return PutOutcome(PutState.REFUSED, part)
            try:
                file = self._engine.open(part, writable=True)
            except OSError:
                self._shelf.abandon(part)
                raise
        except OSError as error:
            return self._failed(error)
        draft.segment = Segment(draft.sequence, file, draft.record_bytes)
        return _Work(draft, part, file)

    def _finish(self, works: Sequence[_Work]) -> None:
        """Sync if so promised, and give the files their names; whatever fails is given up."""
        durable = self._shelf.options.durability == "durable"
        steps: list[Callable[[], None]] = [partial(self._settle, work, sync=durable) for work in works]
        self._workers.run(steps, sum(work.draft.record_bytes for work in works))
        failpoints.reach("files.synced")
        good = [work for work in works if work.outcome is _STORED]
        if durable:
            self._sync_names(self._publish(good), good)
        elif good:
            self._publish_unsynced(good)
        for work in works:
            if work.outcome.state is PutState.REFUSED:
                self._shelf.abandon(work.part)

    def _publish(self, works: Sequence[_Work]) -> set[Path]:
        """Give files their names; the directories that hold them."""
        touched: set[Path] = set()
        for work in works:
            try:
                names = self._shelf.publish(work.part, work.draft.key, work.draft.sequence)
            except OSError as error:
                work.outcome = self._failed(error)
                continue
            touched |= names
            if not names:
                work.outcome = _EXISTS
        return touched

    def _publish_unsynced(self, works: Sequence[_Work]) -> None:
        try:
            with self._unsynced.landing() as sizes:
                self._publish(works)
                sizes.update({work.draft.key: work.draft.record_bytes for work in works if work.outcome is _STORED})
        except OSError as error:
            for work in works:
                work.outcome = self._failed(error)
        if self._unsynced.too_many:
            self.sync_all()

    def _settle(self, work: _Work, *, sync: bool) -> None:
        """Make the bytes of one file durable and close it."""
        error = work.draft.error
        try:
            if sync and error is None:
                work.file.sync()
        except OSError as failure:
            error = failure
        finally:
            work.file.close()
        if error is not None:
            work.outcome = self._failed(error)

    def _sync_names(self, touched: set[Path], published: Sequence[_Work]) -> None:
        try:
            sync_directories(touched)
        except OSError as error:
            named = [work for work in published if work.outcome is _STORED]
            for work in named:
                work.outcome = self._failed(error)
            self._take_back(named)
        failpoints.reach("files.directory-synced")

    def _take_back(self, works: Sequence[_Work]) -> None:
        """Delete files whose names may not last."""
        try:
            self._shelf.remove([work.draft.key for work in works])
        except OSError:
            return

    def _failed(self, error: OSError) -> PutOutcome:
        """Note that the medium refused."""
        reason = f"the medium does not take it: {error.strerror or error}"
        with self._shelf.lock:
            self._shelf.counters.failed += 1
            self.degraded = reason
        return PutOutcome(PutState.REFUSED, reason)

    def _count(self, outcomes: dict[bytes, PutOutcome], works: Sequence[_Work]) -> None:
        stored = [work.draft for work in works if work.outcome is _STORED]
        with self._shelf.lock:
            counters = self._shelf.counters
            counters.stored += len(stored)
            counters.written_bytes += sum(draft.payload_bytes for draft in stored)
            counters.refused += sum(outcome.state is PutState.REFUSED for outcome in outcomes.values())
            for draft in stored:
                entry = self._shelf.table.get(draft.key)
                if entry is not None:
                    entry.tenant = draft.tenant
            if stored:
                self.degraded = ""
