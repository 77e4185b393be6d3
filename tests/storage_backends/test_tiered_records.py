"""Tiers of records: the laws over memory and files, copies kept above, promotion, and damage in any tier."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.rates import TransferRate
from kvtier.storage_backends.records import ByteRange, PutOutcome, PutState, ReadRequest, Record, RecordStore
from kvtier.storage_backends.tiered_records import TieredRecords
from kvtier.testing.faults.files import damage_files
from kvtier.testing.faults.memory import host_memory
from kvtier.testing.record_laws import Fault, OpenStore, RecordStoreLaws
from kvtier.testing.record_samples import fetch, sample_bytes, sample_key, sample_record
from kvtier.testing.reference_records import ReferenceRecords

MIB = 1 << 20


class Files(ReferenceRecords):
    """One file a record; what a power loss would cost is not the question here."""

    def _sync(self, descriptor: int) -> None:
        del descriptor

    def _sync_directory(self) -> None:
        pass


def hurt_memory(store: RecordStore | None, _directory: Path, rng: random.Random) -> None:
    """Change one byte of one copy in memory, if there is one."""
    if isinstance(store, TieredRecords) and isinstance(store.tiers[0], HostRecords):
        infos = [info for info in store.tiers[0].scan() if info.payload_bytes]
        if infos:
            info = rng.choice(infos)
            view = host_memory(store.tiers[0], info.key)[0]
            view[rng.randrange(min(info.payload_bytes, view.size))] ^= 0x40


def hurt_files(_store: RecordStore | None, directory: Path, rng: random.Random) -> None:
    damage_files(directory, rng)


class TestMemoryOverFiles(RecordStoreLaws):
    """A small tier in memory over one on disk, so that most reads come from below."""

    @pytest.fixture
    def store(self) -> OpenStore:
        return lambda directory, capacity_bytes: TieredRecords(
            [HostRecords(capacity_bytes // 8), Files(directory, capacity_bytes * 7 // 8)]
        )

    @pytest.fixture
    def faults(self) -> Sequence[Fault]:
        return (hurt_memory, hurt_files)


@contextmanager
def tiers(directory: Path, upper_bytes: int = MIB, lower_bytes: int = 64 * MIB) -> Iterator[TieredRecords]:
    with TieredRecords([HostRecords(upper_bytes), Files(directory, lower_bytes)]) as store:
        yield store


def where(store: TieredRecords, numbers: Sequence[int]) -> list[int]:
    return store.locate([sample_key(number) for number in numbers]).tolist()


def test_a_put_is_below_and_a_copy_above(tmp_path: Path) -> None:
    with tiers(tmp_path) as store:
        store.put([sample_record(1, 100_000)])

        assert [tier.contains([sample_key(1)]).tolist() for tier in store.tiers] == [[True], [True]]
        assert fetch(store, 1, 100_000) == sample_bytes(1, 0, 100_000)
        assert [tier.stats().hits for tier in store.tiers] == [1, 0]
    with tiers(tmp_path) as store:
        assert where(store, [1, 2]) == [1, -1]


def test_what_leaves_memory_is_still_below_and_comes_back_when_read(tmp_path: Path) -> None:
    with tiers(tmp_path) as store:
        for number in range(4):
            store.put([sample_record(number, 300_000)])
        assert where(store, range(4)) == [1, 0, 0, 0]

        assert fetch(store, 0, 300_000) == sample_bytes(0, 0, 300_000)

        assert where(store, range(4)) == [0, 1, 0, 0]
        assert store.promoted_bytes == 300_000
        assert fetch(store, 1, 300_000, [ByteRange(5, 10)]) == sample_bytes(1, 0, 300_000)[5:15]
        assert where(store, [1]) == [1], "a part cannot be promoted"


def test_one_read_does_not_sweep_memory_clean(tmp_path: Path) -> None:
    with tiers(tmp_path, upper_bytes=2 * MIB) as store:
        store.put([sample_record(number, 100_000) for number in range(60)])
        store.tiers[0].clear()
        store.put([sample_record(100 + number, 100_000) for number in range(8)])
        assert all(level == 1 for level in where(store, range(60)))

        _read_all(store, range(60), 100_000)

        assert store.promoted_bytes == 10 * 100_000
        assert where(store, range(100, 108)) == [0] * 8


def test_what_the_disk_refuses_lives_in_memory_with_the_reason(tmp_path: Path) -> None:
    with tiers(tmp_path, lower_bytes=200_000) as store:
        lease = store.put([sample_record(1, 150_000)]) and store.lease([sample_key(1)], owner="test", seconds=60)
        (outcome,) = store.put([sample_record(2, 150_000)])

        assert outcome == PutOutcome(PutState.STORED, "the store is full of leased records")
        assert fetch(store, 2, 150_000) == sample_bytes(2, 0, 150_000)
        assert [one.key for one in store.scan()] == [sample_key(1), sample_key(2)]
        assert (store.stats().records, store.stats().stored, store.stats().refused) == (2, 2, 0)
        assert store.delete([sample_key(1), sample_key(2), sample_key(3)]) == 2
        assert not store.contains([sample_key(1), sample_key(2)]).any()
        lease.release()


def test_what_every_tier_refuses_is_refused(tmp_path: Path) -> None:
    with tiers(tmp_path, lower_bytes=200_000) as store:
        (outcome,) = store.put([sample_record(1, 2 * MIB)])

        assert outcome.state is PutState.REFUSED
        assert "takes" in outcome.reason
        assert store.stats().refused == 1


@given(seed=st.integers(0, 2**32 - 1), damage=st.lists(st.sampled_from(["above", "below"]), min_size=1, max_size=4))
def test_a_damaged_copy_is_read_from_the_other_tier(
    tmp_path_factory: pytest.TempPathFactory, seed: int, damage: list[str]
) -> None:
    """Damage above costs a read from below and mends the copy; damage on both sides costs the record."""
    rng = random.Random(seed)
    directory = tmp_path_factory.mktemp("damage")
    with tiers(directory, upper_bytes=2 * MIB) as store:
        store.put([sample_record(1, 70_000)])
        host = store.tiers[0]
        assert isinstance(host, HostRecords)
        (path,) = directory.iterdir()
        if "above" in damage:
            host_memory(host, sample_key(1))[0][rng.randrange(70_000)] ^= 1 << rng.randrange(8)
        if "below" in damage:
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)

        served = fetch(store, 1, 70_000)

        lost = {"above", "below"} <= set(damage)
        assert served == (None if lost else sample_bytes(1, 0, 70_000))
        assert where(store, [1]) == [-1 if lost else 0]
        assert store.stats().damaged == (2 if lost else int("above" in damage))
        assert (store.stats().hits, store.stats().misses) == (int(not lost), int(lost))


def test_a_lease_holds_every_copy(tmp_path: Path) -> None:
    with tiers(tmp_path, lower_bytes=2 * MIB) as store:
        store.put([sample_record(number, 200_000) for number in range(3)])
        with store.lease([sample_key(n) for n in (2, 7, 0)], owner="me", seconds=60) as lease:
            assert (lease.owner, lease.keys) == ("me", (sample_key(2), sample_key(0)))
            for number in range(10, 30):
                store.put([sample_record(number, 200_000)])
            assert [tier.contains([sample_key(n) for n in range(3)]).tolist() for tier in store.tiers] == [
                [True, False, True]
            ] * 2
        assert all(tier.stats().leased_bytes == 0 for tier in store.tiers)


def test_what_is_deleted_while_it_is_promoted_stays_deleted(tmp_path: Path) -> None:
    """A delete that comes between the read below and the copy upwards wins."""
    read, go_on = threading.Event(), threading.Event()

    class Slow(Files):
        def read(self, requests: Sequence[ReadRequest]) -> list[bool]:
            served = super().read(requests)
            read.set()
            go_on.wait(60)
            return served

    with TieredRecords([HostRecords(MIB), Slow(tmp_path, 8 * MIB)]) as store:
        store.put([sample_record(1, 50_000)])
        store.tiers[0].clear()
        reader = threading.Thread(target=fetch, args=(store, 1, 50_000))
        reader.start()
        assert read.wait(60)
        store.delete([sample_key(1)])
        go_on.set()
        reader.join()

        assert where(store, [1]) == [-1]


def test_what_is_deleted_while_it_is_put_stays_deleted(tmp_path: Path) -> None:
    class Deleting(Files):
        def put(self, records: Sequence[Record]) -> list[PutOutcome]:
            outcomes = super().put(records)
            store.delete([records[0].key])
            return outcomes

    with TieredRecords([HostRecords(MIB), Deleting(tmp_path, 8 * MIB)]) as store:
        store.put([sample_record(1, 5000), sample_record(2, 5000)])

        assert where(store, [1, 2]) == [-1, 1]


def test_clear_is_by_tenant_and_counts_records_once(tmp_path: Path) -> None:
    with tiers(tmp_path) as store:
        store.put([sample_record(number, 1000, tenant="ab"[number % 2]) for number in range(5)])

        assert store.clear("a") == 3
        assert where(store, range(5)) == [-1, 0, -1, 0, -1]
        assert (store.clear(), store.stats().records) == (2, 0)


def test_reads_teach_how_fast_each_tier_is(tmp_path: Path) -> None:
    rates = [TransferRate(latency=1.0, bandwidth=1.0), TransferRate(latency=1.0, bandwidth=1.0)]
    with TieredRecords([HostRecords(MIB), Files(tmp_path, 8 * MIB)], rates) as store:
        store.put([sample_record(1, 100_000)])
        fetch(store, 1, 100_000)
        fetch(store, 9, 10)
        assert [rate.transfers for rate in rates] == [1, 0]
        store.tiers[0].clear()
        fetch(store, 1, 100_000)

        assert [rate.transfers for rate in rates] == [1, 1]
        assert all(rate.predict(100_000) < 100_001 for rate in rates)


def test_at_least_one_tier() -> None:
    with pytest.raises(ConfigError, match="at least one tier, got none"):
        TieredRecords([])


def _read_all(store: RecordStore, numbers: Sequence[int], size: int) -> None:
    import torch

    into = torch.zeros(len(numbers), size, dtype=torch.uint8)
    assert all(store.read([ReadRequest(sample_key(n), row) for n, row in zip(numbers, into, strict=True)]))
