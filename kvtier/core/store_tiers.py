"""The share of a store's tiers that live sessions take while a model is patched over it."""

from __future__ import annotations

import threading

from kvtier.core.session_tiers import SessionTiers, slots_within
from kvtier.errors import ConfigError
from kvtier.storage_backends.base import SlotBackend
from kvtier.storage_backends.host import HostSlots
from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.segment import SegmentRecords
from kvtier.storage_backends.segment.spill import SegmentSpill
from kvtier.storage_backends.wrappers import VerifiedSlots
from kvtier.types import TierName, format_bytes

__all__ = ["HostShare", "StoreTiers"]

_KEPT_SEGMENTS = 2  # one that records are written to, one that is cleared for them


class HostShare:
    """Host memory that records lend to sessions, from the first borrower to the last.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, records: HostRecords) -> None:
        self._records = records
        self._lock = threading.Lock()
        self._borrowers = 0
        self._left = 0

    def borrow(self, nbytes: int | None) -> int:
        """Take bytes, all that are left by default; how many.

        Raises
        ------
        ConfigError
            Fewer are left.
        CapacityError
            Leased records lie there.
        """
        with self._lock:
            if self._borrowers == 0:
                self._left = self._records.lend()
            wanted = self._left if nbytes is None else nbytes
            if not 0 < wanted <= self._left:
                self._settle()
                raise ConfigError(
                    f"live sessions may take {format_bytes(self._left)} more of the host tier, required "
                    f"{format_bytes(wanted) if wanted else 'some'}; raise the tier's sessions, or share them out"
                )
            self._left -= wanted
            self._borrowers += 1
            return wanted

    def give_back(self, nbytes: int) -> None:
        """Return what was borrowed."""
        with self._lock:
            self._left += nbytes
            self._borrowers -= 1
            self._settle()

    def _settle(self) -> None:
        if self._borrowers == 0:
            self._records.take_back()


class StoreTiers(SessionTiers):
    """Slots in what a store's tiers lend; made by `Store.session_tiers`, closed by the memory.

    Memory is set aside as long as the memory is open. Segments are taken from the cache when slots are reserved.

    Parameters
    ----------
    host : HostShare, optional
        Host memory.
    host_bytes : int, optional
        How much of it; all that is left by default.
    segments : SegmentRecords, optional
        Open for writing.
    """

    def __init__(self, host: HostShare | None, host_bytes: int | None, segments: SegmentRecords | None) -> None:
        self._segments = segments
        self._host = host
        self._borrowed = 0 if host is None else host.borrow(host_bytes)
        capacities: dict[TierName, int] = {"host": self._borrowed} if host is not None else {}
        if segments is not None:
            geometry = segments.options.geometry()
            capacities["nvme"] = (geometry.segments - _KEPT_SEGMENTS) * geometry.segment_bytes
        self.capacities = capacities

    def open(self, tier: TierName, slot_bytes: int, capacity: int) -> SlotBackend:
        """Slots in memory, or verified slots in segments."""
        if tier == "nvme" and self._segments is not None:
            slots = slots_within(SegmentSpill, tier, slot_bytes, capacity)
            return VerifiedSlots(SegmentSpill(slot_bytes, slots, self._segments))
        return HostSlots(slot_bytes, slots_within(HostSlots, tier, slot_bytes, capacity))

    def close(self) -> None:
        """Give the share of host memory back."""
        host, self._host = self._host, None
        if host is not None:
            host.give_back(self._borrowed)
