"""Slots in one preallocated file without a name: the nvme tier of a live session."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kvtier.errors import ConfigError
from kvtier.storage_backends.base import Capabilities, SlotBackend, check_rows, check_sizes
from kvtier.storage_backends.engines.bounce import BouncePool
from kvtier.storage_backends.engines.gate import Gate
from kvtier.storage_backends.engines.posix_file import BLOCK_BYTES, MAX_VECTORS, open_nameless
from kvtier.storage_backends.memory import ByteRows, copy_rows, round_up
from kvtier.storage_backends.slot_runs import Run, cut_runs, transfer_error
from kvtier.storage_backends.slots import IntArray, SlotAllocator, compact

__all__ = ["SpillFile"]

_DIRECT_RUN_BYTES = 8 << 20
_BOUNCE_RUN_BYTES = 1 << 20


class SpillFile(SlotBackend):
    """Slots in a file that vanishes with the process.

    All space is taken when it is opened, so a full disk is an error there and not in the middle of a session. Slots lie
    4096-byte aligned; adjacent ones go through in one system call of up to 8 MiB, scattered ones in several threads.

    Parameters
    ----------
    slot_bytes : int
        Payload bytes of a slot.
    capacity_slots : int
        Slots; a hard bound, preallocated.
    directory : Path or str
        Where the file lies; must exist.
    io_threads : int
        Most transfers under way at once for one call: the queue depth that the disk sees.

    Raises
    ------
    StorageError
        The directory is missing, not writable, or has not enough space.

    Notes
    -----
    `read` and `write` may be called from several threads; accounting is behind one lock that no transfer holds. Rows
    that are not 4096-byte aligned are copied through buffers of 1 MiB, one for each transfer in flight.
    """

    def __init__(self, slot_bytes: int, capacity_slots: int, directory: Path | str, *, io_threads: int = 8) -> None:
        check_sizes(slot_bytes, capacity_slots)
        if io_threads < 1:
            raise ConfigError(f"io_threads must be at least 1, got {io_threads}")
        self.slot_bytes = slot_bytes
        self.capacity_slots = capacity_slots
        self.stride = round_up(slot_bytes, BLOCK_BYTES)
        self._slots = SlotAllocator(capacity_slots)
        self._lock = threading.Lock()
        self._file = open_nameless(Path(directory), capacity_slots * self.stride)
        self._bounce = BouncePool(max(_BOUNCE_RUN_BYTES, self.stride), io_threads)
        self._io_threads = io_threads
        self._helpers = ThreadPoolExecutor(max(1, io_threads - 1), thread_name_prefix="kvtier-spill")
        self._gate = Gate("the spill file")

    @classmethod
    def slots_within(cls, slot_bytes: int, capacity_bytes: int) -> int:
        """Most slots whose file, each slot in whole blocks, stays within a budget."""
        check_sizes(slot_bytes, 0)
        return max(0, capacity_bytes) // round_up(slot_bytes, BLOCK_BYTES)

    def reserve(self, count: int) -> IntArray:
        """Take slots; their space on disk is there already."""
        with self._gate, self._lock:
            return self._slots.reserve(count)

    def release(self, slots: IntArray) -> None:
        """Give slots back; the file keeps its size."""
        with self._gate, self._lock:
            self._slots.release(slots)

    def write(self, slots: IntArray, data: torch.Tensor) -> None:
        """Write rows [n, slot_bytes] to the device; nothing is synced, since nothing outlives the process."""
        check_rows(data, len(slots), self.slot_bytes)
        rows = data.numpy()
        with self._gate:
            if self._fits(rows):
                self._each_run("write", slots, _DIRECT_RUN_BYTES, lambda run: self._put(run, rows))
            else:
                self._each_run("write", slots, _BOUNCE_RUN_BYTES, lambda run: self._put_bounced(run, rows))

    def read(self, slots: IntArray, into: torch.Tensor) -> None:
        """Read rows [n, slot_bytes] from the device, straight into aligned rows."""
        check_rows(into, len(slots), self.slot_bytes)
        rows = into.numpy()
        with self._gate:
            if self._fits(rows):
                self._each_run("read", slots, _DIRECT_RUN_BYTES, lambda run: self._get(run, rows))
            else:
                self._each_run("read", slots, _BOUNCE_RUN_BYTES, lambda run: self._get_bounced(run, rows))

    @property
    def free_slots(self) -> int:
        """Slots that can still be reserved."""
        return self._slots.free

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the file system; its own tables for the file may add a few blocks to the capacity."""
        return self._file.allocated_bytes

    @property
    def capacity_bytes(self) -> int:
        """Size of the file."""
        return self.capacity_slots * self.stride

    def capabilities(self) -> Capabilities:
        """Whether direct I/O passed its trial when the file was opened, and why not."""
        alignment = BLOCK_BYTES if self._file.direct else 1
        return Capabilities(
            name="spill", pinned=False, direct_io=self._file.direct, alignment=alignment, note=self._file.note
        )

    def close(self) -> None:
        """Wait for transfers, stop the threads and free the file."""
        if self._gate.shut():
            self._helpers.shutdown(wait=True)
            self._bounce.clear()
            self._file.close()

    def _fits(self, rows: ByteRows) -> bool:
        """Whether the kernel can transfer these rows as they lie."""
        if rows.strides[1] != 1 or self.slot_bytes != self.stride:
            return False
        return not self._file.direct or (rows.ctypes.data % BLOCK_BYTES == 0 and rows.strides[0] % BLOCK_BYTES == 0)

    def _each_run(self, verb: str, slots: IntArray, run_bytes: int, transfer: Callable[[Run], None]) -> None:
        """Cut the slots into runs and transfer them, several at a time; one error names every slot that failed."""
        with self._lock:
            slots = self._slots.require_reserved(slots, distinct=verb == "write")
        runs = cut_runs(slots, min(MAX_VECTORS, max(1, run_bytes // self.stride)))
        lanes = min(self._io_threads, len(runs))

        def work(lane: int) -> list[tuple[Run, OSError]]:
            failed = []
            for run in runs[lane::lanes]:
                try:
                    transfer(run)
                except OSError as error:
                    failed.append((run, error))
            return failed

        helped = [self._helpers.submit(work, lane) for lane in range(1, lanes)]
        failures = work(0) if runs else []
        for future in helped:
            failures += future.result()
        if failures:
            raise transfer_error(verb, "the spill file", failures)

    def _put(self, run: Run, rows: ByteRows) -> None:
        self._file.write_at(_views(run, rows), run.first * self.stride)

    def _get(self, run: Run, rows: ByteRows) -> None:
        self._file.read_at(_views(run, rows), run.first * self.stride)

    def _put_bounced(self, run: Run, rows: ByteRows) -> None:
        with self._bounce.buffer() as whole:
            buffer = self._as_slots(whole, run)
            copy_rows(rows, compact(run.rows), buffer[:, : self.slot_bytes], slice(None))
            self._file.write_at([buffer.reshape(-1).data], run.first * self.stride)

    def _get_bounced(self, run: Run, rows: ByteRows) -> None:
        with self._bounce.buffer() as whole:
            buffer = self._as_slots(whole, run)
            self._file.read_at([buffer.reshape(-1).data], run.first * self.stride)
            copy_rows(buffer[:, : self.slot_bytes], slice(None), rows, compact(run.rows))

    def _as_slots(self, whole: torch.Tensor, run: Run) -> ByteRows:
        """The first bytes of a buffer as [slots of the run, stride]."""
        return whole[: run.rows.size * self.stride].view(-1, self.stride).numpy()


def _views(run: Run, rows: ByteRows) -> list[memoryview]:
    """The rows of a run where they lie: one buffer if they are adjacent there too, else one each."""
    where = compact(run.rows)
    if rows.flags.c_contiguous and isinstance(where, slice):
        return [rows[where].reshape(-1).data]
    return [rows[row].data for row in run.rows]
