"""Loading records from host memory, every byte verified, beside copying as many bytes and verifying nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import torch

from benchmarks.registry import BenchmarkError
from benchmarks.store.keys import key_of, records_of
from benchmarks.store.settings import Settings
from benchmarks.timing import Competitor, Limits, contest
from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.memory import ByteRows
from kvtier.storage_backends.records import ReadRequest

__all__ = ["measure"]

_PER_CALL: Final = 8
_KVTIER: Final = "kvtier host tier, verified"
_COPY: Final = "memcpy"


def measure(settings: Settings) -> dict[str, Any]:
    """Rates of both and their ratio."""
    print("host: load beside memcpy", file=sys.stderr, flush=True)
    count, size = settings.host.count, settings.host.nbytes
    source = torch.randint(0, 256, (count, size), dtype=torch.uint8)
    target = torch.zeros(_PER_CALL, size, dtype=torch.uint8)
    capacity = 2 * count * (size + 64 * 1024)
    with HostRecords(capacity) as store:
        for first in range(0, count, _PER_CALL):
            store.put(records_of(list(source[first : first + _PER_CALL]), first))

        def load(turn: int) -> Callable[[], object]:
            first = _first(turn, count)
            requests = [ReadRequest(key_of(first + i), target[i]) for i in range(_PER_CALL)]
            return lambda: _checked(store.read(requests))

        def copy(turn: int) -> Callable[[], object]:
            first = _first(turn, count)
            pairs = [(target[i].numpy(), source[first + i].numpy()) for i in range(_PER_CALL)]
            return lambda: _copied(pairs)

        limits = Limits(seconds=0.2 if settings.repeats < 3 else 4.0, least=5, most=400, warm_up=2)
        timings = contest([Competitor(_KVTIER, load), Competitor(_COPY, copy)], limits=limits, between=lambda: None)
    moved = _PER_CALL * size
    return {
        "record_bytes": size,
        "records_per_call": _PER_CALL,
        "rows": [
            {"name": name, **asdict(timing), "gb_per_s": moved / timing.median_s / 1e9}
            for name, timing in timings.items()
        ],
        "vs_memcpy": timings[_COPY].median_s / timings[_KVTIER].median_s,
    }


def _first(turn: int, count: int) -> int:
    """Other records each turn, so that they come from memory and not from a cache."""
    return turn * _PER_CALL % count // _PER_CALL * _PER_CALL


def _copied(pairs: Sequence[tuple[ByteRows, ByteRows]]) -> None:
    for into, of in pairs:
        np.copyto(into, of)


def _checked(read: list[bool]) -> None:
    if not all(read):
        raise BenchmarkError(f"the host tier must return all {len(read)} records, it returned {sum(read)}")
