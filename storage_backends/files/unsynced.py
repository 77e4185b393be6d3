"""Records of a relaxed store that a power loss may take, and the note in the directory that says since when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kvtier.storage_backends.engines import IOEngine
from kvtier.storage_backends.files.layout import INCOMING, unsynced_name
from kvtier.storage_backends.files.shelf import Shelf, sync_directories

__all__ = ["Unsynced"]


class Unsynced:
    """Which records were not synced; a note in the directory outlives the process that forgets to.

    Who opens the directory after a power loss verifies what was put since the oldest note.
    """

    def __init__(self, shelf: Shelf, engine: IOEngine) -> None:
        self._shelf = shelf
        self._engine = engine
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._sizes: dict[bytes, int] = {}
        self._note: Path | None = None

    @contextmanager
    def landing(self) -> Iterator[dict[bytes, int]]:
        """Have a note in the directory while records get their names; they are to be entered with their sizes.

        Raises
        ------
        OSError
            There can be no note.
        """
        with self._lock:
            if self._note is None:
                note = self._shelf.directory / unsynced_name(time.time_ns())
                note.touch(mode=0o600)
                sync_directories([self._shelf.directory])
                self._note = note
            yield self._sizes

    @property
    def too_many(self) -> bool:
        """Whether it is time to sync."""
        return sum(self._sizes.values()) >= self._shelf.options.sync_bytes

    def sync(self) -> list[OSError]:
        """Make everything so far survive a power loss; what failed, in which case the note stays.

        One thread at a time: who finds nothing to sync must not return while another still syncs it.
        """
        with self._turn:
            with self._lock:
                sizes, self._sizes = self._sizes, {}
                note, self._note = self._note, None
            failures: list[OSError] = []
            touched = self._sync_files(sizes, failures)
            try:
                sync_directories(touched)
                if note is not None and not failures:
                    note.unlink(missing_ok=True)
            except OSError as error:
                failures.append(error)
            return failures

    def _sync_files(self, keys: Mapping[bytes, int], failures: list[OSError]) -> set[Path]:
        """Sync files; the directories that name them."""
        directory = self._shelf.directory
        touched: set[Path] = set()
        for key in keys:
            path = self._shelf.path(key)
            try:
                file = self._engine.open(path, writable=True)
                try:
                    file.sync()
                finally:
                    file.close()
            except FileNotFoundError:
                continue
            except OSError as error:
                failures.append(error)
            touched |= {directory / INCOMING, *(up for up in path.parents if up.is_relative_to(directory))}
        return touched
