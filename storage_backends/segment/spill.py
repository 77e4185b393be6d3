"""Slots in whole segments of a store: a live session and the cache share one directory and one capacity."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count

import numpy as np
import torch

from kvtier.errors import CapacityError, ConfigError
from kvtier.record import BLOCK_BYTES, SUPERBLOCK_BYTES
from kvtier.storage_backends.base import Capabilities, SlotBackend, check_rows, check_sizes
from kvtier.storage_backends.engines import IOEngine, Transfer
from kvtier.storage_backends.engines.gate import Gate
from kvtier.storage_backends.memory import copy_rows, empty_aligned, round_up
from kvtier.storage_backends.segment.pool import Segment
from kvtier.storage_backends.segment.store import SegmentRecords
from kvtier.storage_backends.slot_runs import Run, cut_runs, transfer_error
from kvtier.storage_backends.slots import IntArray, SlotAllocator, compact

__all__ = ["SegmentSpill"]

_RUN_BYTES = 8 << 20
_ROUND_BYTES = 64 << 20


class SegmentSpill(SlotBackend):
    """Slots in segments that are taken from a store when they are reserved, from its cache if need be.

    A reservation has its space before it returns. Segments go back when their slots are released, one empty one is
    kept; all of them go back at close, and at the next opening of the directory after a crash. Nothing is synced, since
    nothing outlives the process. Wrap it in `VerifiedSlots`: there are no digests here.

    Parameters
    ----------
    slot_bytes : int
        Payload bytes of a slot.
    capacity_slots : int
        Slots; a hard bound. Room for them is not set aside before they are reserved.
    records : SegmentRecords
        Open for writing; stays the caller's, and is closed after this.

    Raises
    ------
    ConfigError
        A slot does not fit into a segment.
    """

    def __init__(self, slot_bytes: int, capacity_slots: int, records: SegmentRecords) -> None:
        check_sizes(slot_bytes, capacity_slots)
        self.slot_bytes = slot_bytes
        self.capacity_slots = capacity_slots
        self.stride = round_up(slot_bytes, BLOCK_BYTES)
        self._per_segment = (records.segment_bytes - 2 * SUPERBLOCK_BYTES) // self.stride
        if not self._per_segment:
            raise ConfigError(
                f"required segments of at least {self.stride + 2 * SUPERBLOCK_BYTES} bytes for slots of {slot_bytes}, "
                f"got {records.segment_bytes}; raise segment_bytes"
            )
        self._records = records
        self._engine: IOEngine = records.engine
        self._slots = SlotAllocator(capacity_slots)
        self._used = np.zeros(-(-capacity_slots // self._per_segment), dtype=np.int64)
        self._segments: dict[int, Segment] = {}
        self._lock = threading.Lock()
        self._gate = Gate("the spill")

    @classmethod
    def slots_within(cls, slot_bytes: int, capacity_bytes: int) -> int:
        """Most slots, each in whole blocks, that a budget pays for; whole segments may hold a little more."""
        check_sizes(slot_bytes, 0)
        return max(0, capacity_bytes) // round_up(slot_bytes, BLOCK_BYTES)

    def reserve(self, count: int) -> IntArray:
        """Take slots, and the segments that they lie in."""
        with self._gate, self._lock:
            slots = self._slots.reserve(count)
            parts, counts = np.unique(slots // self._per_segment, return_counts=True)
            taken: dict[int, Segment] = {}
            try:
                for part in parts.tolist():
                    if part not in self._segments:
                        taken[part] = self._records.borrow_segment()
            except CapacityError:
                self._slots.release(slots)
                for segment in taken.values():
                    self._records.return_segment(segment)
                raise
            self._segments |= taken
            self._used[parts] += counts
            return slots

    def release(self, slots: IntArray) -> None:
        """Give slots back, and the segments that are empty then, but one."""
        with self._gate, self._lock:
            slots = self._slots.require_reserved(slots, distinct=True)
            self._slots.release(slots)
            np.subtract.at(self._used, slots // self._per_segment, 1)
            empty = [part for part in self._segments if not self._used[part]]
            for part in sorted(empty)[1:]:
                self._records.return_segment(self._segments.pop(part))

    def write(self, slots: IntArray, data: torch.Tensor) -> None:
        """Write rows [n, slot_bytes] to the device."""
        check_rows(data, len(slots), self.slot_bytes)
        with self._gate:
            self._each_round("write", slots, lambda runs: self._write_runs(runs, data))

    def read(self, slots: IntArray, into: torch.Tensor) -> None:
        """Read rows [n, slot_bytes] from the device, straight into aligned rows."""
        check_rows(into, len(slots), self.slot_bytes)
        with self._gate:
            self._each_round("read", slots, lambda runs: self._read_runs(runs, into))

    @property
    def free_slots(self) -> int:
        """Slots that can still be reserved, as long as the store has room."""
        return self._slots.free

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the segments that are taken, as the file system counts them."""
        with self._lock:
            return sum(segment.file.allocated_bytes for segment in self._segments.values())

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all slots, in whole blocks."""
        return self.capacity_slots * self.stride

    def capabilities(self) -> Capabilities:
        """What the store found out about the drive."""
        found = self._records.capabilities()
        return Capabilities(
            name="segment-spill", pinned=False, direct_io=found.direct_io, alignment=found.alignment, note=found.note
        )

    def close(self) -> None:
        """Wait for transfers and give all segments back."""
        if self._gate.shut():
            with self._lock:
                segments, self._segments = self._segments, {}
            for segment in segments.values():
                self._records.return_segment(segment)

    def _each_round(self, verb: str, slots: IntArray, move: Callable[[list[Run]], list[OSError | None]]) -> None:
        """Cut the slots into runs and move them, a bounded part at a time; one error names all that failed."""
        with self._lock:
            slots = self._slots.require_reserved(slots, distinct=verb == "write")
        runs = cut_runs(slots, max(1, _RUN_BYTES // self.stride), self._per_segment)
        failures: list[tuple[Run, OSError]] = []
        while runs:
            sizes = np.cumsum([run.rows.size * self.stride for run in runs])
            some = max(1, int(np.searchsorted(sizes, _ROUND_BYTES, side="right")))
            done, runs = runs[:some], runs[some:]
            failures += [(run, error) for run, error in zip(done, move(done), strict=True) if error is not None]
        if failures:
            raise transfer_error(verb, "the spill segments", failures)

    def _write_runs(self, runs: list[Run], data: torch.Tensor) -> list[OSError | None]:
        buffers = [self._straight(run, data) for run in runs]
        staged = {index: self._stage(runs[index]) for index in range(len(runs)) if buffers[index] is None}

        def fill(index: int) -> None:
            if index in staged:
                copy_rows(data.numpy(), compact(runs[index].rows), self._rows(staged[index]), slice(None))

        return self._engine.write(self._transfers(runs, buffers, staged), before=fill)

    def _read_runs(self, runs: list[Run], into: torch.Tensor) -> list[OSError | None]:
        buffers = [self._straight(run, into) for run in runs]
        staged = {index: self._stage(runs[index]) for index in range(len(runs)) if buffers[index] is None}

        def take(index: int) -> None:
            if index in staged:
                copy_rows(self._rows(staged[index]), slice(None), into.numpy(), compact(runs[index].rows))

        return self._engine.read(self._transfers(runs, buffers, staged), then=take)

    def _transfers(
        self, runs: list[Run], buffers: list[torch.Tensor | None], staged: dict[int, torch.Tensor]
    ) -> list[Transfer]:
        transfers = []
        for index, run, buffer in zip(count(), runs, buffers, strict=False):
            part, slot = divmod(run.first, self._per_segment)
            offset = SUPERBLOCK_BYTES + slot * self.stride
            transfers.append(Transfer(self._segments[part].file, offset, staged[index] if buffer is None else buffer))
        return transfers

    def _straight(self, run: Run, rows: torch.Tensor) -> torch.Tensor | None:
        """The rows of a run as one buffer where they lie, if they fill their slots and are adjacent there too."""
        where = compact(run.rows)
        if self.slot_bytes != self.stride or not isinstance(where, slice):
            return None
        taken = rows[where]
        return taken.view(-1) if taken.is_contiguous() else None

    def _stage(self, run: Run) -> torch.Tensor:
        return empty_aligned(run.rows.size * self.stride)

    def _rows(self, staged: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        rows: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = staged.view(-1, self.stride).numpy()
        return rows[:, : self.slot_bytes]
