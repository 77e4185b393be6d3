"""Records in host memory: the laws, the order of eviction, room, and what the index costs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.records import RecordStore
from kvtier.testing.record_laws import Fault, OpenStore, RecordStoreLaws


def flip_a_byte(store: RecordStore | None, _directory: Path, rng: random.Random) -> None:
    """Change one byte of one record where it lies."""
    assert isinstance(store, HostRecords)
    entry = rng.choice([entry for entry in store._entries.values() if entry.info.payload_bytes])
    view = rng.choice(entry.place.views)
    view[rng.randrange(min(view.size, entry.info.payload_bytes))] ^= 1 << rng.randrange(8)


class TestHostRecords(RecordStoreLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        return lambda _directory, capacity_bytes: HostRecords(capacity_bytes)

    @pytest.fixture
    def faults(self) -> Sequence[Fault]:
        return (flip_a_byte,)
