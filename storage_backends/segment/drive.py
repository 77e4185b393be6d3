"""What the drive below a directory is like: latency and bandwidth of reads, measured once, and what follows."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass
from pathlib import Path

from kvtier.record import BLOCK_BYTES
from kvtier.storage_backends.engines import EngineFile, IOEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned, round_up
from kvtier.storage_backends.segment.pool import SegmentPool

__all__ = ["Drive", "measure_drive"]

PROBE_NAME = "probe.kvt"

_BIG_BYTES = 4 << 20
_SMALL_READS = 9
_LEAST_GAP_BYTES = 16 << 10
_MOST_GAP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """Reads of the drive, as they were when the directory was opened.

    Parameters
    ----------
    direct : bool
        They pass by the page cache.
    note : str
        Why not; empty when all is well.
    latency : float
        Seconds of a read of 4 KiB, the median; 0 when it could not be measured.
    bandwidth : float
        Bytes a second of a large read; 0 when it could not be measured.
    """

    direct: bool = False
    note: str = ""
    latency: float = 0.0
    bandwidth: float = 0.0

    @property
    def gap_bytes(self) -> int:
        """What streams by in the time that another read would cost: smaller gaps are read through."""
        return round_up(min(_MOST_GAP_BYTES, max(_LEAST_GAP_BYTES, int(self.latency * self.bandwidth))), BLOCK_BYTES)


def measure_drive(engine: IOEngine, directory: Path, pool: SegmentPool, *, writable: bool) -> Drive:
    """Time a few reads, of a segment where there is one, else of a scratch file that is removed again."""
    for segment in pool.segments.values():
        return _measure(engine, segment.file, segment.size)
    if not writable:
        return Drive()
    path = directory / PROBE_NAME
    file: EngineFile | None = None
    try:
        file = engine.open(path, writable=True, create=True)
        file.allocate(_BIG_BYTES // 4)
        memory = empty_aligned(_BIG_BYTES // 4)
        if any(engine.write([Transfer(file, 0, memory)])):
            return Drive(direct=file.direct, note=file.note)
        file.sync()
        return _measure(engine, file, memory.numel())
    except OSError as error:
        return Drive(note=f"the drive could not be tried: {error.strerror or error}")
    finally:
        if file is not None:
            file.close()
        with contextlib.suppress(OSError):
            path.unlink()


def _measure(engine: IOEngine, file: EngineFile, size: int) -> Drive:
    big = empty_aligned(min(_BIG_BYTES, size // BLOCK_BYTES * BLOCK_BYTES))
    small = empty_aligned(BLOCK_BYTES)
    blocks = max(1, size // BLOCK_BYTES)
    choose = random.Random(size)  # noqa: S311 - places to read, not secrets
    waits = []
    for _ in range(_SMALL_READS):
        start = time.perf_counter()
        failed = any(engine.read([Transfer(file, choose.randrange(blocks) * BLOCK_BYTES, small)]))
        waits.append(time.perf_counter() - start)
        if failed:
            return Drive(direct=file.direct, note=file.note)
    start = time.perf_counter()
    failed = any(engine.read([Transfer(file, 0, big)]))
    seconds = time.perf_counter() - start
    bandwidth = 0.0 if failed else big.numel() / max(seconds, 1e-9)
    return Drive(direct=file.direct, note=file.note, latency=sorted(waits)[_SMALL_READS // 2], bandwidth=bandwidth)
