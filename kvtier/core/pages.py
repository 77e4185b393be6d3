"""The page table: where each sealed page has copies, as arrays; no object per page."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtier.core.policy import IntArray

__all__ = ["DEVICE", "HOST", "NVME", "PageTable"]

DEVICE: Final = 0
HOST: Final = 1
NVME: Final = 2

_BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


class PageTable:
    """Pages of one layer group: references, copies in each tier, last use.

    A sealed page never changes, so every copy of it is as good as any other: demotion drops a copy once a lower one
    exists.

    Attributes
    ----------
    refs : [pages] int64
        Sequences that hold the page; 0 for an unused id.
    copy : [3, pages] bool
        Whether the page has a copy on DEVICE, HOST, NVME.
    slot : [3, pages] int64
        Frame or slot of that copy; meaningless where ``copy`` is false.
    last_use : [pages] int64
        Clock of the last step that read it.
    busy : [pages] bool
        A background copy reads or writes it; it must settle before the page is freed or moved.
    """

    def __init__(self) -> None:
        self.refs: IntArray = np.zeros(0, dtype=np.int64)
        self.copy: _BoolArray = np.zeros((3, 0), dtype=np.bool_)
        self.slot: IntArray = np.zeros((3, 0), dtype=np.int64)
        self.last_use: IntArray = np.zeros(0, dtype=np.int64)
        self.busy: _BoolArray = np.zeros(0, dtype=np.bool_)
        self._free: IntArray = np.zeros(0, dtype=np.int64)

    @property
    def live(self) -> int:
        """Pages in use."""
        return int(np.count_nonzero(self.refs))

    def allocate(self, heads: int, columns: int) -> IntArray:
        """Ids [heads, columns] of new pages, with one reference and no copy; they ascend with the column first."""
        count = heads * columns
        if self._free.size < count:
            self._extend(max(count - self._free.size, self.refs.size // 2, 64))
        pages, self._free = self._free[:count], self._free[count:]
        self.refs[pages] = 1
        return pages.reshape(columns, heads).T.copy()

    def retain(self, pages: IntArray) -> None:
        """One more sequence holds these pages; ids are distinct."""
        self.refs[pages] += 1

    def drop(self, pages: IntArray) -> IntArray:
        """One sequence fewer holds these pages; returns those that nobody holds now, still with their copies."""
        flat = pages.ravel()
        self.refs[flat] -= 1
        gone: IntArray = flat[self.refs[flat] == 0]
        return gone

    def forget(self, pages: IntArray) -> None:
        """Make unused ids allocatable again; their copies must be released before."""
        self.copy[:, pages] = False
        self._free = np.sort(np.concatenate([self._free, pages]))

    def _extend(self, count: int) -> None:
        size = self.refs.size
        self.refs = np.concatenate([self.refs, np.zeros(count, dtype=np.int64)])
        self.last_use = np.concatenate([self.last_use, np.zeros(count, dtype=np.int64)])
        self.busy = np.concatenate([self.busy, np.zeros(count, dtype=np.bool_)])
        self.copy = np.concatenate([self.copy, np.zeros((3, count), dtype=np.bool_)], axis=1)
        self.slot = np.concatenate([self.slot, np.zeros((3, count), dtype=np.int64)], axis=1)
        self._free = np.concatenate([self._free, np.arange(size, size + count, dtype=np.int64)])
