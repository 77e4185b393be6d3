"""How many bytes a directory holds: one number in a file, changed by one process at a time."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

__all__ = ["Ledger"]

_ROW = struct.Struct("<QQ")


class Ledger:
    """A count of bytes that several processes keep.

    A process adds before it takes space and subtracts after it gave space back, so that one that dies in between leaves
    the number too high and never too low.

    Parameters
    ----------
    path : Path
        Made when it is not there.
    recount : callable
        Counts everything afresh, for a ledger that is new, damaged or was removed.

    Notes
    -----
    Within `locked` no other thread or process has it; nobody else changes the directory then.
    """

    def __init__(self, path: Path, recount: Callable[[], int]) -> None:
        self._path = path
        self._recount = recount
        self._lock = threading.Lock()
        self._fd = -1
        self.held = 0

    @contextmanager
    def locked(self) -> Iterator[Ledger]:
        """Have the number for oneself: `held` is up to date, and what was changed is written at the end.

        Raises
        ------
        OSError
            The ledger can be neither read nor made.
        """
        with self._lock:
            self._acquire()
            try:
                self.held = self._read()
                before = self.held
                try:
                    yield self
                finally:
                    if self.held != before:
                        self._write()
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    @contextmanager
    def quiet(self) -> Iterator[int]:
        """Bytes held now, while no thread of this process changes them; the last known where they cannot be read."""
        with self._lock:
            if self._fd >= 0:
                row = os.pread(self._fd, _ROW.size, 0)
                if len(row) == _ROW.size and _ROW.unpack(row)[1] == _check(_ROW.unpack(row)[0]):
                    self.held = _ROW.unpack(row)[0]
            yield self.held

    def add(self, count: int) -> None:
        """Take space; within `locked`, written at once."""
        self.held += count
        self._write()

    def subtract(self, count: int) -> None:
        """Give space back; within `locked`."""
        self.held = max(0, self.held - count)

    def recount(self) -> None:
        """Trust nothing; within `locked`."""
        self.held = self._recount()
        self._write()

    def close(self) -> None:
        """Let go of the file; idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _acquire(self) -> None:
        """Lock the file that has the name now: somebody may have removed the one that was opened."""
        while True:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                if self._path.stat().st_ino == os.fstat(self._fd).st_ino:
                    return
            except FileNotFoundError:
                pass
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> int:
        row = os.pread(self._fd, _ROW.size, 0)
        if len(row) == _ROW.size:
            held, check = _ROW.unpack(row)
            if check == _check(held):
                return int(held)
        held = self._recount()
        os.pwrite(self._fd, _ROW.pack(held, _check(held)), 0)
        return held

    def _write(self) -> None:
        os.pwrite(self._fd, _ROW.pack(self.held, _check(self.held)), 0)


def _check(held: int) -> int:
    return xxhash.xxh3_64_intdigest(held.to_bytes(8, "little"), seed=0x6B767469)
