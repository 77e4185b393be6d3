"""Many records: opening with a good index, look-ups, memory a record, and the rebuild from the segments alone."""

from __future__ import annotations

import gc
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.registry import BenchmarkError
from benchmarks.store import fio
from benchmarks.store.competitors import forget
from benchmarks.store.keys import key_of, records_of
from benchmarks.store.settings import Settings
from kvtier.storage_backends.extents import digest_bytes
from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.records import PutState, RecordStore
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords

__all__ = ["measure"]

_BATCH: Final = 1000
_LOOKUPS: Final = 200
_BLOCK: Final = 4096
_MOST_IN_MEMORY: Final = 500_000
_INDEX: Final = "index.sqlite*"


def measure(settings: Settings) -> dict[str, Any]:
    """One value for each question, with what it was asked of."""
    found: dict[str, Any] = {"records": settings.records, "record_bytes": settings.record_bytes}
    directory = settings.directory / "scale"
    try:
        found |= _many(settings, directory)
        shutil.rmtree(directory)
        found["rebuild"] = _rebuild(settings, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return found | _in_memory(settings)


def _in_memory(settings: Settings) -> dict[str, Any]:
    """The same small records in host memory: what they take beside their payload and digest, and look-ups."""
    count, size = min(settings.records, _MOST_IN_MEMORY), settings.record_bytes
    print(f"scale: {count} records of {size} bytes in memory", file=sys.stderr, flush=True)
    payload = torch.randint(0, 256, (_BATCH, size), dtype=torch.uint8)
    with HostRecords(4 * _BATCH * size) as store:
        store.put(records_of(list(payload), 0))  # what is loaded and kept with the first put is no record's
    gc.collect()
    before = _resident_bytes()
    with HostRecords(2 * count * size) as store:
        for first in range(0, count, _BATCH):
            store.put(records_of(list(payload[: count - first]), first))
        gc.collect()
        resident = _resident_bytes() - before - count * (size + digest_bytes(size))
        if store.stats().records != count:
            raise BenchmarkError(f"host memory must take all {count} records, it has {store.stats().records}")
        present = _lookup_us(store, random.Random(0).sample(range(count), min(count, _LOOKUPS * _BATCH)))  # noqa: S311
        absent = _lookup_us(store, range(count, count + _LOOKUPS * _BATCH))
    return {
        "host_records": count,
        "host_resident_bytes_a_record": resident / count,
        "host_lookup_us_a_key_present": present,
        "host_lookup_us_a_key_absent": absent,
    }


def _many(settings: Settings, directory: Path) -> dict[str, Any]:
    """Fill a store with small records, and open it again."""
    count, size = settings.records, settings.record_bytes
    options = _options(count, size)
    print(f"scale: {count} records of {size} bytes", file=sys.stderr, flush=True)
    seconds = _fill(directory, options, count, size)
    gc.collect()
    before, begun = _resident_bytes(), time.perf_counter()
    with SegmentRecords(directory, options) as store:
        opened = time.perf_counter() - begun
        gc.collect()
        resident = _resident_bytes() - before
        if store.recovery.indexed != count or store.recovery.rebuilt:
            raise BenchmarkError(f"all {count} records must come from the index, {store.recovery.indexed} did")
        present = _lookup_us(store, random.Random(0).sample(range(count), min(count, _LOOKUPS * _BATCH)))  # noqa: S311
        absent = _lookup_us(store, range(count, count + _LOOKUPS * _BATCH))
        table = store.memory_bytes
    return {
        "put_us_a_record": seconds / count * 1e6,
        "reopen_seconds": opened,
        "resident_bytes_a_record": resident / count,
        "table_bytes_a_record": table / count,
        "lookup_batch": _BATCH,
        "lookup_us_a_key_present": present,
        "lookup_us_a_key_absent": absent,
    }


def _fill(directory: Path, options: SegmentOptions, count: int, size: int) -> float:
    """Seconds in `put`."""
    payload = torch.randint(0, 256, (_BATCH, size), dtype=torch.uint8)
    seconds = 0.0
    with SegmentRecords(directory, options) as store:
        for first in range(0, count, _BATCH):
            records = records_of(list(payload[: count - first]), first)
            begun = time.perf_counter()
            outcomes = store.put(records)
            seconds += time.perf_counter() - begun
            refused = [outcome.reason for outcome in outcomes if outcome.state is not PutState.STORED]
            if refused:
                raise BenchmarkError(f"all {count} records must be stored, one was not: {refused[0]}")
    return seconds


def _lookup_us(store: RecordStore, numbers: Sequence[int]) -> float:
    """Microseconds a key, the median of batches."""
    batches = [[key_of(number) for number in numbers[at : at + _BATCH]] for at in range(0, len(numbers), _BATCH)]
    waits = []
    for batch in batches:
        begun = time.perf_counter()
        store.contains(batch)
        waits.append((time.perf_counter() - begun) / len(batch) * 1e6)
    return statistics.median(waits)


def _rebuild(settings: Settings, directory: Path) -> dict[str, Any]:
    """Throw the index away and open, in turns with fio reading as much."""
    count, size = settings.rebuild.count, settings.rebuild.nbytes
    options = _options(count, size)
    print(f"scale: rebuild of {count} records of {size} bytes", file=sys.stderr, flush=True)
    _fill(directory, options, count, size)
    ours: list[float] = []
    plain: dict[str, list[float]] = {}
    for _ in range(min(3, settings.repeats)):
        for index in directory.glob(_INDEX):
            index.unlink()
        forget(directory)
        begun = time.perf_counter()
        with SegmentRecords(directory, options) as store:
            ours.append(store.recovery.scanned_bytes / (time.perf_counter() - begun))
            if store.recovery.scanned != count:
                raise BenchmarkError(f"all {count} records must be found again, {store.recovery.scanned} were")
        for name, rate in _fio_read(settings, size).items():
            plain.setdefault(name, []).append(rate)
    best = max(plain, key=lambda name: statistics.median(plain[name]), default=None)
    return {
        "records": count,
        "record_bytes": size,
        "bytes_a_second": statistics.median(ours),
        "fio_best": best,
        "fio_bytes_a_second": statistics.median(plain[best]) if best else None,
        "vs_fio": statistics.median(mine / its for mine, its in zip(ours, plain[best], strict=True)) if best else None,
    }


def _fio_read(settings: Settings, size: int) -> dict[str, float]:
    if fio.missing() is not None:
        return {}
    load = fio.Load(piece_bytes=size, total_bytes=min(settings.rebuild.count, 256) * size, then=("read",))
    place = settings.directory / "fio"
    return {one.label: fio.run(load, one, place, direct=settings.direct)["read"] for one in fio.SETTINGS}


def _options(count: int, size: int) -> SegmentOptions:
    """Room for all, and a half more for what stays unused at the ends of segments."""
    return SegmentOptions(capacity=max(256 << 20, count * (size + 2 * _BLOCK) * 3 // 2), durability="relaxed")


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
