"""Sealed pages of one layer group over device, host and NVMe: seal, fetch, promote, demote."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch

from kvtier.core.arena import Arena
from kvtier.core.lower import LowerTiers
from kvtier.core.pages import DEVICE, HOST, NVME, PageTable
from kvtier.core.policy import IntArray
from kvtier.core.transfer import TransferEngine
from kvtier.errors import CapacityError
from kvtier.storage_backends.eviction import EvictionOrder

__all__ = ["ROOM_BLOCKS", "PageStore"]

ROOM_BLOCKS = 8
"""Blocks that a sequence gets as room to grow in place, at least, when it outgrows its run."""


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
    lower : LowerTiers
        Host and NVMe.
    order : EvictionOrder
        Who leaves the device first.
    bounded : bool
        Whether the device may run out, so that use must be tracked.
    block_pages : int
        Pages of a block in one KV head.
    growth : callable
        Frames to add when so many are missing and sequences want runs of so many columns; 0 when the budget has no
        room.

    Notes
    -----
    Called by one thread at a time, under the lock of the memory that owns it. Background copies touch bytes only;
    what they change in the table happens in ``settle``.
    """

    arena: Arena
    table: PageTable
    lower: LowerTiers
    order: EvictionOrder
    transfer: TransferEngine
    bounded: bool
    block_pages: int
    growth: Callable[[int, int], int]
    clock: int = 1
    _flights: list[_Flight] = field(default_factory=list)

    @property
    def usual_run(self) -> int:
        """Columns of the run that a sequence gets when it outgrows its own, if it is not long."""
        return (ROOM_BLOCKS + 1) * self.block_pages

    def tick(self) -> None:
        """A new step begins: what it touches is newer than all before."""
        self.clock += 1

    def touch(self, pages: IntArray) -> None:
        """These pages are part of this step; they do not leave the device before the next."""
        if self.bounded:
            self.table.last_use[pages] = self.clock
            self.order.hit(pages.ravel())

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
        return self.new_pages_at(self.arena.allocate(heads, columns))

    def new_pages_at(self, frames: IntArray) -> IntArray:
        """Ids [heads, columns] of new pages in these frames, which the caller has taken and fills at once."""
        pages = self.table.allocate(*frames.shape)
        self.table.slot[DEVICE][pages] = frames
        self.table.copy[DEVICE][pages] = True
        self.table.last_use[pages] = self.clock
        self.order.admit(pages.ravel())
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
        grown = self.growth(short, self.usual_run)
        if grown:
            self.arena.grow(grown)
        short = count - self.arena.free_frames
        if short > 0:
            self.demote(max(short, self.arena.total_frames // 32), short)

    def demote(self, count: int, least: int) -> None:
        """Free up to ``count`` frames, at least ``least``, of pages not used in this step."""
        self.settle()
        allowed = (
            self.table.copy[DEVICE] & (self.table.last_use < self.clock) & (self.table.refs > 0) & ~self.table.busy
        )
        may_leave = int(np.count_nonzero(allowed))
        if may_leave < least:
            raise CapacityError(
                f"this step needs {least} page frames more on {self.arena.device}: {self.arena.total_frames} are held, "
                f"{may_leave} of them may leave, and the budget has no room for others "
                f"({self.arena.held_by_purpose()}); raise device="
            )
        self._leave(self.lower.fitting(self.order.victims(min(count, may_leave), allowed), least))

    def evacuate(self, slab: int) -> None:
        """Move every page out of a slab and give its memory back."""
        self.settle()
        first, stop = self.arena.bounds(slab)
        slot = self.table.slot[DEVICE]
        self._leave(np.flatnonzero(self.table.copy[DEVICE] & (slot >= first) & (slot < stop)))
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
        """``read`` in the background, unless all is on the device; they must neither move nor be freed until done."""
        self.settle(pages)
        sources = self._sources(pages)
        if len(sources) == 1 and sources[0][0] == DEVICE:
            at_once: Future[tuple[torch.Tensor, torch.Tensor]] = Future()
            at_once.set_result(self._copy_in(sources, pages.size))
            return at_once
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
        self.order.miss(absent)
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
        self.order.miss(absent)
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
        if not self.bounded or self.arena.free_frames >= low_water or not self.lower.backends:
            return
        tier = min(self.lower.backends)
        room = min(self.lower.backends[tier].free_slots, low_water)
        leaving = self.table.copy[DEVICE] & ~self.table.copy[HOST] & ~self.table.copy[NVME] & ~self.table.busy
        pages = self.order.victims(room, leaving & (self.table.refs > 0) & (self.table.last_use < self.clock))
        if not pages.size:
            return
        slots = self.lower.reserve(tier, pages.size)
        frames = self.table.slot[DEVICE][pages]

        def land() -> None:
            self.lower.land(tier, pages, slots)
            self.lower.traffic.written += pages.size * self.arena.frame_bytes

        self._start(
            lambda: self.lower.write(tier, slots, frames),
            pages,
            land=land,
            abort=lambda: self.lower.backends[tier].release(slots),
        )

    def release(self, pages: IntArray) -> None:
        """One sequence lets go of these pages; those nobody holds are freed in every tier."""
        gone = self.table.drop(pages)
        if not gone.size:
            return
        self.settle(gone)
        self._free_frames_of(gone[self.table.copy[DEVICE][gone]])
        self.order.forget(gone)
        self.lower.release(gone)
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

    def join(self, pages: IntArray) -> bool:
        """Move resident pages [Hk, n] into one run, if frames are free or may be added; whether they moved."""
        self.settle(pages)
        missing = pages.size - self.arena.free_frames
        if missing > 0 and not self.bounded:
            self.arena.grow(self.growth(missing, self.usual_run))
        if pages.size > self.arena.free_frames:
            return False
        frames = self.arena.allocate(*pages.shape)
        if len(self.arena.places(frames)[0]) != 1:
            self.arena.release(frames)
            return False
        self.move(pages, frames)
        return True

    def move(self, pages: IntArray, frames: IntArray) -> None:
        """Put resident pages into other frames, which the caller has taken."""
        old = self.frames(pages).ravel()
        self.arena.write(frames.ravel(), *self.arena.read(old))
        self.table.slot[DEVICE][pages] = frames
        self.arena.release(old)

    def compact(self) -> None:
        """Give free memory back: move resident pages into one slab of their size, when half or more is free."""
        self.settle()
        self.drop_empty()
        arena = self.arena
        used = arena.total_frames - arena.free_frames
        if used and arena.free_frames >= used and arena.may_grow(used):
            pages = np.flatnonzero(self.table.copy[DEVICE])
            self.table.slot[DEVICE][pages] = arena.repack(self.table.slot[DEVICE][pages])

    def drop_empty(self) -> None:
        """Give back slabs that hold nothing."""
        for slab in self.arena.empty_slabs():
            self.arena.drop(slab)

    def _sources(self, pages: IntArray) -> list[tuple[int, IntArray, IntArray]]:
        """Per tier: which of ``pages`` [n] to read there, and their slots; the fastest copy of each."""
        copy, slot = self.table.copy, self.table.slot
        taken = np.zeros(pages.size, dtype=np.bool_)
        found: list[tuple[int, IntArray, IntArray]] = []
        for tier in (DEVICE, HOST, NVME):
            inside = np.flatnonzero(copy[tier][pages] & ~taken)
            taken[inside] = True
            if inside.size:
                found.append((tier, inside, slot[tier][pages[inside]]))
            if tier == NVME:
                self.lower.orders[HOST].miss(pages[inside])
            if tier != DEVICE:
                self.lower.orders[tier].hit(pages[inside])
                self.lower.traffic.read += inside.size * self.arena.frame_bytes
        return found

    def _copy_in(self, sources: list[tuple[int, IntArray, IntArray]], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        arena, layer = self.arena, self.arena.layer
        if len(sources) == 1:
            tier, inside, slots = sources[0]
            return arena.read(slots) if tier == DEVICE else self.lower.read(tier, slots)
        keys = torch.empty(count, arena.page_tokens, layer.key_dim, dtype=arena.dtype, device=arena.device)
        values = torch.empty(count, arena.page_tokens, layer.value_dim, dtype=arena.dtype, device=arena.device)
        for tier, inside, slots in sources:
            part_keys, part_values = arena.read(slots) if tier == DEVICE else self.lower.read(tier, slots)
            target = torch.from_numpy(inside).to(arena.device)
            keys.index_copy_(0, target, part_keys)
            values.index_copy_(0, target, part_values)
        return keys, values

    def _leave(self, pages: IntArray) -> None:
        """Free the frames of these resident pages; each has a copy below first."""
        copy = self.table.copy
        below = copy[HOST][pages] | copy[NVME][pages]
        self.lower.check_room(pages)
        self._free_frames_of(pages[below])
        self.lower.store(pages[~below])
        self._free_frames_of(pages[~below])

    def _free_frames_of(self, pages: IntArray) -> None:
        if pages.size:
            self.arena.release(self.table.slot[DEVICE][pages])
            self.table.copy[DEVICE][pages] = False
            self.order.evict(pages)

    def _land_promotion(self, pages: IntArray, frames: IntArray) -> None:
        self.table.slot[DEVICE][pages] = frames
        self.table.copy[DEVICE][pages] = True
        self.table.last_use[pages] = self.clock
        self.order.admit(pages)
        self.lower.traffic.promoted += pages.size * self.arena.frame_bytes

    def _start(
        self, copy: Callable[[], None], pages: IntArray, *, land: Callable[[], None], abort: Callable[[], None]
    ) -> None:
        self.table.busy[pages] = True
        self._flights.append(_Flight(self.transfer.submit(self.arena.device, copy), pages, land, abort))
