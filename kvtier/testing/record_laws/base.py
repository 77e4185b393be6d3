"""What the laws of record stores share: the factory fixture, fresh stores, settings."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ClassVar, TypeAlias

import pytest
from hypothesis import HealthCheck, note, settings

from kvtier.storage_backends.records import PutState, Record, RecordStore
from kvtier.testing.faults.files import damage_files
from kvtier.testing.leaks import NoLeaks
from kvtier.testing.record_machine import Fault
from kvtier.testing.record_samples import OpenStore, fetch, sample_bytes

__all__ = ["LAW", "Fault", "FreshStore", "LawsBase", "file_damage", "put_all", "right_or_missing"]

FreshStore: TypeAlias = Callable[[], AbstractContextManager[RecordStore]]
"""Opens an empty store in a directory of its own, for a ``with``."""

# The factory fixture opens another store at each call, so sharing it between examples is safe. Every example opens
# stores, and a durable one waits for its disk: a third as many of them as elsewhere.
LAW = settings(
    max_examples=max(10, settings().max_examples // 3),
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


class LawsBase(NoLeaks):
    """Fixtures of every group of laws; a subclass overrides ``store``, and more where its store needs it.

    Attributes
    ----------
    capacity_bytes : int
        Bound that the laws open stores with. They fill it several times; records are at most 1/32 of it.
    """

    capacity_bytes: ClassVar[int] = 16 << 20

    @pytest.fixture
    def store(self) -> OpenStore:
        """Say how a store is opened: ``(directory, capacity_bytes) -> RecordStore``."""
        pytest.fail("override the fixture 'store': return a function (directory, capacity_bytes) -> RecordStore")

    @pytest.fixture
    def faults(self) -> Sequence[Fault]:
        """Ways to damage stored bytes; override it for a store whose bytes are not in files of its directory."""
        return (file_damage,)

    @pytest.fixture
    def fresh(self, store: OpenStore, tmp_path: Path) -> FreshStore:
        """Empty stores, one after another, each in a directory that goes with it."""
        numbers = itertools.count()

        @contextmanager
        def opened() -> Iterator[RecordStore]:
            directory = tmp_path / f"store-{next(numbers)}"
            directory.mkdir()
            try:
                with store(directory, self.capacity_bytes) as fresh:
                    yield fresh
            finally:
                shutil.rmtree(directory)

        return opened

    @pytest.fixture
    def persistent(self, store: OpenStore, tmp_path: Path) -> OpenStore:
        """Like ``store``, for laws about bytes that outlive a store; skips where they do not."""
        probe = tmp_path / "probe"
        probe.mkdir()
        with store(probe, self.capacity_bytes) as opened:
            capabilities = opened.capabilities()
        if not capabilities.persistent:
            pytest.skip(f"{capabilities.name} does not keep records beyond close (Capabilities.persistent)")
        return store


def file_damage(_store: RecordStore | None, directory: Path, rng: random.Random) -> None:
    """Damage a file of the store's directory: the fault of every store that lives in one."""
    note(damage_files(directory, rng))


def put_all(store: RecordStore, records: Sequence[Record]) -> None:
    """Put records that must all be stored."""
    outcomes = store.put(records)
    assert [outcome.state for outcome in outcomes] == [PutState.STORED] * len(records), outcomes


def right_or_missing(store: RecordStore, sizes: dict[int, int]) -> list[int]:
    """Read the numbered records of these sizes; each is right or missing, and these are missing."""
    missing = []
    for number, size in sizes.items():
        served = fetch(store, number, size)
        if served is None:
            missing.append(number)
        else:
            assert served == sample_bytes(number, 0, size), f"record {number} came back with other bytes"
    return missing
