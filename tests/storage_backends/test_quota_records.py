"""Quotas: the laws of record stores, a hard bound for each tenant, and who makes room for whom."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.quota_records import QuotaRecords
from kvtier.storage_backends.record_wrappers import ReadOnlyRecords
from kvtier.storage_backends.records import PutState, RecordStore
from kvtier.testing.faults.memory import host_memory
from kvtier.testing.record_laws import Fault, OpenStore, RecordStoreLaws
from kvtier.testing.record_samples import fetch, sample_bytes, sample_key, sample_record

MIB = 1 << 20


def flip_any(store: RecordStore | None, _directory: Path, rng: random.Random) -> None:
    assert isinstance(store, QuotaRecords)
    assert isinstance(store.inner, HostRecords)
    keys = [info.key for info in store.scan() if info.payload_bytes]
    if keys:
        host_memory(store.inner, rng.choice(keys))[0][0] ^= 0xFF


class TestQuotaRecords(RecordStoreLaws):
    """With quotas that are never reached, nothing changes."""

    @pytest.fixture
    def store(self) -> OpenStore:
        return lambda _directory, capacity_bytes: QuotaRecords(
            HostRecords(capacity_bytes), {"default": capacity_bytes, "nobody": capacity_bytes}
        )

    @pytest.fixture
    def faults(self) -> Sequence[Fault]:
        return (flip_any,)


def there(store: RecordStore, numbers: Sequence[int]) -> list[int]:
    keys = [sample_key(number) for number in numbers]
    return [number for number, found in zip(numbers, store.contains(keys), strict=True) if found]


@given(
    puts=st.lists(
        st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc"), st.integers(0, 60_000)), min_size=1, max_size=4),
        max_size=12,
    )
)
def test_no_tenant_ever_has_more_than_its_quota(puts: list[list[tuple[int, str, int]]]) -> None:
    """The newest of a tenant stay, unbounded tenants lose nothing, and whatever is there is right."""
    quotas = {"a": 100_000, "b": 200_000}
    with QuotaRecords(HostRecords(16 * MIB), quotas) as store:
        sizes: dict[int, int] = {}
        unbounded = set()
        for put in puts:
            batch = {number: (tenant, size) for number, tenant, size in put if number not in sizes}
            records = [sample_record(number, size, tenant=tenant) for number, (tenant, size) in batch.items()]
            for record, outcome in zip(records, store.put(records), strict=True):
                number = next(number for number in batch if sample_key(number) == record.key)
                assert bool(outcome.reason) == (outcome.state is PutState.REFUSED)
                if outcome.state is PutState.STORED:
                    sizes[number] = record.payload_bytes
                    if record.tenant == "c":
                        unbounded.add(number)
            tenants = store.stats().tenants
            assert all(tenants.get(tenant, 0) <= quota for tenant, quota in quotas.items())
        assert set(there(store, sorted(unbounded))) == unbounded
        for number in there(store, range(31)):
            assert fetch(store, number, sizes[number]) == sample_bytes(number, 0, sizes[number])


def test_the_oldest_of_the_tenant_make_room_and_nobody_else() -> None:
    with QuotaRecords(HostRecords(16 * MIB), {"a": MIB}) as store:
        store.put([sample_record(number, 200_000, tenant="b") for number in (100, 101)])
        store.put([sample_record(number, 200_000, tenant="a") for number in range(3)])
        store.put([sample_record(3, 200_000, tenant="a")])
        for number in (4, 5):
            assert store.put([sample_record(number, 200_000, tenant="a")])[0].state is PutState.STORED

        assert there(store, [*range(6), 100, 101]) == [0, 1, 3, 4, 5, 100, 101], "of a batch the last leaves first"


def test_leased_records_do_not_make_room() -> None:
    with QuotaRecords(HostRecords(16 * MIB), {"a": MIB}) as store:
        store.put([sample_record(number, 300_000, tenant="a") for number in range(3)])
        with store.lease([sample_key(number) for number in range(3)], owner="test", seconds=60):
            (outcome,) = store.put([sample_record(3, 300_000, tenant="a")])
            assert outcome.state is PutState.REFUSED
            assert outcome.reason == "tenant 'a' has a quota of 1.0 MiB, and nothing old enough to go"
            assert there(store, range(4)) == [0, 1, 2]
        assert store.put([sample_record(3, 300_000, tenant="a")])[0].state is PutState.STORED


def test_of_a_batch_beyond_the_quota_the_beginning_is_kept() -> None:
    with QuotaRecords(HostRecords(16 * MIB), {"a": MIB}) as store:
        store.put([sample_record(9, 300_000, tenant="a")])
        outcomes = store.put([sample_record(number, 300_000, tenant="a") for number in range(5)])

        assert [outcome.state.name for outcome in outcomes] == ["STORED"] * 3 + ["REFUSED"] * 2
        assert there(store, range(10)) == [0, 1, 2]


def test_ages_are_known_again_after_opening() -> None:
    with HostRecords(16 * MIB) as records:
        records.put([sample_record(number, 200_000, tenant="a") for number in range(4)])
        store = QuotaRecords(records, {"a": MIB})
        store.put([sample_record(9, 400_000, tenant="a")])

        assert there(store, range(10)) == [1, 2, 3, 9]


def test_what_others_evicted_is_forgotten() -> None:
    with QuotaRecords(HostRecords(MIB), {"a": MIB}) as store:
        for start in range(0, 3000, 10):
            store.put([sample_record(number, 50_000, tenant="a") for number in range(start, start + 10)])
        assert len(store._by_age["a"]) < 1100


def test_read_only_changes_nothing() -> None:
    with HostRecords(MIB) as records:
        records.put([sample_record(1, 1000)])
        store = ReadOnlyRecords(records)

        outcomes = store.put([sample_record(1, 1000), sample_record(2, 1000)])

        assert [outcome.state for outcome in outcomes] == [PutState.EXISTS, PutState.REFUSED]
        assert outcomes[1].reason == "the store was opened read-only"
        assert (store.delete([sample_key(1)]), store.clear()) == (0, 0)
        assert fetch(store, 1, 1000) == sample_bytes(1, 0, 1000)
        assert store.info(sample_key(1)) == records.info(sample_key(1))
