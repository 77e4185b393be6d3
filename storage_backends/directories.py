"""Directories of records as they are found, without their configuration: for looking at them, and for repairs."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TypeAlias

from kvtier.errors import StorageError
from kvtier.storage_backends.files import FileOptions, FileRecords
from kvtier.storage_backends.files.layout import held_below, is_files_directory
from kvtier.storage_backends.segment import SegmentRecords, options_of
from kvtier.storage_backends.segment.recovery import Progress

__all__ = ["StoredRecords", "open_existing"]

StoredRecords: TypeAlias = SegmentRecords | FileRecords
"""A record store that keeps its records in a directory."""


def open_existing(directory: Path, *, read_only: bool, progress: Progress | None = None) -> StoredRecords:
    """Open the record store of a directory, whichever kind it is; makes nothing where there is none.

    Raises
    ------
    StoreInUseError
        A live process has it open; the message says which.
    StorageError
        There is no such directory, or no store in it, or it cannot be read.
    """
    if not directory.is_dir():
        reason = os.strerror(errno.ENOTDIR if directory.exists() else errno.ENOENT)
        raise StorageError(f"cannot look into {directory}: {reason}; is the path right?")
    if is_files_directory(directory):
        options = FileOptions(capacity=FileOptions.capacity_for(held_below(directory)))
        return FileRecords(directory, options, read_only=read_only)
    if not any(directory.glob("segment-*.kvt")) and not (directory / "index.sqlite").exists():
        raise StorageError(
            f"{directory} holds no kvtier store: neither segments nor records in files; is the path right?"
        )
    return SegmentRecords(directory, options_of(directory), read_only=read_only, progress=progress)
