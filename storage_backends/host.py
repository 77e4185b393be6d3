"""Slots in host memory, grown and given back in slabs: the host tier of a live session."""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kvtier.errors import CapacityError, StorageError
from kvtier.storage_backends.base import Capabilities, SlotBackend, check_rows, check_sizes
from kvtier.storage_backends.memory import PAGE_BYTES, ByteRows, PinnedRegion, copy_rows, round_up
from kvtier.storage_backends.slots import IntArray, Rows, SlotAllocator, compact, is_run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["HostSlots", "Span", "spans_of"]

_MAX_SLABS = 16
_GROWTH = 4  # a slab adds a quarter of what lies below it
_FIRST_SLAB_BYTES = 1 << 20


class Span(NamedTuple):
    """Neighbouring slots from ``first`` up to ``stop``."""

    first: int
    stop: int


class _Part(NamedTuple):
    """The rows of one transfer that fall into one slab."""

    slab: ByteRows  # [slots of the slab, slot_bytes]
    local: Rows  # slots counted from the slab's first
    rows: Rows


class HostSlots(SlotBackend):
    """Slots in host memory; what is held follows what is used.

    The slot space is cut into at most 16 slabs, each a quarter of what lies below it. A slab exists while one of its
    slots is reserved; a reservation lies in one where that has room. Slabs are page-locked where CUDA allows it.

    Parameters
    ----------
    slot_bytes : int
        Payload bytes of a slot.
    capacity_slots : int
        Most slots; a hard bound on memory too.

    Notes
    -----
    One lock guards the accounting; copies run outside it, so a large copy never holds up `reserve`.
    """

    def __init__(self, slot_bytes: int, capacity_slots: int) -> None:
        check_sizes(slot_bytes, capacity_slots)
        self.slot_bytes = slot_bytes
        self.capacity_slots = capacity_slots
        self._bounds = _slab_bounds(slot_bytes, capacity_slots)
        self._starts: list[int] = self._bounds.tolist()
        self._slabs: dict[int, PinnedRegion] = {}
        self._memory: dict[int, ByteRows] = {}  # theirs, as numpy sees it
        self._slots = SlotAllocator(capacity_slots, self._starts[:-1])
        self._lock = threading.Lock()
        self._closed = False
        self._all_pinned = torch.cuda.is_available()

    @classmethod
    def slots_within(cls, slot_bytes: int, capacity_bytes: int) -> int:
        """Most slots whose slabs, in whole pages, stay within a budget."""
        slots = super().slots_within(slot_bytes, capacity_bytes)
        while (excess := _whole_pages(slot_bytes, _slab_bounds(slot_bytes, slots)) - capacity_bytes) > 0 and slots:
            slots = max(0, slots - max(1, excess // slot_bytes))
        return slots

    def reserve(self, count: int) -> IntArray:
        """Take slots; the slabs that they fall into come into being."""
        with self._lock:
            self._require_open()
            slots = self._slots.reserve(count)
            try:
                for slab, used in enumerate(self._slots.used):
                    if used:
                        self._grow(slab)
            except CapacityError:
                self._slots.release(slots)
                self._shrink()
                raise
        return slots

    def release(self, slots: IntArray) -> None:
        """Give slots back, and the slabs that became wholly free to the system."""
        with self._lock:
            self._require_open()
            self._slots.release(slots)
            self._shrink()

    def write(self, slots: IntArray, data: torch.Tensor) -> None:
        """Copy rows [n, slot_bytes] in; a run of slots is one copy per slab."""
        check_rows(data, len(slots), self.slot_bytes)
        rows = data.numpy()
        for part in self._parts(slots, distinct=True):
            copy_rows(rows, part.rows, part.slab, part.local)

    def read(self, slots: IntArray, into: torch.Tensor) -> None:
        """Copy rows [n, slot_bytes] out; a run of slots is one copy per slab."""
        check_rows(into, len(slots), self.slot_bytes)
        rows = into.numpy()
        for part in self._parts(slots, distinct=False):
            copy_rows(part.slab, part.local, rows, part.rows)

    def views(self, spans: Sequence[tuple[int, int]]) -> list[ByteRows]:
        """The memory of reserved slots as flat uint8 arrays, one for each span, more where a span leaves a slab.

        They may be used until the slots are released, and keep their memory when the slots are closed.
        """
        with self._lock:
            self._require_open()
            found: list[ByteRows] = []
            for first, stop in spans:
                while first < stop:
                    slab = bisect_right(self._starts, first) - 1
                    start, end = self._starts[slab], min(stop, self._starts[slab + 1])
                    found.append(
                        self._memory[slab][(first - start) * self.slot_bytes : (end - start) * self.slot_bytes]
                    )
                    first = end
            return found

    @property
    def free_slots(self) -> int:
        """Slots that can still be reserved, whether their slab exists or not."""
        return self._slots.free

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the slabs that exist, in whole pages."""
        with self._lock:
            return sum(slab.held_bytes for slab in self._slabs.values())

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all slabs, in whole pages."""
        return _whole_pages(self.slot_bytes, self._bounds)

    def capabilities(self) -> Capabilities:
        """Pinned, as long as CUDA locked every slab so far."""
        note = "" if self._all_pinned else "pageable memory: CUDA is not available, or refused to lock it"
        return Capabilities(name="host", pinned=self._all_pinned, direct_io=False, alignment=1, note=note)

    def close(self) -> None:
        """Give all slabs back; copies under way end with the memory they began with."""
        with self._lock:
            self._closed = True
            for slab in list(self._slabs):
                self._drop(slab)

    def _require_open(self) -> None:
        if self._closed:
            raise StorageError("the host slots are closed; open new ones")

    def _slab_of(self, slots: IntArray) -> IntArray:
        return np.searchsorted(self._bounds, slots, side="right") - 1

    def _grow(self, slab: int) -> None:
        """Have the slab; called with the lock held."""
        if slab not in self._slabs:
            region = PinnedRegion(int(self._bounds[slab + 1] - self._bounds[slab]) * self.slot_bytes)
            self._slabs[slab] = region
            self._memory[slab] = region.bytes.numpy()
            self._all_pinned &= region.pinned

    def _shrink(self) -> None:
        """Give wholly free slabs back; called with the lock held."""
        used = self._slots.used
        for slab in [slab for slab in self._slabs if not used[slab]]:
            self._drop(slab)

    def _drop(self, slab: int) -> None:
        """Give a slab back; called with the lock held."""
        del self._memory[slab]
        self._slabs.pop(slab).close()

    def _parts(self, slots: IntArray, *, distinct: bool) -> Iterator[_Part]:
        """Cut a transfer at the slab borders."""
        with self._lock:
            self._require_open()
            slots = self._slots.require_reserved(slots, distinct=distinct)
            slab_of = self._slab_of(slots)
            touched = np.unique(slab_of).tolist()
            memory = {slab: self._memory[slab].reshape(-1, self.slot_bytes) for slab in touched}
        for slab in touched:
            inside = np.flatnonzero(slab_of == slab)
            yield _Part(memory[slab], compact(slots[inside] - self._bounds[slab]), compact(inside))


def spans_of(ascending: IntArray) -> list[Span]:
    """Ascending slots as spans of neighbours."""
    if is_run(ascending):
        return [Span(int(ascending[0]), int(ascending[-1]) + 1)] if ascending.size else []
    breaks = np.flatnonzero(np.diff(ascending) != 1)
    firsts = ascending[np.concatenate([[0], breaks + 1])]
    lasts = ascending[np.concatenate([breaks, [ascending.size - 1]])]
    return [Span(first, last + 1) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]


def _slab_bounds(slot_bytes: int, capacity_slots: int) -> IntArray:
    """First slot of each slab, and the end: int64 [slabs + 1].

    The first slab is the share from which quarters reach the capacity in 16 slabs, but not below a mebibyte.
    """
    share = (1 + 1 / _GROWTH) ** (1 - _MAX_SLABS)
    first = max(int(np.ceil(capacity_slots * share)), _FIRST_SLAB_BYTES // slot_bytes, 1)
    bounds = [0]
    while bounds[-1] < capacity_slots:
        bounds.append(min(capacity_slots, bounds[-1] + max(first, -(-bounds[-1] // _GROWTH))))
    return np.asarray(bounds, dtype=np.int64)


def _whole_pages(slot_bytes: int, bounds: IntArray) -> int:
    """Bytes of all slabs, each in whole pages."""
    return sum(round_up(slots * slot_bytes, PAGE_BYTES) for slots in np.diff(bounds).tolist())
