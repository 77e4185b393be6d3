"""The recorder's log: every call that changed files, in order, begin and end of each."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

__all__ = ["Event", "Kind", "read_log"]

_HEADER = struct.Struct("<IIQQqqqIIIIQ")


class Kind(IntEnum):
    """What was called; the numbers are those of ``recorder.c``."""

    OPEN = 1
    WRITE = 2
    SIZE = 3
    ALLOCATE = 4
    SYNC = 5
    SYNC_ALL = 6
    RENAME = 7
    UNLINK = 8
    MKDIR = 9
    LINK = 10
    MARK = 11
    UNTRACKED = 12


@dataclass(frozen=True, slots=True)
class Event:
    """One half of a call: its begin, with all that is known, or its ``ended`` half, with the result.

    Attributes
    ----------
    call : int
        Number shared by both halves.
    path, other : str
        Absolute names, where the call was given names; ``other`` is where a rename leads, or what is untracked.
    data : bytes-like
        What was written or marked.
    """

    kind: Kind
    ended: bool
    call: int
    inode: int
    offset: int
    length: int
    result: int
    flags: int
    path: str
    other: str
    data: memoryview

    @property
    def failed(self) -> bool:
        """Whether an ended call changed nothing; ``posix_fallocate`` returns an error number instead of -1."""
        return self.result < 0 or (self.kind is Kind.ALLOCATE and self.result != 0)


def read_log(path: Path) -> Iterator[Event]:
    """Events of a log, in order; a last one that was cut off by a kill is left out."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file:
        log = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    at = 0
    while at + _HEADER.size <= len(log):
        kind, phase, call, inode, offset, length, result, flags, path_bytes, other_bytes, _, data_bytes = (
            _HEADER.unpack_from(log, at)
        )
        names = at + _HEADER.size
        data = names + path_bytes + other_bytes
        at = data + data_bytes
        if at > len(log):
            return
        yield Event(
            Kind(kind),
            bool(phase),
            call,
            inode,
            offset,
            length,
            result,
            flags,
            str(log[names : names + path_bytes], "utf-8", "surrogateescape"),
            str(log[names + path_bytes : data], "utf-8", "surrogateescape"),
            log[data:at],
        )
