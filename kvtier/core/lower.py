"""The tiers below the device: copies of sealed pages in host memory and on NVMe, and room for more."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from kvtier.core.arena import Arena
from kvtier.core.pages import DEVICE, HOST, NVME, PageTable
from kvtier.core.policy import IntArray, PlacementPolicy
from kvtier.errors import CapacityError, DamagedSlotsError, PagesLostError, StorageError
from kvtier.storage_backends.base import SlotBackend
from kvtier.storage_backends.eviction import EvictionOrder
from kvtier.types import format_bytes

__all__ = ["TIER_NAMES", "LowerTiers", "Traffic"]

TIER_NAMES = {DEVICE: "device", HOST: "host", NVME: "nvme"}
_BATCH_BYTES = 4 << 20


@dataclass(slots=True)
class Traffic:
    """Bytes moved since the start, counted at the copies.

    ``written`` left the device, ``spilled`` went from host to NVMe, ``read`` came back, ``promoted`` of those stayed.
    """

    written: int = 0
    spilled: int = 0
    read: int = 0
    promoted: int = 0


@dataclass(slots=True)
class LowerTiers:
    """Copies of pages below the device; a slot holds K [P, Dk] then V [P, Dv] of one page.

    Parameters
    ----------
    backends : dict of int to SlotBackend
        Those of ``HOST`` and ``NVME`` that exist, in this order.

    Attributes
    ----------
    peak : dict of int to int
        The most bytes each tier ever held.
    orders : dict of int to EvictionOrder
        Who leaves each tier first.
    """

    arena: Arena
    table: PageTable
    placement: PlacementPolicy
    backends: dict[int, SlotBackend] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    peak: dict[int, int] = field(default_factory=dict)
    orders: dict[int, EvictionOrder] = field(init=False)
    closed: bool = False

    def __post_init__(self) -> None:
        self.orders = {tier: self.placement.order() for tier in (HOST, NVME)}

    def read(self, tier: int, slots: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages in these slots, on the device: K [n, P, Dk], V [n, P, Dv].

        Raises
        ------
        PagesLostError
            When stored bytes fail their digest or cannot be read.
        """
        arena, layer = self.arena, self.arena.layer
        rows = torch.empty(slots.size, arena.frame_bytes, dtype=torch.uint8)
        try:
            self.backends[tier].read(slots, rows)
        except DamagedSlotsError as error:
            raise PagesLostError(
                f"{len(error.slots)} pages of this session in the {TIER_NAMES[tier]} tier do not match their digest; "
                "call handle.recover() to run the prompt again"
            ) from error
        except StorageError as error:
            raise PagesLostError(
                f"pages of this session in the {TIER_NAMES[tier]} tier cannot be read ({error}); "
                "call handle.recover() to run the prompt again"
            ) from error
        flat = rows.view(arena.dtype).to(arena.device)
        split = arena.page_tokens * layer.key_dim
        keys = flat[:, :split].unflatten(1, (arena.page_tokens, layer.key_dim))
        values = flat[:, split:].unflatten(1, (arena.page_tokens, layer.value_dim))
        return keys, values

    def write(self, tier: int, slots: IntArray, frames: IntArray) -> None:
        """Copy frames [n] of the arena into slots [n]."""
        step = max(1, _BATCH_BYTES // self.arena.frame_bytes)
        for start in range(0, slots.size, step):
            rows = self.arena.pack(frames[start : start + step]).cpu().view(torch.uint8)
            self.backends[tier].write(slots[start : start + step], rows)

    def reserve(self, tier: int, count: int) -> IntArray:
        """Slots [count] of a tier."""
        backend = self.backends[tier]
        slots = backend.reserve(count)
        self.peak[tier] = max(self.peak.get(tier, 0), backend.used_slots * backend.slot_bytes)
        return slots

    def land(self, tier: int, pages: IntArray, slots: IntArray) -> None:
        """Take note that these pages [n] now have copies in these slots [n]."""
        self.table.slot[tier][pages] = slots
        self.table.copy[tier][pages] = True
        self.orders[tier].admit(pages)

    def store(self, pages: IntArray) -> None:
        """Give resident pages a copy below, in the fastest tier with room; older pages move on to make it.

        Raises
        ------
        CapacityError
            Before anything moves, when they do not fit.
        StorageError
            When a write fails; pages written before it keep their copies, the others stay where they are.
        """
        self.check_room(pages)
        rest = pages
        for tier, backend in self.backends.items():
            self._make_room(tier, rest.size)
            part, rest = rest[: backend.free_slots], rest[backend.free_slots :]
            if part.size:
                self._copy_down(tier, part)

    def fitting(self, leaving: IntArray, least: int) -> IntArray:
        """As many of the pages ``leaving`` the device, in their order, as find a place below; at least ``least``."""
        fits = np.searchsorted(np.cumsum(self._absent(leaving)), self._room(leaving), side="right")
        return leaving[: max(least, int(fits))]

    def check_room(self, leaving: IntArray) -> None:
        """Raise ``CapacityError`` if the pages ``leaving`` the device do not all find a place below."""
        count, free = int(np.count_nonzero(self._absent(leaving))), self._room(leaving)
        if count <= free:
            return
        tiers = ", ".join(
            f"{TIER_NAMES[tier]} {format_bytes(backend.used_slots * backend.slot_bytes)} of "
            f"{format_bytes(backend.capacity_slots * backend.slot_bytes)}"
            for tier, backend in self.backends.items()
        )
        page = self.arena.frame_bytes
        raise CapacityError(
            f"{format_bytes(count * page)} of pages must leave the device and {format_bytes(free * page)} are free "
            f"below it ({tiers or 'no tier below the device'}); raise a capacity, add a tier, or keep fewer tokens"
        )

    def release(self, pages: IntArray) -> None:
        """Free every copy of these pages below the device."""
        for tier, backend in self.backends.items():
            held = pages[self.table.copy[tier][pages]]
            if held.size and not self.closed:
                backend.release(self.table.slot[tier][held])
            self.table.copy[tier][held] = False
            self.orders[tier].forget(pages)

    def close(self) -> None:
        """Close every backend; idempotent. Pages that are released later have nothing to free here."""
        self.closed = True
        for backend in self.backends.values():
            backend.close()

    def _copy_down(self, tier: int, pages: IntArray) -> None:
        slots = self.reserve(tier, pages.size)
        try:
            self.write(tier, slots, self.table.slot[DEVICE][pages])
        except Exception:
            self.backends[tier].release(slots)
            raise
        self.land(tier, pages, slots)
        self.traffic.written += pages.size * self.arena.frame_bytes

    def _absent(self, pages: IntArray) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Which of these pages have no copy below the device."""
        absent: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
        absent = ~(self.table.copy[HOST][pages] | self.table.copy[NVME][pages])
        return absent

    def _room(self, leaving: IntArray) -> int:
        """Slots that are free, or hold a spare copy of a page that stays on the device when ``leaving`` have left."""
        spare = (self.table.copy[HOST] | self.table.copy[NVME]) & self.table.copy[DEVICE] & ~self.table.busy
        spare[leaving] = False
        return sum(backend.free_slots for backend in self.backends.values()) + int(np.count_nonzero(spare))

    def _make_room(self, tier: int, count: int) -> None:
        """Free slots for ``count`` pages as far as possible: drop spare copies first, then spill from host to NVMe."""
        self._drop_spare(tier, count)
        short = count - self.backends[tier].free_slots
        if tier == HOST and short > 0 and NVME in self.backends:
            only = self.table.copy[HOST] & ~self.table.busy
            leaving = min(short, int(np.count_nonzero(only)))
            self._drop_spare(NVME, leaving)
            self._spill(self.orders[HOST].victims(min(leaving, self.backends[NVME].free_slots), only))

    def _drop_spare(self, tier: int, count: int) -> None:
        """Drop copies of pages that are on the device, too, until ``count`` slots are free or none is left."""
        short = count - self.backends[tier].free_slots
        if short > 0:
            table = self.table
            spare = table.copy[tier] & table.copy[DEVICE] & ~table.busy
            self._leave(tier, self.orders[tier].victims(short, spare))

    def _spill(self, pages: IntArray) -> None:
        """Host to NVMe, in batches; a page leaves the host only after its batch is written."""
        step = max(1, _BATCH_BYTES // self.arena.frame_bytes)
        host, nvme = self.backends[HOST], self.backends[NVME]
        for start in range(0, pages.size, step):
            part = pages[start : start + step]
            rows = torch.empty(part.size, self.arena.frame_bytes, dtype=torch.uint8)
            host.read(self.table.slot[HOST][part], rows)
            slots = self.reserve(NVME, part.size)
            try:
                nvme.write(slots, rows)
            except Exception:
                nvme.release(slots)
                raise
            self.land(NVME, part, slots)
            self._leave(HOST, part)
            self.traffic.spilled += part.size * self.arena.frame_bytes

    def _leave(self, tier: int, pages: IntArray) -> None:
        if pages.size:
            self.backends[tier].release(self.table.slot[tier][pages])
            self.table.copy[tier][pages] = False
            self.orders[tier].evict(pages)
