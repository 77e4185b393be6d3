"""Sealed pages of one layer group over device, host and NVMe: seal, fetch, promote, demote."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch

from kvtier.core.arena import Arena
from kvtier.core.pages import DEVICE, HOST, NVME, PageTable
from kvtier.core.policy import IntArray, PlacementPolicy
from kvtier.core.transfer import TransferEngine
from kvtier.errors import CapacityError, DamagedSlotsError, PagesLostError, StorageError
from kvtier.storage_backends.base import SlotBackend
from kvtier.types import format_bytes

__all__ = ["TIER_NAMES", "PageStore", "Traffic"]

TIER_NAMES = {DEVICE: "device", HOST: "host", NVME: "nvme"}
_BATCH_BYTES = 4 << 20


@dataclass(slots=True)
class Traffic:
    """Bytes moved between tiers since the start, as measured at the copies."""

    written: int = 0
    spilled: int = 0
    read: int = 0
    promoted: int = 0


@dataclass(slots=True)
class _Flight:
    """A background copy and what to do with the bookkeeping when it is done."""

    future: Future[None]
    pages: IntArray
    land: Callable[[], None]
    abort: Callable[[], None]


@dataclass(slots=True)
class PageStore:
    """Where the sealed pages of one layer group live.

    Parameters
    ----------
    arena : Arena
        The device tier.
    lower : dict of int to SlotBackend
        Backends of ``HOST`` and ``NVME``, those that exist; a slot holds K [P, Dk] then V [P, Dv].
    placement : PlacementPolicy
        Who leaves first.
    bounded : bool
        Whether the device may run out, so that use must be tracked.

    Notes
    -----
    Called by one thread at a time, under the lock of the memory that owns it. Background copies touch bytes only; what they
    change in the table happens in ``settle``.
    """

    arena: Arena
    lower: dict[int, SlotBackend]
    placement: PlacementPolicy
    transfer: TransferEngine
    bounded: bool
    growth: Callable[[int], int]
    table: PageTable = field(default_factory=PageTable)
    traffic: Traffic = field(default_factory=Traffic)
    clock: int = 1
    peak: dict[int, int] = field(default_factory=dict)
    _flights: list[_Flight] = field(default_factory=list)

    def tick(self) -> None:
        """A new step begins: what it touches is newer than all before."""
        self.clock += 1

    def touch(self, pages: IntArray) -> None:
        """These pages are part of this step; they do not leave the device before the next."""
        if self.bounded:
            self.table.last_use[pages] = self.clock

    def resident(self, pages: IntArray) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Which pages have a copy on the device."""
        found: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = self.table.copy[DEVICE][pages]
        return found

    def frames(self, pages: IntArray) -> IntArray:
        """Frames of resident pages."""
        found: IntArray = self.table.slot[DEVICE][pages]
        return found

    def new_pages(self, heads: int, columns: int) -> IntArray:
        """Ids [heads, columns] of new pages with empty frames on the device; the caller fills them at once.

        Raises
        ------
        CapacityError
            When no tier has room; nothing changed.
        """
        self.free_frames(heads * columns)
        frames = self.arena.allocate(heads, columns)
        pages = self.table.allocate(heads, columns)
        self.table.slot[DEVICE][pages] = frames
        self.table.copy[DEVICE][pages] = True
        self.table.last_use[pages] = self.clock
        return pages

    def free_frames(self, count: int) -> None:
        """Make ``count`` frames free: grow the arena, else demote.

        Raises
        ------
        CapacityError
            When neither is possible; pages already demoted stay readable below.
        """
        short = count - self.arena.free_frames
        if short <= 0:
            return
        grown = self.growth(short)
        if grown:
            self.arena.grow(grown)
        short = count - self.arena.free_frames
        if short > 0:
            self.demote(max(short, self.arena.total_frames // 32), short)

    def demote(self, count: int, least: int) -> None:
        """Free up to ``count`` frames, at least ``least``, of pages not used in this step."""
        self.settle()
        candidates = np.flatnonzero(
            self.table.copy[DEVICE] & (self.table.last_use < self.clock) & (self.table.refs > 0) & ~self.table.busy
        )
        if candidates.size < least:
            raise CapacityError(
                f"this step needs {least} page frames more on {self.arena.device}: {self.arena.total_frames} are held, "
                f"{candidates.size} of them may leave, and the budget has no room for others "
                f"({self.arena.held_by_purpose()}); raise device="
            )
        chosen = candidates[self.placement.victims(self.table.last_use[candidates], min(count, candidates.size))]
        self._demote_pages(chosen)

    def evacuate(self, slab: int) -> None:
        """Move every page out of a slab and give its memory back."""
        self.settle()
        first, stop = self.arena.bounds(slab)
        slot = self.table.slot[DEVICE]
        self._demote_pages(np.flatnonzero(self.table.copy[DEVICE] & (slot >= first) & (slot < stop)))
        self.arena.drop(slab)

    def read(self, pages: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of pages [n] from whichever tier holds them: K [n, P, Dk] and V [n, P, Dv] on the device.

        Raises
        ------
        PagesLostError
            When stored bytes fail their digest or cannot be read.
        """
        self.settle(pages)
        return self._copy_in(self._sources(pages), pages.size)

    def read_behind(self, pages: IntArray) -> Future[tuple[torch.Tensor, torch.Tensor]]:
        """``read`` in the background; the pages must neither move nor be freed until it is done."""
        self.settle(pages)
        sources = self._sources(pages)
        return self.transfer.submit(self.arena.device, lambda: self._copy_in(sources, pages.size))

    def promote(self, pages: IntArray, *, batch: int) -> None:
        """Bring pages [n] to the device, all of them, now, ``batch`` at a time.

        Raises
        ------
        CapacityError, PagesLostError
        """
        self.settle(pages)
        absent = pages[~self.table.copy[DEVICE][pages]]
        if not absent.size:
            return
        self.free_frames(absent.size)
        for start in range(0, absent.size, batch):
            part = absent[start : start + batch]
            keys, values = self._copy_in(self._sources(part), part.size)
            frames = self.arena.allocate(1, part.size)[0]
            self.arena.write(frames, keys, values)
            self._land_promotion(part, frames)

    def prefetch(self, pages: IntArray, *, most: int) -> None:
        """Bring up to ``most`` of pages [n] to the device in the background, as far as there is room; never fails."""
        absent = pages[~self.table.copy[DEVICE][pages] & ~self.table.busy[pages]][:most]
        if not absent.size:
            return
        self.tick()
        self.touch(pages)
        with suppress(CapacityError):
            self.free_frames(absent.size)
        absent = absent[: self.arena.free_frames]
        if not absent.size:
            return
        frames = self.arena.allocate(1, absent.size)[0]
        sources = self._sources(absent)

        def copy() -> None:
            self.arena.write(frames, *self._copy_in(sources, absent.size))

        self._start(
            copy, absent, land=lambda: self._land_promotion(absent, frames), abort=lambda: self.arena.release(frames)
        )

    def write_behind(self, low_water: int) -> None:
        """Copy the pages that leave next to the tier below, in the background, when few frames are free."""
        if not self.bounded or self.arena.free_frames >= low_water or not self.lower:
            return
        tier = min(self.lower)
        room = min(self.lower[tier].free_slots, low_water)
        leaving = self.table.copy[DEVICE] & ~self.table.copy[HOST] & ~self.table.copy[NVME] & ~self.table.busy
        candidates = np.flatnonzero(leaving & (self.table.refs > 0) & (self.table.last_use < self.clock))
        if not room or not candidates.size:
            return
        pages = candidates[self.placement.victims(self.table.last_use[candidates], min(room, candidates.size))]
        slots = self._reserve(tier, pages.size)
        frames = self.table.slot[DEVICE][pages]

        def land() -> None:
            self.table.slot[tier][pages] = slots
            self.table.copy[tier][pages] = True

        self._start(
            lambda: self._write_lower(tier, slots, frames),
            pages,
            land=land,
            abort=lambda: self.lower[tier].release(slots),
        )

    def release(self, pages: IntArray) -> None:
        """One sequence lets go of these pages; those nobody holds are freed in every tier."""
        gone = self.table.drop(pages)
        if not gone.size:
            return
        self.settle(gone)
        held = gone[self.table.copy[DEVICE][gone]]
        if held.size:
            self.arena.release(self.table.slot[DEVICE][held])
        for tier, backend in self.lower.items():
            held = gone[self.table.copy[tier][gone]]
            if held.size:
                backend.release(self.table.slot[tier][held])
        self.table.forget(gone)

    def settle(self, pages: IntArray | None = None) -> None:
        """Finish background copies: all of them, or only if they touch ``pages``."""
        if not self._flights or (pages is not None and not self.table.busy[pages].any()):
            return
        flights, self._flights = self._flights, []
        for flight in flights:
            failed = flight.future.exception() is not None
            self.table.busy[flight.pages] = False
            flight.abort() if failed else flight.land()

    def compact(self) -> None:
        """Move the resident pages into one slab of just their size and give the rest back, when half or more is free."""
        self.settle()
        arena = self.arena
        for slab in arena.empty_slabs():
            arena.drop(slab)
        used = arena.total_frames - arena.free_frames
        if used and arena.free_frames >= used and arena.may_grow(used):
            pages = np.flatnonzero(self.table.copy[DEVICE])
            self.table.slot[DEVICE][pages] = arena.repack(self.table.slot[DEVICE][pages])

    def _sources(self, pages: IntArray) -> list[tuple[int, IntArray, IntArray]]:
        """Per tier: which of ``pages`` [n] to read there, and their slots; the fastest copy of each."""
        copy, slot = self.table.copy, self.table.slot
        taken = np.zeros(pages.size, dtype=np.bool_)
        found = []
        for tier in (DEVICE, HOST, NVME):
            inside = np.flatnonzero(copy[tier][pages] & ~taken)
            taken[inside] = True
            if inside.size:
                found.append((tier, inside, slot[tier][pages[inside]]))
            if tier != DEVICE:
                self.traffic.read += inside.size * self.arena.frame_bytes
        return found

    def _copy_in(self, sources: list[tuple[int, IntArray, IntArray]], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        arena, layer = self.arena, self.arena.layer
        if len(sources) == 1:
            tier, inside, slots = sources[0]
            return arena.read(slots) if tier == DEVICE else self._read_lower(tier, slots)
        keys = torch.empty(count, arena.page_tokens, layer.key_dim, dtype=arena.dtype, device=arena.device)
        values = torch.empty(count, arena.page_tokens, layer.value_dim, dtype=arena.dtype, device=arena.device)
        for tier, inside, slots in sources:
            part_keys, part_values = arena.read(slots) if tier == DEVICE else self._read_lower(tier, slots)
            target = torch.from_numpy(inside).to(arena.device)
            keys.index_copy_(0, target, part_keys)
            values.index_copy_(0, target, part_values)
        return keys, values

    def _read_lower(self, tier: int, slots: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        arena, layer = self.arena, self.arena.layer
        rows = torch.empty(slots.size, arena.frame_bytes, dtype=torch.uint8)
        try:
            self.lower[tier].read(slots, rows)
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
        flat = rows.view(arena.dtype)
        split = arena.page_tokens * layer.key_dim
        keys = flat[:, :split].unflatten(1, (arena.page_tokens, layer.key_dim))
        values = flat[:, split:].unflatten(1, (arena.page_tokens, layer.value_dim))
        return keys.to(arena.device), values.to(arena.device)

    def _write_lower(self, tier: int, slots: IntArray, frames: IntArray) -> None:
        arena = self.arena
        step = max(1, _BATCH_BYTES // arena.frame_bytes)
        for start in range(0, slots.size, step):
            keys, values = arena.read(frames[start : start + step])
            rows = torch.cat([keys.flatten(1), values.flatten(1)], dim=1).cpu().view(torch.uint8)
            self.lower[tier].write(slots[start : start + step], rows)

    def _demote_pages(self, pages: IntArray) -> None:
        """Free the frames of these resident pages; each has a copy below first."""
        copy = self.table.copy
        below = copy[HOST][pages] | copy[NVME][pages]
        self._check_room_below(int(np.count_nonzero(~below)))
        self._leave_device(pages[below])
        rest = pages[~below]
        for tier in self.lower:
            if tier == HOST:
                self._make_host_room(rest.size)
            part, rest = rest[: self.lower[tier].free_slots], rest[self.lower[tier].free_slots :]
            if part.size:
                self._copy_down(tier, part)
                self._leave_device(part)

    def _copy_down(self, tier: int, pages: IntArray) -> None:
        slots = self._reserve(tier, pages.size)
        try:
            self._write_lower(tier, slots, self.table.slot[DEVICE][pages])
        except Exception:
            self.lower[tier].release(slots)
            raise
        self.table.slot[tier][pages] = slots
        self.table.copy[tier][pages] = True
        self.traffic.written += pages.size * self.arena.frame_bytes

    def _reserve(self, tier: int, count: int) -> IntArray:
        backend = self.lower[tier]
        slots = backend.reserve(count)
        self.peak[tier] = max(self.peak.get(tier, 0), backend.used_slots * backend.slot_bytes)
        return slots

    def _leave_device(self, pages: IntArray) -> None:
        if pages.size:
            self.arena.release(self.table.slot[DEVICE][pages])
            self.table.copy[DEVICE][pages] = False

    def _check_room_below(self, count: int) -> None:
        """Raise before anything moves if ``count`` pages find no place below the device."""
        free = sum(backend.free_slots for backend in self.lower.values())
        if HOST in self.lower:
            copy = self.table.copy
            free += int(np.count_nonzero(copy[HOST] & (copy[DEVICE] | copy[NVME]) & ~self.table.busy))
        if count > free:
            tiers = ", ".join(
                f"{TIER_NAMES[tier]} {format_bytes(backend.used_slots * backend.slot_bytes)} of {format_bytes(backend.capacity_bytes)}"
                for tier, backend in self.lower.items()
            )
            raise CapacityError(
                f"{format_bytes(count * self.arena.frame_bytes)} of pages must leave the device and {format_bytes(free * self.arena.frame_bytes)} "
                f"are free below it ({tiers or 'no tier below the device'}); raise a capacity, add a tier, or keep fewer tokens"
            )

    def _make_host_room(self, count: int) -> None:
        """Free host slots for ``count`` pages as far as possible: drop spare copies first, then spill to NVMe."""
        host, table = self.lower[HOST], self.table
        movable = table.copy[HOST] & ~table.busy
        short = count - host.free_slots
        if short > 0:
            spare = np.flatnonzero(movable & (table.copy[DEVICE] | table.copy[NVME]))
            self._leave_host(spare[self.placement.victims(table.last_use[spare], min(short, spare.size))])
        short = count - host.free_slots
        if short > 0 and NVME in self.lower:
            only = np.flatnonzero(table.copy[HOST] & ~table.busy)
            room = min(short, only.size, self.lower[NVME].free_slots)
            self._spill(only[self.placement.victims(table.last_use[only], room)])

    def _spill(self, pages: IntArray) -> None:
        """Host to NVMe, in batches; a page leaves the host only after its batch is written."""
        step = max(1, _BATCH_BYTES // self.arena.frame_bytes)
        host, nvme = self.lower[HOST], self.lower[NVME]
        for start in range(0, pages.size, step):
            part = pages[start : start + step]
            rows = torch.empty(part.size, self.arena.frame_bytes, dtype=torch.uint8)
            host.read(self.table.slot[HOST][part], rows)
            slots = self._reserve(NVME, part.size)
            try:
                nvme.write(slots, rows)
            except Exception:
                nvme.release(slots)
                raise
            self.table.slot[NVME][part] = slots
            self.table.copy[NVME][part] = True
            self._leave_host(part)
            self.traffic.spilled += part.size * self.arena.frame_bytes

    def _leave_host(self, pages: IntArray) -> None:
        if pages.size:
            self.lower[HOST].release(self.table.slot[HOST][pages])
            self.table.copy[HOST][pages] = False

    def _land_promotion(self, pages: IntArray, frames: IntArray) -> None:
        self.table.slot[DEVICE][pages] = frames
        self.table.copy[DEVICE][pages] = True
        self.table.last_use[pages] = self.clock
        self.traffic.promoted += pages.size * self.arena.frame_bytes

    def _start(
        self, copy: Callable[[], None], pages: IntArray, *, land: Callable[[], None], abort: Callable[[], None]
    ) -> None:
        self.table.busy[pages] = True
        self._flights.append(_Flight(self.transfer.submit(self.arena.device, copy), pages, land, abort))
