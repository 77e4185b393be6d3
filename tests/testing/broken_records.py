"""Record stores with one thing wrong each: what the laws and the crash tests must catch."""

from __future__ import annotations

import os
from pathlib import Path

from kvtier.testing.reference_records import ReferenceRecords


class SkipsSync(ReferenceRecords):
    """Acknowledges bytes that may be in the page cache alone."""

    def _sync(self, descriptor: int) -> None:
        pass


class NamesBeforeSync(ReferenceRecords):
    """Gives a file its name before its bytes are safe."""

    def _write(self, path: Path, data: bytes) -> None:
        part = path.with_suffix(".part")
        part.write_bytes(b"")
        descriptor = os.open(part, os.O_WRONLY)
        part.rename(path)
        self._sync_directory()
        os.write(descriptor, data)
        self._sync(descriptor)
        os.close(descriptor)


class SkipsDirectorySync(ReferenceRecords):
    """Believes that a synced file keeps its name, and that an unlinked one is gone."""

    def _sync_directory(self) -> None:
        pass


class TrustsTornFiles(SkipsSync):
    """Takes what it finds in a file for a record."""

    def _intact(self, data: bytes, key: bytes) -> bool:
        return len(data) >= 112


class SyncsTooLate(ReferenceRecords):
    """Syncs what it stored at the next put: the last record is not safe when it is acknowledged."""

    _before: Path | None = None

    def _sync(self, descriptor: int) -> None:
        if self._before is not None and self._before.exists():
            late = os.open(self._before, os.O_RDONLY)
            os.fsync(late)
            os.close(late)

    def _write(self, path: Path, data: bytes) -> None:
        super()._write(path, data)
        self._before = path
