"""Where the files of a directory are: ``ab/cd/<key>.kvr`` by the key in hex, files under way, damaged files."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvtier.record import BLOCK_BYTES, KEY_BYTES

__all__ = [
    "INCOMING",
    "LEDGER",
    "LOCK",
    "MARK",
    "QUARANTINE",
    "Found",
    "count_directories",
    "held_below",
    "held_by",
    "incoming_name",
    "is_files_directory",
    "record_path",
    "reserved_by",
    "walk",
]

MARK = "kvtier-files-1"
"""An empty file that says what the directory is, and in which version."""

LOCK = "lock"
"""Held by every process that has the directory open."""

LEDGER = "ledger"
INCOMING = "incoming"
QUARANTINE = "quarantine"

_SUFFIX = ".kvr"
_RECORD = re.compile(rf"([0-9a-f]{{{2 * KEY_BYTES}}})\.kvr")
_FAN = re.compile(r"[0-9a-f]{2}")
_INCOMING = re.compile(r"[0-9a-f]{32}-(\d{1,20})\.part")


class Found(NamedTuple):
    """A record's file as a walk found it; times in nanoseconds."""

    key: bytes
    held: int
    stored: int
    used: int


def is_files_directory(directory: Path) -> bool:
    """Whether somebody made the directory a store of this kind."""
    return (directory / MARK).is_file()


def record_path(directory: Path, key: bytes) -> Path:
    """Where the file of a key is, if there is one."""
    name = key.hex()
    return directory / name[:2] / name[2:4] / f"{name}{_SUFFIX}"


def incoming_name(reserved: int) -> str:
    """A name nobody else has, for a file that may grow to ``reserved`` bytes."""
    return f"{uuid.uuid4().hex}-{reserved}.part"


def reserved_by(name: str) -> int:
    """Bytes reserved for a file under way; 0 for a name that is not one."""
    match = _INCOMING.fullmatch(name)
    return int(match[1]) if match else 0


def held_by(stat: os.stat_result) -> int:
    """Bytes that a file takes: its blocks, and those that the system has yet to give it."""
    return max(stat.st_blocks * 512, -(-stat.st_size // BLOCK_BYTES) * BLOCK_BYTES)


def walk(directory: Path) -> Iterator[Found]:
    """Every record's file; those that come or go meanwhile may be left out."""
    for top in _directories(directory):
        for leaf in _directories(top):
            for entry in _entries(leaf):
                match = _RECORD.fullmatch(entry.name)
                if match is None or leaf != record_path(directory, bytes.fromhex(match[1])).parent:
                    continue
                try:
                    stat = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                yield Found(bytes.fromhex(match[1]), held_by(stat), stat.st_mtime_ns, stat.st_atime_ns)


def count_directories(directory: Path) -> int:
    """Directories that records made."""
    return sum(1 + sum(1 for _ in _directories(top)) for top in _directories(directory))


def held_below(directory: Path) -> int:
    """Bytes of all files of the directory, damaged ones and those under way too."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += held_by(Path(folder, name).lstat())
            except OSError:
                continue
    return total


def _directories(parent: Path) -> Iterator[Path]:
    for entry in _entries(parent):
        if _FAN.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []
