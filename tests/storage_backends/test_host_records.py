"""Records in host memory: the laws, who leaves first, memory that is lent, and damage wherever a byte lies."""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import CapacityError, ConfigError
from kvtier.storage_backends.eviction import BoolArray, IdArray
from kvtier.storage_backends.extents import EXTENT_BYTES
from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.order import LeastRecentlyUsed
from kvtier.storage_backends.records import ByteRange, PutState, RecordStore
from kvtier.storage_backends.workers import Workers
from kvtier.testing.faults.memory import host_memory
from kvtier.testing.record_laws import Fault, OpenStore, RecordStoreLaws
from kvtier.testing.record_samples import fetch, sample_bytes, sample_key, sample_record

MIB = 1 << 20
T = TypeVar("T")


def flip_bit(store: HostRecords, key: bytes, bit: int) -> None:
    """Change one bit of a payload where it lies."""
    at = bit // 8
    for view in host_memory(store, key):
        if at < view.size:
            view[at] ^= 1 << bit % 8
            return
        at -= view.size


def flip_any(store: RecordStore | None, _directory: Path, rng: random.Random) -> None:
    assert isinstance(store, HostRecords)
    infos = [info for info in store.scan() if info.payload_bytes]
    if infos:
        info = rng.choice(infos)
        flip_bit(store, info.key, rng.randrange(8 * info.payload_bytes))


class TestHostRecords(RecordStoreLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        # In two parts, and with copies in threads: a record may lie in either.
        return lambda _directory, capacity_bytes: HostRecords(
            capacity_bytes, lendable_bytes=capacity_bytes // 2, workers=Workers(3)
        )

    @pytest.fixture
    def faults(self) -> Sequence[Fault]:
        return (flip_any,)


def there(store: RecordStore, numbers: Sequence[int]) -> list[int]:
    keys = [sample_key(number) for number in numbers]
    return [number for number, found in zip(numbers, store.contains(keys), strict=True) if found]


def test_the_least_recently_used_leaves_first() -> None:
    with HostRecords(MIB) as store:
        for number in range(3):
            store.put([sample_record(number, 300_000)])
        fetch(store, 0, 300_000)
        with store.lease([sample_key(1)], owner="test", seconds=60):
            pass

        store.put([sample_record(3, 300_000)])

        assert there(store, range(4)) == [0, 1, 3]


def test_of_one_batch_the_last_leaves_first() -> None:
    with HostRecords(MIB) as store:
        store.put([sample_record(number, 200_000) for number in range(4)])
        store.put([sample_record(4, 200_000), sample_record(5, 200_000)])

        assert there(store, range(6)) == [0, 1, 2, 4, 5]


def test_a_batch_that_does_not_fit_keeps_its_beginning() -> None:
    with HostRecords(MIB) as store:
        outcomes = store.put([sample_record(number, 300_000) for number in range(5)])

        states = [outcome.state for outcome in outcomes]
        assert states == [PutState.STORED] * 3 + [PutState.REFUSED] * 2
        assert "no room in 1.0 MiB of host memory" in outcomes[3].reason
        assert there(store, range(5)) == [0, 1, 2]


def test_nothing_is_evicted_for_what_is_refused() -> None:
    with HostRecords(MIB) as store:
        store.put([sample_record(number, 200_000) for number in range(4)])
        with store.lease([sample_key(0), sample_key(1)], owner="test", seconds=60):
            (outcome,) = store.put([sample_record(9, 700_000)])

            assert outcome.state is PutState.REFUSED
            assert there(store, range(4)) == [0, 1, 2, 3]
        assert store.put([sample_record(9, 700_000)])[0].state is PutState.STORED


class NewestFirst(LeastRecentlyUsed):
    """An order of another kind, which counts what it was told."""

    evicted = 0

    def victims(self, count: int, allowed: BoolArray | None = None) -> IdArray:
        return super().victims(self.residents, allowed)[::-1][:count]

    def evict(self, ids: IdArray) -> None:
        self.evicted += ids.size
        super().evict(ids)


def test_the_order_can_be_replaced() -> None:
    order = NewestFirst()
    with HostRecords(MIB, order=order) as store:
        for number in range(5):
            store.put([sample_record(number, 300_000)])
        store.delete([sample_key(0)])

        assert there(store, range(5)) == [1, 4]
        assert (order.residents, order.evicted) == (2, 2)


@given(
    size=st.sampled_from([1, 5000, EXTENT_BYTES, 3 * EXTENT_BYTES + 17, 5 * EXTENT_BYTES]),
    data=st.data(),
    scattered=st.booleans(),
)
def test_damage_is_found_exactly_where_it_is_read(size: int, data: st.DataObject, scattered: bool) -> None:
    """A read fails if, and only if, it touches the extent of a damaged byte; the record is then put aside."""
    with HostRecords(2 * MIB) as store:
        if scattered:
            store.put([sample_record(100 + number, 36 << 10) for number in range(60)])
            store.delete([sample_key(100 + number) for number in range(0, 60, 2)])
        store.put([sample_record(1, size)])
        assert (len(host_memory(store, sample_key(1))) > 1) == (scattered and size > 36 << 10)
        start = data.draw(st.integers(0, size - 1), label="start")
        length = data.draw(st.integers(1, size - start), label="length")
        bit = data.draw(st.integers(0, 8 * size - 1), label="bit")
        flip_bit(store, sample_key(1), bit)
        extent = bit // 8 // EXTENT_BYTES

        served = fetch(store, 1, size, [ByteRange(start, length)])

        touched = start // EXTENT_BYTES <= extent <= (start + length - 1) // EXTENT_BYTES
        assert served == (None if touched else sample_bytes(1, 0, size)[start : start + length])
        assert store.stats().damaged == touched
        assert there(store, [1]) == ([] if touched else [1])


def test_a_record_that_is_deleted_while_it_is_read_keeps_its_memory() -> None:
    reading, go_on = threading.Event(), threading.Event()

    class Slow(Workers):
        def run(self, jobs: Sequence[Callable[[], T]], nbytes: int) -> list[T]:
            if threading.current_thread() is not threading.main_thread():
                reading.set()
                go_on.wait(60)
            return super().run(jobs, nbytes)

    served: list[bytes | None] = []
    with HostRecords(MIB, workers=Slow(1)) as store:
        store.put([sample_record(1, 400_000)])
        reader = threading.Thread(target=lambda: served.append(fetch(store, 1, 400_000)))
        reader.start()
        assert reading.wait(60)
        store.delete([sample_key(1)])
        refused = store.put([sample_record(2, 900_000)])[0]
        taken = store.put([sample_record(3, 400_000)])[0]
        go_on.set()
        reader.join()

        assert served == [sample_bytes(1, 0, 400_000)]
        assert (refused.state, taken.state) == (PutState.REFUSED, PutState.STORED)
        assert store.put([sample_record(2, 900_000)])[0].state is PutState.STORED


def test_a_view_is_verified_and_holds_its_memory() -> None:
    with HostRecords(MIB) as store:
        store.put([sample_record(1, 400_000), sample_record(2, 0)])
        with store.view([sample_key(1), sample_key(4), sample_key(1)]) as (found,):
            store.delete([sample_key(1)])
            assert store.put([sample_record(3, 900_000)])[0].state is PutState.REFUSED
            assert found.payload.numpy().tobytes() == sample_bytes(1, 0, 400_000)
            assert not found.served
            assert found.verify()
            assert found.served
        assert store.put([sample_record(3, 900_000)])[0].state is PutState.STORED
        with store.view([sample_key(1)]) as none:
            assert not none
        flip_bit(store, sample_key(3), 8 * 700_000)
        with store.view([sample_key(3)]) as (found,):
            assert [found.verify(stop) for stop in (1, 65_537, 655_360, 655_361, None, 1)] == [
                *[True] * 3,
                *[False] * 3,
            ]
        assert (store.stats().damaged, store.stats().hits, there(store, [3])) == (1, 1, [])


def test_leading_records_are_viewed_together() -> None:
    with HostRecords(4 * MIB) as store:
        store.put([sample_record(number, 100_000) for number in range(5)])
        store.delete([sample_key(3)])
        keys = [sample_key(number) for number in range(5)]
        with store.view(keys) as found:
            assert [view.payload.numpy().tobytes() for view in found] == [sample_bytes(n, 0, 100_000) for n in range(3)]
            assert [found[0].verify(), found[1].verify(1)] == [True, True]
        stats = store.stats()
        assert (stats.hits, stats.misses, stats.damaged) == (1, 0, 0), "only what was verified to its end was read"
        assert store.delete(keys) == 4
        assert store.put([sample_record(9, 3_900_000)])[0].state is PutState.STORED, "nothing is held"


def test_lent_memory_costs_the_oldest_records() -> None:
    with HostRecords(4 * MIB, lendable_bytes=2 * MIB) as store:
        for number in range(9):
            store.put([sample_record(number, 400_000)])
        fetch(store, 0, 400_000)

        assert store.lend() == 2 * MIB

        stats = store.stats()
        assert there(store, range(9)) == [0, 5, 6, 7, 8]
        assert stats.held_bytes <= stats.capacity_bytes == 2 * MIB
        assert [fetch(store, number, 400_000) for number in (0, 8)] == [sample_bytes(n, 0, 400_000) for n in (0, 8)]
        store.put([sample_record(9, 400_000)])
        assert store.stats().held_bytes <= 2 * MIB
        store.take_back()
        assert store.stats().capacity_bytes == 4 * MIB
        for number in range(10, 14):
            store.put([sample_record(number, 400_000)])
        assert there(store, range(14)) == [0, 6, 7, 8, 9, 10, 11, 12, 13]


def test_leased_records_are_not_lent_away() -> None:
    with HostRecords(4 * MIB, lendable_bytes=2 * MIB) as store:
        store.put([sample_record(number, 400_000) for number in range(8)])
        with store.lease([sample_key(number) for number in range(8)], owner="test", seconds=60):
            with pytest.raises(CapacityError, match="records under lease fill the host tier; release the hits"):
                store.lend()
            assert there(store, range(8)) == list(range(8))
        assert store.lend() == 2 * MIB


def test_the_index_has_a_bound_of_its_own() -> None:
    """Thousands of empty records do not take the memory that the capacity is meant to bound."""
    with HostRecords(MIB) as store:
        for number in range(500):
            assert store.put([sample_record(number, 0)])[0].state is PutState.STORED
        stats = store.stats()

        assert stats.held_bytes <= MIB // 32
        assert 0 < stats.records < 200
        assert there(store, [499]) == [499]


@pytest.mark.parametrize(("count", "meta"), [(1500, b"m" * 44), (1900, b""), (2100, b"")])
def test_the_index_takes_no_more_than_is_counted(count: int, meta: bytes) -> None:
    """At most 200 bytes a record, digests and metadata excluded: just before the tables grow, and just after."""
    records = [sample_record(number, 100, meta=meta) for number in range(count)]
    tracemalloc.start()
    try:
        with HostRecords(64 * MIB) as store:
            opened, _ = tracemalloc.get_traced_memory()
            for at in range(0, count, 100):
                store.put(records[at : at + 100])
            counted = store.stats().held_bytes - store._arena.held_bytes
            taken = tracemalloc.get_traced_memory()[0] - opened
    finally:
        tracemalloc.stop()

    assert 0.5 * counted < taken <= counted <= count * (200 + 16 + len(meta))


def test_large_memory_has_larger_units() -> None:
    with HostRecords(16 << 30) as store:
        store.put([sample_record(1, 1)])
        assert store.stats().live_bytes >= 16 << 10
    with pytest.raises(ConfigError, match=r"host memory for records must be at least 4\.0 KiB, got"):
        HostRecords(4096)
