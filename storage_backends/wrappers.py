"""Slot backends around slot backends: digests that are checked on every read, and meters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from kvtier.errors import DamagedSlotsError, KVTierError
from kvtier.storage_backends.base import Capabilities, SlotBackend, check_rows
from kvtier.storage_backends.slots import IntArray, as_slots

__all__ = ["Meter", "MeteredSlots", "Meters", "VerifiedSlots", "WrappedSlots"]


class WrappedSlots(SlotBackend):
    """Forwards everything to another backend: the base of wrappers."""

    def __init__(self, inner: SlotBackend) -> None:
        self.inner = inner
        self.slot_bytes = inner.slot_bytes
        self.capacity_slots = inner.capacity_slots

    def reserve(self, count: int) -> IntArray:
        """Take slots of the inner backend."""
        return self.inner.reserve(count)

    def release(self, slots: IntArray) -> None:
        """Give slots back to the inner backend."""
        self.inner.release(slots)

    def write(self, slots: IntArray, data: torch.Tensor) -> None:
        """Write through."""
        self.inner.write(slots, data)

    def read(self, slots: IntArray, into: torch.Tensor) -> None:
        """Read through."""
        self.inner.read(slots, into)

    @property
    def free_slots(self) -> int:
        """Slots that the inner backend can still give."""
        return self.inner.free_slots

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the inner backend holds."""
        return self.inner.allocated_bytes

    @property
    def capacity_bytes(self) -> int:
        """Most bytes that the inner backend may hold."""
        return self.inner.capacity_bytes

    def capabilities(self) -> Capabilities:
        """What the inner backend can do."""
        return self.inner.capabilities()

    def close(self) -> None:
        """Close the inner backend."""
        self.inner.close()


class VerifiedSlots(WrappedSlots):
    """Refuses to return bytes other than those that were written.

    An xxh3-128 digest of each slot is taken from the caller's rows at `write` and compared with the rows of `read`, so
    it covers every copy and device in between. Digests live in the session's memory, 17 bytes a slot: damage to the
    medium cannot reach them.

    Parameters
    ----------
    inner : SlotBackend
        Where the bytes go.
    """

    def __init__(self, inner: SlotBackend) -> None:
        super().__init__(inner)
        self._digests = np.zeros((self.capacity_slots, 2), dtype=np.uint64)
        self._written = np.zeros(self.capacity_slots, dtype=np.bool_)
        self._lock = threading.Lock()
        self._verified_bytes = 0

    @property
    def verified_bytes(self) -> int:
        """Bytes that were read and found right, since the start."""
        return self._verified_bytes

    @property
    def digest_bytes(self) -> int:
        """Host memory that the digests take."""
        return self._digests.nbytes + self._written.nbytes

    def reserve(self, count: int) -> IntArray:
        """Take slots; what was written to them before is forgotten."""
        # Forgetting at reserve, not at release: a released slot may already be somebody else's when release returns.
        slots = self.inner.reserve(count)
        self._written[slots] = False
        return slots

    def write(self, slots: IntArray, data: torch.Tensor) -> None:
        """Digest the rows [n, slot_bytes] and write them; a write that fails changes no digest."""
        check_rows(data, len(slots), self.slot_bytes)
        slots = as_slots(slots, self.capacity_slots)
        digests = _digests(data)
        self.inner.write(slots, data)
        self._digests[slots] = digests
        self._written[slots] = True

    def read(self, slots: IntArray, into: torch.Tensor) -> None:
        """Fill ``into`` and compare; rows that are not what was written are zeroed.

        Raises
        ------
        DamagedSlotsError
            Naming exactly the slots whose bytes differ or were never written; the other rows are right.
        """
        self.inner.read(slots, into)
        slots = as_slots(slots, self.capacity_slots)
        right = (_digests(into) == self._digests[slots]).all(axis=1) & self._written[slots]
        with self._lock:
            self._verified_bytes += int(np.count_nonzero(right)) * self.slot_bytes
        if right.all():
            return
        into[torch.from_numpy(~right)] = 0
        damaged = np.unique(slots[~right])
        never = damaged[~self._written[damaged]]
        raise DamagedSlotsError(
            f"required the bytes that were written, got others in {damaged.size - never.size} slots and nothing ever "
            f"written in {never.size} of the {slots.size} read ({self.capabilities().name}); recompute these pages",
            damaged.tolist(),
        )


@dataclass(frozen=True, slots=True)
class Meter:
    """Transfers of one direction that succeeded; ``seconds`` adds up calls, also those that overlap in time."""

    ops: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Meters:
    """Transfers since the start, and how many raised."""

    read: Meter = Meter()
    write: Meter = Meter()
    failed_ops: int = 0


class MeteredSlots(WrappedSlots):
    """Counts the calls, bytes and seconds that go through; `meters` is consistent at any time, from any thread."""

    def __init__(self, inner: SlotBackend) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._meters = Meters()

    @property
    def meters(self) -> Meters:
        """The counters now."""
        return self._meters

    def write(self, slots: IntArray, data: torch.Tensor) -> None:
        """Write through, counted."""
        seconds = self._timed(lambda: self.inner.write(slots, data))
        with self._lock:
            self._meters = replace(self._meters, write=self._added(self._meters.write, len(slots), seconds))

    def read(self, slots: IntArray, into: torch.Tensor) -> None:
        """Read through, counted."""
        seconds = self._timed(lambda: self.inner.read(slots, into))
        with self._lock:
            self._meters = replace(self._meters, read=self._added(self._meters.read, len(slots), seconds))

    def _timed(self, transfer: Callable[[], None]) -> float:
        """Run a transfer; its seconds, or a failure counted."""
        start = time.perf_counter()
        try:
            transfer()
        except KVTierError:
            with self._lock:
                self._meters = replace(self._meters, failed_ops=self._meters.failed_ops + 1)
            raise
        return time.perf_counter() - start

    def _added(self, meter: Meter, slots: int, seconds: float) -> Meter:
        return Meter(meter.ops + 1, meter.bytes + slots * self.slot_bytes, meter.seconds + seconds)


def _digests(rows: torch.Tensor) -> npt.NDArray[np.uint64]:
    """xxh3-128 of each row [n, slot_bytes]: uint64 [n, 2]."""
    size = rows.shape[1]
    flat: memoryview = np.ascontiguousarray(rows.numpy()).reshape(-1).data
    joined = bytearray().join(xxhash.xxh3_128_digest(flat[at : at + size]) for at in range(0, flat.nbytes, size))
    return np.frombuffer(joined, dtype=np.uint64).reshape(-1, 2)
