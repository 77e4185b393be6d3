"""Put and get by one store, in the environment that it needs; whatever is timed is timed here, for all alike.

`answering.py` loads it, and a runner with a class ``Store``; `benchmarks.peers.client` asks.
"""

from __future__ import annotations

import gc
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

RUNS: Final = "Store"
"""The class of a runner that a `Server` is made from."""

SEED: Final = 20260101
"""Every process makes the same pieces, so that one can check what another, killed one has stored."""

SAMPLE_BYTES: Final = 32

_HUGE_PAGE_BYTES: Final = 2 << 20

Bytes = npt.NDArray[np.uint8]


class Store(Protocol):
    """What a runner provides: made from a directory and settings, it puts and gets whole batches.

    ``batch`` brings names and buffers into the store's own form, outside of the timing. ``put`` returns when the store
    has acknowledged, and synced where the run is durable; ``get`` says which buffers it filled. A store with an
    ``untimed_put`` says in it why the time of a put means nothing.
    """

    note: str

    def batch(self, names: Sequence[str], buffers: Sequence[Bytes]) -> Any:
        """The store's own form of a call's arguments."""

    def put(self, batch: Any) -> None:
        """Store it."""

    def get(self, batch: Any) -> list[bool]:
        """Fill the buffers."""

    def close(self) -> None:
        """Let go of everything, as at the end of a program."""


class Arena:
    """Page-aligned memory that is there, cut into pieces of any size.

    Private and in huge pages where the system has them, as kvtier's host tier is, for every store alike: direct I/O
    from small pages, each pinned by itself, was measured at little more than half of the rate.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def need(self, size: int, fill: Callable[[Bytes], None]) -> None:
        """Have ``size`` bytes at least; ``fill`` them when they are new."""
        if self._bytes.size < size:
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if size >= _HUGE_PAGE_BYTES:
                mapping.madvise(mmap.MADV_HUGEPAGE)
            self._bytes = np.frombuffer(mapping, np.uint8)
            fill(self._bytes)

    def piece(self, index: int, size: int) -> Bytes:
        """One piece."""
        return self._bytes[index * size : (index + 1) * size]


class Server:
    """The store that is open, what was written, and room for what is read."""

    def __init__(self, factory: Callable[..., Store]) -> None:
        self._factory = factory
        self._store: Store | None = None
        self._source, self._target = Arena(), Arena()
        self._piece_bytes = 0

    def open(self, *, directory: str, piece_bytes: int, pieces: int, **settings: Any) -> dict[str, Any]:
        """Open a store for so many pieces in a directory; what is there already stays."""
        self._piece_bytes = piece_bytes
        self._source.need(pieces * piece_bytes, _random)
        self._target.need(pieces * piece_bytes, _zero)
        begun = time.perf_counter()
        self._store = self._factory(Path(directory), piece_bytes=piece_bytes, pieces=pieces, **settings)
        return {
            "note": self._store.note,
            "untimed_put": getattr(self._store, "untimed_put", ""),
            "seconds": time.perf_counter() - begun,
        }

    def put(self, *, calls: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Store pieces, one call after the other."""
        store = self._opened()
        batches = [self._batch(store, call, self._source) for call in calls]
        with _no_collection():
            return {"seconds": [_timed(store.put, batch)[0] for batch in batches]}

    def get(self, *, calls: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Read pieces and compare them, outside of the timing."""
        store = self._opened()
        asked = [index for call in calls for index in call]
        for index in asked:
            self._target.piece(index, self._piece_bytes).fill(0)
        batches = [self._batch(store, call, self._target) for call in calls]
        with _no_collection():
            timings = [_timed(store.get, batch) for batch in batches]
        told = {
            index: ok
            for call, (_, found) in zip(calls, timings, strict=True)
            for index, ok in zip(call, found, strict=True)
        }
        right = {index for index, ok in told.items() if ok and self._same(index)}
        return {
            "seconds": [seconds for seconds, _ in timings],
            "right": sorted(right),
            "wrong": sorted(index for index, ok in told.items() if ok and index not in right),
            "missing": sorted(index for index, ok in told.items() if not ok),
        }

    def sample(self, *, index: int) -> dict[str, Any]:
        """Bytes in the middle of a piece, by which it is found on the disk."""
        middle = self._piece_bytes // 2
        return {"bytes": self._source.piece(index, self._piece_bytes)[middle : middle + SAMPLE_BYTES].tobytes().hex()}

    def close(self) -> dict[str, Any]:
        """Close the store."""
        store, self._store = self._opened(), None
        store.close()
        return {}

    def _opened(self) -> Store:
        if self._store is None:
            raise RuntimeError("a store must be open; send open first")
        return self._store

    def _batch(self, store: Store, call: Sequence[int], arena: Arena) -> Any:
        return store.batch(
            [f"piece-{index}" for index in call], [arena.piece(index, self._piece_bytes) for index in call]
        )

    def _same(self, index: int) -> bool:
        return np.array_equal(
            self._source.piece(index, self._piece_bytes), self._target.piece(index, self._piece_bytes)
        )


def _timed(function: Callable[[Any], Any], batch: Any) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = function(batch)
    return time.perf_counter() - begun, result


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from walking all of torch in the middle of a timing; it would cost 0.1 s, of whoever's turn it is."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _random(buffer: Bytes) -> None:
    words = np.random.default_rng(SEED).integers(0, 2**64, buffer.size // 8, np.uint64)
    buffer.view(np.uint64)[:] = words


def _zero(buffer: Bytes) -> None:
    buffer.fill(0)
