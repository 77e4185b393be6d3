"""An I/O engine with the faults that disks have, for tests of whatever stands on one."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import TypeAlias, TypeVar

from kvtier.storage_backends.engines.base import EngineCapabilities, EngineFile, IOEngine, Transfer
from kvtier.storage_backends.engines.laid import Laid, lay
from kvtier.storage_backends.memory import PAGE_BYTES

__all__ = ["FaultyEngine", "FaultyFile", "ReadFault", "WriteFault"]

_Hook: TypeAlias = Callable[[int], None]


class ReadFault(Enum):
    """What can become of a read."""

    ERROR = "the system call fails with EIO; the buffer is untouched"
    FLIP = "one bit arrives inverted"
    SHORT = "only the first half arrives, and nobody says so; the rest is not what it was"
    STALE = "nothing arrives, and nobody says so"


class WriteFault(Enum):
    """What can become of a write; only the failing ones say so."""

    ERROR = "the system call fails with EIO after half of the bytes"
    LOST = "nothing is written"
    TORN = "only the first half is written"
    MISPLACED = "all is written, one block beside where it belongs"


class FaultyFile(EngineFile):
    """A file of a `FaultyEngine`: allocation and syncs fail when they were told to."""

    def __init__(self, inner: EngineFile, engine: FaultyEngine) -> None:
        self.inner, self._engine = inner, engine
        self.path, self.direct, self.note = inner.path, inner.direct, inner.note

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.inner.size

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the file system holds for it."""
        return self.inner.allocated_bytes

    def allocate(self, size: int) -> None:
        """Take space, where the disk has it."""
        self._engine.take_space(max(0, size - self.inner.size))
        self.inner.allocate(size)

    def sync(self) -> None:
        """Sync, unless this one was to fail."""
        self._engine.check_sync()
        self.inner.sync()

    def close(self) -> None:
        """Close the inner file."""
        self.inner.close()


class FaultyEngine(IOEngine):
    """Passes everything to another engine, except for the faults that were ordered.

    Faults of transfers are ordered for the nth one from now, 1 being the next, reads and writes counted apart, and
    happen once. A full or broken disk stays so until `repair`.

    Parameters
    ----------
    inner : IOEngine
        Where the bytes go; closed with this one.
    """

    def __init__(self, inner: IOEngine) -> None:
        self.inner = inner
        self._lock = threading.Lock()
        self._reads: dict[int, ReadFault] = {}
        self._writes: dict[int, WriteFault] = {}
        self._seen = {"read": 0, "write": 0}
        self._failing_syncs = 0
        self._room: int | None = None
        self._broken = 0
        self._delay = 0.0

    def on_read(self, fault: ReadFault, nth: int = 1) -> None:
        """Order a fault for the nth read from now."""
        with self._lock:
            self._reads[self._seen["read"] + nth] = fault

    def on_write(self, fault: WriteFault, nth: int = 1) -> None:
        """Order a fault for the nth write from now."""
        with self._lock:
            self._writes[self._seen["write"] + nth] = fault

    def fail_syncs(self, count: int = 1) -> None:
        """Make the next syncs fail with EIO; their bytes are written, and nobody knows whether they last."""
        with self._lock:
            self._failing_syncs = count

    def fill_disk(self, after_bytes: int = 0) -> None:
        """Make writes and allocations fail with ENOSPC once so many more bytes were taken."""
        with self._lock:
            self._room = after_bytes

    def break_disk(self, code: int = errno.EIO) -> None:
        """Make every transfer, sync and opening fail with this error."""
        self._broken = code

    def slow_down(self, seconds: float) -> None:
        """Delay each batch from now on."""
        self._delay = seconds

    def repair(self) -> None:
        """Let everything through again; faults that were ordered and did not happen are forgotten."""
        with self._lock:
            self._reads.clear()
            self._writes.clear()
            self._room, self._broken, self._delay, self._failing_syncs = None, 0, 0.0, 0

    def open(self, path: Path, *, writable: bool, create: bool = False) -> FaultyFile:
        """Open a file of the inner engine."""
        self._check_broken()
        return FaultyFile(self.inner.open(path, writable=writable, create=create), self)

    def read(self, transfers: Iterable[Transfer], then: _Hook | None = None) -> list[OSError | None]:
        """Read, with what was ordered for these transfers."""
        time.sleep(self._delay)
        transfers = list(transfers)
        faults = self._due(self._reads, "read", len(transfers))
        results = [self._error(failing=faults.get(at) is ReadFault.ERROR) for at in range(len(transfers))]
        going = [at for at, error in enumerate(results) if error is None]
        stale = [at for at in going if faults.get(at) is ReadFault.STALE]
        before = {at: [buffer.clone() for buffer in lay(transfers[at]).buffers] for at in stale}

        def hurt(position: int) -> None:
            at = going[position]
            arrived = lay(transfers[at])
            size = arrived.nbytes
            match faults.get(at):
                case ReadFault.FLIP if size:
                    _invert(arrived, size * 2 // 3, size * 2 // 3 + 1, 1 << 4)
                case ReadFault.SHORT:
                    _invert(arrived, size // 2, size, 0xFF)
                case ReadFault.STALE:
                    for buffer, old in zip(arrived.buffers, before[at], strict=True):
                        buffer.copy_(old)
            if then is not None:
                then(at)

        for at, error in zip(going, self.inner.read([_inner(transfers[at]) for at in going], hurt), strict=True):
            results[at] = error
        return results

    def write(self, transfers: Iterable[Transfer], before: _Hook | None = None) -> list[OSError | None]:
        """Write, with what was ordered for these transfers, as far as the disk has room."""
        time.sleep(self._delay)
        transfers = list(transfers)
        faults = self._due(self._writes, "write", len(transfers))
        results: list[OSError | None] = []
        going: list[int] = []
        sent: list[Transfer] = []
        for at, transfer in enumerate(transfers):
            results.append(self._error(failing=False) or self._no_room(transfer))
            if results[at] is None:
                going.append(at)
                sent.append(_sent(_inner(transfer), faults.get(at)))
        hook = None if before is None else lambda position: before(going[position])
        for at, error in zip(going, self.inner.write(sent, hook), strict=True):
            results[at] = _eio() if faults.get(at) is WriteFault.ERROR else error
        return results

    def capabilities(self) -> EngineCapabilities:
        """What the inner engine can do."""
        return self.inner.capabilities()

    def close(self) -> None:
        """Close the inner engine."""
        self.inner.close()

    def take_space(self, count: int) -> None:
        """Use up some of the room that is left; OSError (ENOSPC) when there is less."""
        if self._broken:
            raise OSError(self._broken, os.strerror(self._broken))
        with self._lock:
            if self._room is not None:
                if count > self._room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._room -= count

    def check_sync(self) -> None:
        """OSError (EIO) when this sync is to fail."""
        self._check_broken()
        with self._lock:
            failing = self._failing_syncs > 0
            self._failing_syncs -= failing
        if failing:
            raise _eio()

    def _check_broken(self) -> None:
        if self._broken:
            raise OSError(self._broken, os.strerror(self._broken))

    def _error(self, *, failing: bool) -> OSError | None:
        """Why a transfer does not even begin."""
        if self._broken:
            return OSError(self._broken, os.strerror(self._broken))
        return _eio() if failing else None

    def _no_room(self, transfer: Transfer) -> OSError | None:
        """Take the room that a write needs beyond the end of its file; the error when there is less."""
        try:
            self.take_space(max(0, transfer.offset + lay(transfer).nbytes - transfer.file.size))
        except OSError as error:
            return error
        return None

    def _due(self, orders: dict[int, _Fault], verb: str, count: int) -> dict[int, _Fault]:
        """Faults for the next ``count`` transfers, by their place in the batch."""
        with self._lock:
            first = self._seen[verb] + 1
            self._seen[verb] += count
            return {nth - first: orders.pop(nth) for nth in sorted(orders) if first <= nth < first + count}


_Fault = TypeVar("_Fault", ReadFault, WriteFault)


def _inner(transfer: Transfer) -> Transfer:
    """The same transfer, of the inner engine's file."""
    file = transfer.file
    return transfer._replace(file=file.inner if isinstance(file, FaultyFile) else file)


def _sent(transfer: Transfer, fault: WriteFault | None) -> Transfer:
    """What reaches the disk of a write; its buffer stays the caller's, so that ``before`` may still fill it."""
    offset, size = transfer.offset, lay(transfer).nbytes
    match fault:
        case WriteFault.LOST:
            return _until(transfer, 0)
        case WriteFault.TORN | WriteFault.ERROR:
            return _until(transfer, size // 2 // PAGE_BYTES * PAGE_BYTES)
        case WriteFault.MISPLACED:
            fits = offset + PAGE_BYTES + size <= transfer.file.size
            return transfer._replace(offset=offset + PAGE_BYTES if fits else max(0, offset - PAGE_BYTES))
    return transfer


def _until(transfer: Transfer, stop: int) -> Transfer:
    """The first bytes of a transfer."""
    parts = [buffer[low:high] for buffer, low, high in lay(transfer).spans(0, stop)]
    return transfer._replace(buffer=parts[0] if parts else transfer.buffer[:0], behind=tuple(parts[1:]))


def _invert(transfer: Laid, start: int, stop: int, bits: int) -> None:
    """Change bits of bytes that arrived."""
    for buffer, low, high in transfer.spans(start, stop):
        buffer[low:high] ^= bits


def _eio() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))
