"""Files into and out of a directory: every change under the ledger's lock, so that no two processes disagree."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from kvtier.record import BLOCK_BYTES
from kvtier.storage_backends import failpoints
from kvtier.storage_backends.files.layout import (
    INCOMING,
    LEDGER,
    QUARANTINE,
    count_directories,
    held_by,
    incoming_name,
    record_path,
    reserved_by,
    walk,
)
from kvtier.storage_backends.files.ledger import Ledger
from kvtier.storage_backends.files.options import FileOptions
from kvtier.storage_backends.files.table import Entry, FileTable
from kvtier.storage_backends.leases import LeaseBook
from kvtier.storage_backends.record_counts import RecordCounts
from kvtier.types import format_bytes

__all__ = ["FIXED_BYTES", "SLACK_BYTES", "Shelf", "sync_directories"]

failpoints.NAMES |= {"files.reserved", "files.renamed", "files.unlinked", "files.evicted", "files.quarantined"}

FIXED_BYTES = 5 * BLOCK_BYTES
"""Ledger, the directory itself, incoming and quarantine, one to spare."""

SLACK_BYTES = 3 * BLOCK_BYTES
"""What a file may take beside its bytes: a block of the file system's own, and two new directories."""


class Shelf:
    """The directory, and what this process knows of it.

    Attributes
    ----------
    table : FileTable
        Behind ``lock``.
    counters : RecordCounts
        Behind ``lock``.
    lock : RLock
        Never held while waiting for the ledger's; the ledger's may be held while waiting for it.
    losses : int
        Files that went, so far; behind ``lock``.
    quarantined : int
        Bytes of damaged files, as this process last saw them.
    """

    def __init__(self, directory: Path, options: FileOptions, leases: LeaseBook) -> None:
        self.directory = directory
        self.options = options
        self.table = FileTable()
        self.counters = RecordCounts()
        self.lock = threading.RLock()
        self.ledger = Ledger(directory / LEDGER, self.count_all)
        self.quarantined = 0
        self.losses = 0
        self._leases = leases

    def path(self, key: bytes) -> Path:
        """Where the file of a key is."""
        return record_path(self.directory, key)

    def adopt(self, key: bytes) -> bool:
        """Look whether another process put a record; one call to the file system if this one knows none."""
        with self.lock:
            if key in self.table:
                return True
        return self.look(key)

    def look(self, key: bytes) -> bool:
        """Whether there is a file now, whatever this process knew."""
        losses = self.losses
        try:
            stat = self.path(key).stat()
        except OSError:
            self.forget(key)
            return False
        self.note(key, stat, losses)
        return True

    def note(self, key: bytes, stat: os.stat_result, losses: int) -> None:
        """A file was there when so many had been lost; if one went since, it may have been this one."""
        with self.lock:
            if key not in self.table and losses == self.losses:
                self.table.add(key, Entry(held_by(stat), stat.st_mtime_ns, stat.st_atime_ns))

    def refresh(self) -> None:
        """Look at every file."""
        found = list(walk(self.directory))
        with self.lock:
            self.table.replace(found)
        self.quarantined = sum(_sizes(self.directory / QUARANTINE))

    def forget(self, key: bytes) -> None:
        """A file is not there any more."""
        with self.lock:
            self.losses += 1
            self.table.remove(key)

    def reserve(self, nbytes: int) -> Path | str:
        """Take space for a file, evicting others if need be, and make it; or say why there is none.

        Raises
        ------
        OSError
            The file cannot be made.
        """
        most = self.options.capacity - FIXED_BYTES - SLACK_BYTES
        if nbytes > most:
            return f"the record needs {format_bytes(nbytes)}, and the tier holds at most {format_bytes(most)}"
        need = nbytes + SLACK_BYTES
        with self.ledger.locked():
            if reason := self.make_room(need):
                return reason
            self.ledger.add(need)
            part = self.directory / INCOMING / incoming_name(need)
            try:
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            except FileNotFoundError:
                part.parent.mkdir(exist_ok=True)
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            except OSError:
                self.ledger.subtract(need)
                raise
        failpoints.reach("files.reserved")
        return part

    def abandon(self, part: Path) -> None:
        """Give up a file under way and its space."""
        try:
            with self.ledger.locked():
                part.unlink()
                self.ledger.subtract(reserved_by(part.name))
        except OSError:
            return  # the ledger stays too high until somebody opens the directory alone

    def publish(self, part: Path, key: bytes, sequence: int) -> set[Path]:
        """Give a finished file its name; directories to sync, none if another process was faster.

        In durable mode every directory that has a name is durable: who finds one need not ask who made it.

        Raises
        ------
        OSError
            It cannot be had; the file under way is still there.
        """
        path = self.path(key)
        os.utime(part, ns=(time.time_ns(), sequence))
        with self.ledger.locked():
            if path.exists():
                part.unlink()
                self.ledger.subtract(reserved_by(part.name))
                return set()
            self._make_directories(path.parent)
            part.rename(path)
            failpoints.reach("files.renamed")
            held = held_by(path.stat())
            self.ledger.held += held - reserved_by(part.name)
            with self.lock:
                self.table.add(key, Entry(held, sequence, time.time_ns()))
        return {path.parent, part.parent}

    def remove(self, keys: Iterable[bytes]) -> int:
        """Delete files for good; how many there were.

        Raises
        ------
        OSError
            The ledger cannot be had, a file cannot be deleted, or it may come back.
        """
        leaves: set[Path] = set()
        removed = 0
        with self.ledger.locked():
            for key in keys:
                if self._unlink(key):
                    removed += 1
                    leaves.add(self.path(key).parent)
                    failpoints.reach("files.unlinked")
        # A relaxed put may not have come out of there for sure; until it has, its deletion is not sure either.
        sync_directories({*leaves, self.directory / INCOMING} if leaves else ())
        with self.ledger.locked():
            for leaf in leaves:
                self._remove_empty(leaf)
        return removed

    def quarantine(self, key: bytes, inode: int) -> None:
        """Put a damaged file aside, if the name still means that file."""
        path, aside = self.path(key), self.directory / QUARANTINE
        try:
            with self.ledger.locked():
                if path.stat().st_ino == inode:
                    aside.mkdir(exist_ok=True)
                    path.rename(aside / f"{path.stem}-{time.time_ns()}")
                    failpoints.reach("files.quarantined")
                    self._trim_quarantine()
            sync_directories([path.parent, aside])
        except OSError:
            pass
        self.forget(key)

    def make_room(self, need: int) -> str:
        """Evict until ``need`` more bytes fit, the record unused for longest first; or say why not. Within the lock."""
        for look_again in (True, False):
            with self.lock:
                candidates = self.table.candidates()
            for key in candidates:
                if self.ledger.held + need <= self.options.capacity:
                    return ""
                self._evict(key)
            if self.ledger.held + need <= self.options.capacity:
                return ""
            if look_again:
                self.refresh()
        return f"no room in {format_bytes(self.options.capacity)} beside what is leased or being written"

    def recover(self) -> None:
        """Clear up what a dead process left; for who has the directory alone."""
        with self.ledger.locked():
            incoming = self.directory / INCOMING
            for name in _names(incoming):
                if reserved_by(name):
                    (incoming / name).unlink(missing_ok=True)
            self.ledger.recount()

    def keep_capacity(self) -> str:
        """Evict what a smaller capacity has no room for; why that cannot be done, or nothing."""
        with self.ledger.locked():
            self._trim_quarantine()
            return self.make_room(0)

    def touch(self, key: bytes) -> None:
        """Tell other processes that a record was read."""
        try:
            stat = self.path(key).stat()
            os.utime(self.path(key), ns=(time.time_ns(), stat.st_mtime_ns))
        except OSError:
            return

    def _evict(self, key: bytes) -> None:
        """Delete one file for room, unless it is leased here or was read elsewhere in the meantime."""
        if self._leases.holds(key):
            return
        try:
            used = self.path(key).stat().st_atime_ns
        except OSError:
            self.forget(key)
            return
        with self.lock:
            entry = self.table.get(key)
            if entry is not None and used > entry.used:
                self.table.postpone(key, used)
                return
        if self._unlink(key):
            self._remove_empty(self.path(key).parent)
            with self.lock:
                self.counters.evicted += 1
            failpoints.reach("files.evicted")

    def _unlink(self, key: bytes) -> bool:
        """Delete a file; whether there was one. Within the ledger's lock."""
        path = self.path(key)
        self.forget(key)
        try:
            held = held_by(path.stat())
            path.unlink()
        except FileNotFoundError:
            return False
        self.ledger.subtract(held)
        return True

    def _remove_empty(self, leaf: Path) -> None:
        """Give back directories that hold nothing any more."""
        for directory in (leaf, leaf.parent):
            try:
                directory.rmdir()
            except OSError:
                return
            self.ledger.subtract(BLOCK_BYTES)

    def _make_directories(self, leaf: Path) -> None:
        """Have a directory, counted, and in durable mode there for good. Within the ledger's lock."""
        for directory in (leaf.parent, leaf):
            try:
                directory.mkdir(mode=0o700)
            except FileExistsError:
                continue
            self.ledger.held += BLOCK_BYTES
            if self.options.durability == "durable":
                sync_directories([directory.parent])

    def _trim_quarantine(self) -> None:
        """Keep the latest damaged files within their bound. Within the ledger's lock."""
        aside = self.directory / QUARANTINE
        names = sorted(_names(aside), key=lambda name: name.rpartition("-")[2])
        sizes = {name: size for name in names if (size := _size(aside / name))}
        total = sum(sizes.values())
        for name, size in sizes.items():
            if total <= self.options.quarantine_bytes:
                break
            (aside / name).unlink(missing_ok=True)
            self.ledger.subtract(size)
            total -= size
        self.quarantined = total

    def count_all(self) -> int:
        """Bytes of everything in the directory, files under way at what they may grow to."""
        incoming = self.directory / INCOMING
        return (
            FIXED_BYTES
            + count_directories(self.directory) * BLOCK_BYTES
            + sum(found.held for found in walk(self.directory))
            + sum(max(reserved_by(name), _size(incoming / name)) for name in _names(incoming))
            + sum(_sizes(self.directory / QUARANTINE))
        )


def sync_directories(directories: Iterable[Path]) -> None:
    """Make names survive a power loss; a directory that went has none to keep.

    Raises
    ------
    OSError
        The medium failed.
    """
    for directory in sorted(directories, key=lambda path: len(path.parts), reverse=True):
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _names(directory: Path) -> list[str]:
    try:
        return [path.name for path in directory.iterdir()]
    except OSError:
        return []


def _size(path: Path) -> int:
    try:
        return held_by(path.lstat())
    except OSError:
        return 0


def _sizes(directory: Path) -> list[int]:
    return [_size(directory / name) for name in _names(directory)]
