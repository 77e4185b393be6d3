"""What one process knows of the records in a directory, in the order in which they were used."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvtier.storage_backends.files.layout import Found

__all__ = ["Entry", "FileTable"]

_TOUCH_NS = 60_000_000_000


@dataclass(slots=True)
class Entry:
    """One record.

    Parameters
    ----------
    held : int
        Bytes on the medium.
    stored, used : int
        When it was put and last read by anybody, as its file says; nanoseconds.
    hits : int
        Reads that this process served.
    tenant : str, optional
        None until its header was read.
    """

    held: int
    stored: int
    used: int
    hits: int = 0
    tenant: str | None = None


class FileTable:
    """Entries under keys, the one unused for longest first. The owner holds a lock around every call."""

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self.live_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def get(self, key: bytes) -> Entry | None:
        """The entry of a key."""
        return self._entries.get(key)

    def items(self) -> list[tuple[bytes, Entry]]:
        """All of them."""
        return list(self._entries.items())

    def entries(self) -> list[Entry]:
        """All of them, without their keys."""
        return list(self._entries.values())

    def add(self, key: bytes, entry: Entry) -> None:
        """A record that was found or put: the one used last."""
        self.remove(key)
        self._entries[key] = entry
        self.live_bytes += entry.held

    def remove(self, key: bytes) -> Entry | None:
        """A record that is gone."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.live_bytes -= entry.held
        return entry

    def replace(self, found: Iterable[Found]) -> None:
        """Take over what a walk found: order by use, keep what is known of records that are still there."""
        before = self._entries
        self._entries = OrderedDict()
        self.live_bytes = 0
        for one in sorted(found, key=lambda one: (max(one.used, _used(before.get(one.key))), one.stored)):
            known = before.get(one.key)
            same = known is not None and known.stored == one.stored
            used = max(one.used, _used(known))
            hits, tenant = (known.hits, known.tenant) if known is not None and same else (0, None)
            self.add(one.key, Entry(one.held, one.stored, used, hits, tenant))

    def use(self, key: bytes) -> bool:
        """A record was read: whether the others should be told, which is worth a write now and then."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        self._entries.move_to_end(key)
        entry.hits += 1
        now = time.time_ns()
        due = now - entry.used > _TOUCH_NS
        if due:
            entry.used = now
        return due

    def postpone(self, key: bytes, used: int) -> None:
        """Another process read a record."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.used = used
            self._entries.move_to_end(key)

    def candidates(self) -> Iterator[bytes]:
        """Keys, the one unused for longest first; a copy."""
        return iter(list(self._entries))

    def by_age(self) -> list[bytes]:
        """Keys in the order the records were stored."""
        return [key for key, _ in sorted(self._entries.items(), key=lambda item: (item[1].stored, item[0]))]


def _used(entry: Entry | None) -> int:
    return 0 if entry is None else entry.used
