"""The mixed load of a worker that will be killed: puts, reads, deletes, leases and flushes from several threads."""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from kvtier.errors import ConfigError
from kvtier.storage_backends.records import PutState, ReadRequest, RecordStore
from kvtier.testing.crash.journal import Journal, Note
from kvtier.testing.record_samples import OpenStore, generation_of, sample_key, sample_record

__all__ = ["Load", "load_target", "run_load", "size_of"]

_ODD_SIZES = (16, 100, 4000, 4096, 4097, 20_000, 65_536, 70_001)
_LEASE_S = 600.0
_NOTES = {PutState.STORED: Note.STORED, PutState.EXISTS: Note.EXISTS, PutState.REFUSED: Note.REFUSED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a worker does.

    Parameters
    ----------
    seed : int
        Of the operations; the interleaving of the threads is the machine's.
    threads, operations : int
        Threads, and calls of each.
    numbers : int
        Records that the threads work on, each thread on those that are its own: what is acknowledged is then known
        record by record, while the store sees them all at once.
    first_generation : int
        Generations count from here, so that no two workers on a directory write the same bytes.
    filler : int
        Bytes of extra records put now and then so that the store must evict; 0: no eviction is provoked.
    """

    seed: int = 0
    threads: int = 3
    operations: int = 60
    numbers: int = 24
    first_generation: int = 0
    filler: int = 0


def size_of(number: int, generation: int) -> int:
    """Bytes of a record of the load."""
    return _ODD_SIZES[(number * 7 + generation * 3) % len(_ODD_SIZES)]


def load_target(target: str) -> OpenStore:
    """The function behind ``"package.module:name"`` or ``"path/to/file.py:name"``.

    Raises
    ------
    ConfigError
        There is none.
    """
    place, _, name = target.rpartition(":")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        opener: OpenStore = getattr(module, name)
    except (ImportError, AttributeError, ValueError, FileNotFoundError) as missing:
        raise ConfigError(
            f"a store is named 'package.module:function' or 'file.py:function', got {target!r} ({missing})"
        ) from missing
    return opener


def _module_of_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_load(store: RecordStore, load: Load, journal: Journal) -> None:
    """Run it to its end, noting everything; the store stays open."""
    with ThreadPoolExecutor(load.threads) as pool:
        for done in [pool.submit(_Thread(store, load, journal, index).run) for index in range(load.threads)]:
            done.result()


class _Thread:
    """One thread of the load."""

    def __init__(self, store: RecordStore, load: Load, journal: Journal, index: int) -> None:
        self._store, self._load, self._journal, self._index = store, load, journal, index
        self._rng = random.Random(load.seed * 1009 + index)
        self._numbers = range(index, load.numbers, load.threads)
        self._generation = load.first_generation

    def run(self) -> None:
        """Do the operations; what a call raises is noted, for it must raise nothing."""
        choices: list[Callable[[], None]] = [self._put] * 8 + [self._read] * 4 + [self._delete] * 3 + [self._flush]
        choices += [self._lease, self._fill] if self._load.filler else []
        for _ in range(self._load.operations):
            action = self._rng.choice(choices)
            try:
                action()
            except Exception as error:  # noqa: BLE001 - the finding itself
                self._journal.write(Note.RAISED, self._index, text=f"{action.__name__}: {error!r}")

    def _put(self) -> None:
        numbers = self._rng.sample(self._numbers, min(len(self._numbers), self._rng.randint(1, 3)))
        self._generation += 1
        sizes = {number: size_of(number, self._generation) for number in numbers}
        for number, size in sizes.items():
            self._journal.write(Note.PUT, number, self._generation, size)
        outcomes = self._store.put([sample_record(n, size, generation=self._generation) for n, size in sizes.items()])
        for (number, size), outcome in zip(sizes.items(), outcomes, strict=True):
            self._journal.write(_NOTES[outcome.state], number, self._generation, size, outcome.reason)

    def _read(self) -> None:
        number = self._rng.choice(self._numbers)
        info = self._store.info(sample_key(number))
        if info is None:
            return
        into = torch.zeros(info.payload_bytes, dtype=torch.uint8)
        (served,) = self._store.read([ReadRequest(info.key, into)])
        if served and generation_of(number, into.numpy().tobytes()) is None:
            self._journal.write(Note.READ_WRONG, number)

    def _delete(self) -> None:
        number = self._rng.choice(self._numbers)
        self._journal.write(Note.DELETE, number)
        self._store.delete([sample_key(number)])
        self._journal.write(Note.DELETED, number)

    def _flush(self) -> None:
        self._journal.write(Note.FLUSH, self._index)
        self._store.flush()
        self._journal.write(Note.FLUSHED, self._index)

    def _lease(self) -> None:
        number = self._rng.choice(self._numbers)
        lease = self._store.lease([sample_key(number)], owner=f"thread {self._index}", seconds=_LEASE_S)
        if lease.keys:
            self._journal.write(Note.LEASED, number)

    def _fill(self) -> None:
        self._generation += 1
        number = 1_000_000 + self._index * 1000 + self._generation % 1000
        self._store.put([sample_record(number, self._load.filler, generation=self._generation)])
