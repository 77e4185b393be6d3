"""A slot backend with the faults that disks have, for tests: flipped bits, lost writes, errors, full and slow disks."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from kvtier.errors import StorageError
from kvtier.storage_backends.base import IntArray, SlotBackend
from kvtier.storage_backends.wrappers import WrappedSlots

__all__ = ["FaultySlots"]

_Transfer: TypeAlias = Callable[[IntArray, torch.Tensor], None]


class FaultySlots(WrappedSlots):
    """Passes everything to another backend, except for the faults that were ordered.

    Faults at rest (`flip_bit`, `truncate_slot`, `exchange_slots`) change stored bytes at once. Faults of transfers are
    ordered for the nth read or write from now, 1 being the next, and happen once. Only the failing ones say so.

    Parameters
    ----------
    inner : SlotBackend
        Where the bytes go. Wrap a verifying backend around this one, never inside.
    """

    def __init__(self, inner: SlotBackend) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._reads = 0
        self._writes = 0
        self._read_faults: dict[int, _Transfer] = {}
        self._write_faults: dict[int, _Transfer] = {}
        self._disk_full = False
        self._delay = 0.0

    def flip_bit(self, slot: int, bit: int) -> None:
        """Invert one bit of a stored slot, counted from its first byte."""

        def flip(rows: torch.Tensor) -> None:
            rows[0, bit // 8] ^= 1 << bit % 8

        self._edit([slot], flip)

    def truncate_slot(self, slot: int, keep: int) -> None:
        """Lose the bytes of a stored slot from byte ``keep`` on: they read as zeros, as after a lost extent."""

        def truncate(rows: torch.Tensor) -> None:
            rows[0, keep:] = 0

        self._edit([slot], truncate)

    def exchange_slots(self, one: int, other: int) -> None:
        """Swap two stored slots, as a disk does that writes to the wrong place."""

        def exchange(rows: torch.Tensor) -> None:
            rows.copy_(rows.flip(0))

        self._edit([one, other], exchange)

    def fail_read(self, nth: int = 1, code: int = errno.EIO) -> None:
        """Make the nth read from now raise `StorageError` with this cause; ``into`` is untouched."""
        self._order(self._read_faults, self._reads + nth, lambda slots, _: _fail("read", slots, code))

    def fail_write(self, nth: int = 1, code: int = errno.EIO) -> None:
        """Make the nth write from now raise `StorageError` with this cause, after it stored half of the rows."""

        def fail(slots: IntArray, data: torch.Tensor) -> None:
            self.inner.write(slots[: len(slots) // 2], data[: len(slots) // 2])
            _fail("write", slots, code)

        self._order(self._write_faults, self._writes + nth, fail)

    def short_read(self, nth: int = 1) -> None:
        """Make the nth read from now fill only the first half of its bytes, as a backend that ignores short reads.

        The other half holds wrong bytes: what lay there before could be right by accident.
        """

        def half(slots: IntArray, into: torch.Tensor) -> None:
            rows = torch.empty_like(into)
            self.inner.read(slots, rows)
            read = rows.view(-1)
            read[read.numel() // 2 :] ^= 0xFF
            into.copy_(rows)

        self._order(self._read_faults, self._reads + nth, half)

    def lose_write(self, nth: int = 1) -> None:
        """Make the nth write from now return as if it had stored its rows."""
        self._order(self._write_faults, self._writes + nth, lambda *_: None)

    def fill_disk(self) -> None:
        """Make every write fail for want of space, until `free_disk`."""
        self._disk_full = True

    def free_disk(self) -> None:
        """Let writes through again."""
        self._disk_full = False

    def slow_down(self, seconds: float) -> None:
        """Delay each transfer from now on."""
        self._delay = seconds

    def write(self, slots: IntArray, data: torch.Tensor) -> None:
        """Write, or do what was ordered for this write."""
        with self._lock:
            self._writes += 1
            fault = self._write_faults.pop(self._writes, self.inner.write)
        time.sleep(self._delay)
        if self._disk_full:
            _fail("write", slots, errno.ENOSPC)
        fault(slots, data)

    def read(self, slots: IntArray, into: torch.Tensor) -> None:
        """Read, or do what was ordered for this read."""
        with self._lock:
            self._reads += 1
            fault = self._read_faults.pop(self._reads, self.inner.read)
        time.sleep(self._delay)
        fault(slots, into)

    def _edit(self, slots: list[int], change: Callable[[torch.Tensor], None]) -> None:
        """Change stored bytes behind the back of whoever wraps this backend."""
        where = np.asarray(slots, dtype=np.int64)
        rows = torch.empty(len(slots), self.slot_bytes, dtype=torch.uint8)
        self.inner.read(where, rows)
        change(rows)
        self.inner.write(where, rows)

    def _order(self, faults: dict[int, _Transfer], call: int, fault: _Transfer) -> None:
        with self._lock:
            faults[call] = fault


def _fail(verb: str, slots: IntArray, code: int) -> None:
    """Raise what a backend raises when the system call failed with ``code``."""
    cause = OSError(code, os.strerror(code))
    raise StorageError(
        f"cannot {verb} slots {', '.join(map(str, slots))} ({cause.strerror}); ordered by a test"
    ) from cause
