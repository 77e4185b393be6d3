"""The index on disk: packed rows in SQLite, written behind. Losing it costs time at the next open, never a record."""

from __future__ import annotations

import logging
import sqlite3
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvtier.errors import StorageError
from kvtier.storage_backends import failpoints
from kvtier.storage_backends.segment.changes import Changes, SegmentMark
from kvtier.storage_backends.segment.options import Geometry
from kvtier.storage_backends.segment.packs import (
    TOMBSTONE,
    TOMBSTONES,
    GravePack,
    Pack,
    graves_digest,
    pack_digest,
    packs_of,
    to_blob,
    to_number,
)
from kvtier.storage_backends.segment.rows import GRAVE, HEAT, ROW, Rows
from kvtier.storage_backends.segment.seal import Seal

__all__ = ["INDEX_NAME", "IndexContents", "SegmentIndex", "remove_index"]

failpoints.NAMES |= {"index.before-commit", "index.after-commit", "index.before-clean", "index.after-clean"}

INDEX_NAME = "index.sqlite"

_APPLICATION_ID = 0x4B565469  # "KVTi"
_VERSION = 2
_PAGE_BYTES = 4096
_SEAL, _SEAL_BYTES = "seal", 16
_TENANT, _NAMESPACE = 0, 1
_SCHEMA = """
CREATE TABLE store(name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE segments(number INTEGER PRIMARY KEY, epoch INTEGER, upto INTEGER, least_sequence BLOB);
CREATE TABLE names(kind INTEGER, number INTEGER, value BLOB, PRIMARY KEY(kind, number)) WITHOUT ROWID;
CREATE TABLE packs(id INTEGER PRIMARY KEY, segment INTEGER, epoch INTEGER, kind INTEGER, rows BLOB, digest BLOB);
CREATE TABLE graves(id INTEGER PRIMARY KEY, before BLOB, rows BLOB, digest BLOB);
CREATE INDEX packs_of_segment ON packs(segment);
"""
_logger = logging.getLogger("kvtier.storage_backends.segment")


@dataclass(slots=True)
class IndexContents:
    """What an index says.

    Attributes
    ----------
    store : bytes
        The store that it belongs to.
    clean : bool
        It was closed after the last write: there is nothing to look for behind the marks.
    rows, graves : Rows
        Arrays of `ROW` and `GRAVE`, in the order written.
    tombstones : list of (segment, offset)
    """

    store: bytes
    clean: bool
    rows: Rows
    graves: Rows
    tombstones: list[tuple[int, int]]
    marks: dict[int, SegmentMark]
    tenants: list[bytes]
    namespaces: list[bytes]
    sequence: int
    epoch: int
    heat: Rows

    def forget(self, segments: Collection[int]) -> None:
        """Leave out records and tombstones of segments that hold nothing after all."""
        if segments:
            self.rows = self.rows[~np.isin(self.rows["at"]["segment"], list(segments))]
            self.tombstones = [place for place in self.tombstones if place[0] not in segments]


class SegmentIndex:
    """One connection; one thread at a time.

    Parameters
    ----------
    directory : Path
    geometry : Geometry
        Bounds the database and its log.

    Raises
    ------
    StorageError
        The file is not an index, is damaged, or cannot be opened.
    """

    def __init__(self, directory: Path, geometry: Geometry) -> None:
        self._geometry = geometry
        self._seal = Seal()
        self._values: dict[str, bytes] = {}
        with _translated("open"):
            self._db = sqlite3.connect(
                directory / INDEX_NAME, isolation_level=None, check_same_thread=False, cached_statements=32
            )
            try:
                self._configure()
            except BaseException:
                self._db.close()
                raise

    @property
    def rows_per_commit(self) -> int:
        """Most rows of one transaction, so that the log keeps its bound."""
        return min(8192, max(64, self._geometry.log_bytes // 4 // ROW.itemsize))

    def load(self, epochs: Mapping[int, int | None]) -> IndexContents | None:
        """Everything that the index says of the segments that are in these epochs; None when it is new.

        Parameters
        ----------
        epochs : mapping of int to (int or None)
            None for segments of which nobody else knows: then it is the epoch that the index has.

        Raises
        ------
        StorageError
            It is damaged.
        """
        with _translated("read"):
            self._values = dict(self._db.execute("SELECT name, value FROM store"))
            sealed = self._values.pop(_SEAL, bytes(_SEAL_BYTES))
            self._seal.replace("store", self._values.items())
            marks = self._marks()
            known = {number: marks[number].epoch if number in marks else 0 for number in epochs} | {
                number: epoch for number, epoch in epochs.items() if epoch is not None
            }
            rows, tombstones = self._packs(known)
            graves = list(self._graves())
            tenants, namespaces = self._names(_TENANT), self._names(_NAMESPACE)
            if sealed != self._seal.value:
                raise StorageError("the index is not what was written: rows are damaged, or missing")
            if not self._values:
                return None
            return IndexContents(
                store=bytes(self._values["store"]),
                clean=self._values["clean"] == b"\1",
                rows=np.frombuffer(b"".join(rows), dtype=ROW),
                graves=np.frombuffer(b"".join(graves), dtype=GRAVE),
                tombstones=tombstones,
                marks=marks,
                tenants=tenants,
                namespaces=namespaces,
                sequence=to_number(self._values["sequence"]),
                epoch=to_number(self._values["epoch"]),
                heat=np.frombuffer(self._values.get("heat", b""), dtype=HEAT),
            )

    def begin(self, store: bytes) -> None:
        """Say whose index this is, and that it is not complete any more from here on; durable when it returns.

        Raises
        ------
        StorageError
        """
        self._mark({"store": store, "clean": b"\0"}, default={"sequence": to_blob(1), "epoch": to_blob(1)})

    def finish(self, heat: Rows) -> None:
        """Say that nothing was written after the last commit, and which records were read most; durable on return.

        Parameters
        ----------
        heat : Rows
            Array of `HEAT`.

        Raises
        ------
        StorageError
        """
        failpoints.reach("index.before-clean")
        self._mark({"clean": b"\1", "heat": heat.tobytes()})
        failpoints.reach("index.after-clean")

    def commit(self, changes: Changes) -> None:
        """Write changes, the marks with the last of them.

        Raises
        ------
        StorageError
            Nothing of the last part was written. The index may now lack rows that its marks will claim: it must be
            written anew or removed.
        """
        epochs = {number: mark.epoch for number, mark in changes.marks.items()}
        with _translated("write"):
            for pack in packs_of(changes, epochs, self.rows_per_commit):
                with self._sealing():
                    self._drop(changes)
                    self._write_names(changes)
                    self._insert(pack)
            with self._sealing():
                self._drop(changes)
                self._write_names(changes)
                self._write_marks(changes)
                failpoints.reach("index.before-commit")
            failpoints.reach("index.after-commit")

    def sync(self) -> None:
        """Make every commit durable.

        Raises
        ------
        StorageError
        """
        with _translated("sync"):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Close the connection."""
        try:
            self._db.close()
        except sqlite3.Error as error:
            _logger.warning("the index did not close well (%s); it will be rebuilt if need be", error)

    def _configure(self) -> None:
        run = self._db.execute
        run("PRAGMA locking_mode=EXCLUSIVE")
        run(f"PRAGMA page_size={_PAGE_BYTES}")
        mode = run("PRAGMA journal_mode=WAL").fetchone()[0]
        run("PRAGMA synchronous=NORMAL")
        run("PRAGMA secure_delete=OFF")
        run("PRAGMA temp_store=MEMORY")
        run("PRAGMA cache_size=-2048")
        run(f"PRAGMA max_page_count={self._geometry.database_bytes // _PAGE_BYTES}")
        run(f"PRAGMA wal_autocheckpoint={max(4, self._geometry.log_bytes // _PAGE_BYTES // 4)}")
        run(f"PRAGMA journal_size_limit={self._geometry.log_bytes // 2}")
        application, version = run("PRAGMA application_id").fetchone()[0], run("PRAGMA user_version").fetchone()[0]
        if mode != "wal":
            raise StorageError(f"the index is in {mode} mode, required wal; is the file system read-only?")
        if (application, version) == (0, 0):
            with self._transaction():
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    run(statement)
                run(f"PRAGMA application_id={_APPLICATION_ID}")
                run(f"PRAGMA user_version={_VERSION}")
        elif (application, version) != (_APPLICATION_ID, _VERSION):
            raise StorageError(f"required an index of version {_VERSION}, got application {application:#x} {version}")

    def _mark(self, values: dict[str, bytes], default: dict[str, bytes] | None = None) -> None:
        with _translated("write"):
            with self._sealing():
                self._set({**(default or {}), **self._values, **values})
            self.sync()

    def _set(self, values: dict[str, bytes]) -> None:
        self._values.update(values)
        self._db.executemany("INSERT OR REPLACE INTO store VALUES(?, ?)", values.items())
        self._seal.replace("store", self._values.items())

    def _marks(self) -> dict[int, SegmentMark]:
        rows = self._db.execute("SELECT number, epoch, upto, least_sequence FROM segments").fetchall()
        self._seal.replace("segments", rows)
        return {number: SegmentMark(epoch, upto, to_number(least)) for number, epoch, upto, least in rows}

    def _packs(self, epochs: Mapping[int, int]) -> tuple[list[bytes], list[tuple[int, int]]]:
        """Rows of records, and places of tombstones, in segments that are in these epochs."""
        records: list[bytes] = []
        tombstones: list[tuple[int, int]] = []
        for number, *pack in self._db.execute("SELECT id, segment, epoch, kind, rows, digest FROM packs ORDER BY id"):
            segment, epoch, kind, packed, digest = pack
            if digest != pack_digest(segment, epoch, kind, packed):
                raise StorageError(f"the index has damaged rows of segment {segment}")
            self._seal.add("packs", (number, segment, epoch, kind, digest))
            if epochs.get(segment) != epoch:
                continue
            if kind == TOMBSTONES:
                tombstones += [(segment, at) for at in np.frombuffer(packed, TOMBSTONE).tolist()]
            else:
                records.append(packed)
        return records, tombstones

    def _names(self, kind: int) -> list[bytes]:
        rows = self._db.execute("SELECT number, value FROM names WHERE kind=? ORDER BY number", (kind,)).fetchall()
        if [number for number, _ in rows] != list(range(len(rows))):
            raise StorageError("the index lacks names of tenants or namespaces")
        for row in rows:
            self._seal.add("names", (kind, *row))
        return [bytes(value) for _, value in rows]

    def _graves(self) -> Iterator[bytes]:
        for number, before, packed, digest in self._db.execute("SELECT id, before, rows, digest FROM graves"):
            if digest != graves_digest(before, packed):
                raise StorageError("the index has damaged rows of deleted records")
            self._seal.add("graves", (number, before, digest))
            yield packed

    def _drop(self, changes: Changes) -> None:
        """Forget segments that are gone, and graves of which no segment can hold the dead any more."""
        if changes.dropped:
            for number in changes.dropped:
                self._delete("packs", "id, segment, epoch, kind, digest", "segment = ?", number)
            least = min((mark.min_sequence for mark in changes.marks.values()), default=1 << 63)
            self._delete("graves", "id, before, digest", "before <= ?", to_blob(least))
            changes.dropped.clear()

    def _delete(self, table: str, sealed: str, which: str, value: int | bytes) -> None:
        """Remove rows; what was ``sealed`` of them leaves the seal."""
        query = f"DELETE FROM {table} WHERE {which} RETURNING {sealed}"  # noqa: S608 - words of this file
        for row in self._db.execute(query, (value,)).fetchall():
            self._seal.remove(table, row)

    def _insert(self, pack: Pack | GravePack) -> None:
        run = self._db.execute
        if isinstance(pack, Pack):
            at = run("INSERT INTO packs(segment, epoch, kind, rows, digest) VALUES(?, ?, ?, ?, ?)", pack).lastrowid
            self._seal.add("packs", (at, pack.segment, pack.epoch, pack.kind, pack.digest))
        else:
            at = run("INSERT INTO graves(before, rows, digest) VALUES(?, ?, ?)", pack).lastrowid
            self._seal.add("graves", (at, pack.before, pack.digest))

    def _write_names(self, changes: Changes) -> None:
        for kind, names in ((_TENANT, changes.tenants), (_NAMESPACE, changes.namespaces)):
            rows = [(kind, *name) for name in names]
            self._db.executemany("INSERT INTO names VALUES(?, ?, ?)", rows)
            for row in rows:
                self._seal.add("names", row)
            names.clear()

    def _write_marks(self, changes: Changes) -> None:
        rows = [(number, mark.epoch, mark.upto, to_blob(mark.min_sequence)) for number, mark in changes.marks.items()]
        self._db.execute("DELETE FROM segments")
        self._db.executemany("INSERT INTO segments VALUES(?, ?, ?, ?)", rows)
        self._seal.replace("segments", rows)
        self._set({"sequence": to_blob(changes.sequence), "epoch": to_blob(changes.epoch)})

    @contextmanager
    def _sealing(self) -> Iterator[None]:
        """A transaction that leaves the index sealed; after one that failed the index is of no use any more."""
        with self._transaction():
            yield
            self._db.execute("INSERT OR REPLACE INTO store VALUES(?, ?)", (_SEAL, self._seal.value))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def remove_index(directory: Path) -> None:
    """Remove an index and its log.

    Raises
    ------
    OSError
        The directory does not let go of it.
    """
    for suffix in ("-wal", "-shm", "-journal", ""):
        (directory / f"{INDEX_NAME}{suffix}").unlink(missing_ok=True)


@contextmanager
def _translated(verb: str) -> Iterator[None]:
    """Turn what SQLite raises into one error of ours."""
    try:
        yield
    except (sqlite3.Error, struct.error, OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot {verb} the index: {error}") from error
