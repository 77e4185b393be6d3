"""Laws of a record's life: visible, unchangeable, deleted for good, closed."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from kvtier.storage_backends.records import MAX_META_BYTES, MAX_TENANT_BYTES, PutState
from kvtier.testing.record_laws.base import LAW, FreshStore, LawsBase, put_all, right_or_missing
from kvtier.testing.record_samples import NAMESPACE, fetch, sample_bytes, sample_key, sample_record

__all__ = ["LifetimeLaws"]

_TENANTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=16).filter(
    lambda name: len(name.encode()) <= MAX_TENANT_BYTES
)


class LifetimeLaws(LawsBase):
    """From `put` to `delete`."""

    def test_a_record_never_changes(self, fresh: FreshStore) -> None:
        """A key that exists is left as it is, in another call or in the same one."""
        with fresh() as store:
            put_all(store, [sample_record(1, 9000, tenant="first", meta=b"first")])
            again = store.put([sample_record(1, 500, generation=1, tenant="second"), sample_record(2, 10)])
            assert [outcome.state for outcome in again] == [PutState.EXISTS, PutState.STORED]
            twice = store.put([sample_record(3, 100), sample_record(3, 100, generation=1)])
            assert [outcome.state for outcome in twice] == [PutState.STORED, PutState.EXISTS]
            assert right_or_missing(store, {1: 9000, 2: 10, 3: 100}) == []
            info = store.info(sample_key(1))
            assert info is not None
            assert (info.tenant, info.meta, info.payload_bytes) == ("first", b"first", 9000)
            assert (store.stats().records, store.stats().stored) == (3, 3)

    @LAW
    @given(tenant=_TENANTS, meta=st.binary(max_size=MAX_META_BYTES), size=st.integers(0, 10_000))
    def test_what_is_known_of_a_record_is_what_was_put(
        self, fresh: FreshStore, tenant: str, meta: bytes, size: int
    ) -> None:
        """Key, namespace, tenant, metadata and size come back from `info` and `scan`."""
        with fresh() as store:
            start = time.time()
            put_all(store, [sample_record(4, size, tenant=tenant, meta=meta)])
            info = store.info(sample_key(4))
            assert info is not None
            assert (info.key, info.namespace, info.tenant) == (sample_key(4), NAMESPACE, tenant)
            assert (info.meta, info.payload_bytes) == (meta, size)
            assert start - 1 <= info.created <= time.time() + 1
            assert [one.key for one in store.scan()] == [info.key]
            assert store.info(sample_key(5)) is None
            assert set(store.stats().tenants) == {tenant}

    def test_scan_is_in_the_order_of_storing(self, fresh: FreshStore) -> None:
        """Sequence numbers ascend; a record that was put again is new."""
        with fresh() as store:
            for first in range(0, 30, 3):
                put_all(store, [sample_record(n, 3000) for n in range(first, first + 3)])
            store.delete([sample_key(4)])
            put_all(store, [sample_record(4, 3000, generation=1)])
            scanned = list(store.scan())
            assert [one.key for one in scanned] == [sample_key(n) for n in [0, 1, 2, 3, *range(5, 30), 4]]
            sequences = [one.sequence for one in scanned]
            assert sequences == sorted(set(sequences))

    def test_what_is_deleted_is_gone(self, fresh: FreshStore) -> None:
        """Deletion counts what was there, leased or not; the key may be put again, with other bytes."""
        with fresh() as store:
            put_all(store, [sample_record(n, 6000) for n in range(6)])
            with store.lease([sample_key(2)], owner="reader", seconds=600):
                assert store.delete([sample_key(n) for n in (0, 2, 99, 2)]) == 2
                assert store.contains([sample_key(n) for n in range(4)]).tolist() == [False, True, False, True]
                assert (fetch(store, 0, 6000), fetch(store, 2, 6000)) == (None, None)
                assert store.info(sample_key(2)) is None
            assert store.stats().leased_bytes == 0
            assert store.stats().records == 4
            assert store.delete([sample_key(0)]) == 0
            put_all(store, [sample_record(0, 7001, generation=1)])
            assert fetch(store, 0, 7001) == sample_bytes(0, 1, 7001)
            assert right_or_missing(store, {1: 6000, 3: 6000, 4: 6000, 5: 6000}) == []

    def test_clear_forgets_one_tenant_or_all(self, fresh: FreshStore) -> None:
        """`clear` counts, and leaves the other tenants alone."""
        with fresh() as store:
            for number in range(12):
                put_all(store, [sample_record(number, 4000, tenant="abc"[number % 3])])
            held = store.stats().tenants
            assert set(held) == {"a", "b", "c"}
            assert held["a"] == held["b"] == held["c"] >= 4 * 4000
            assert store.clear("nobody") == 0
            assert store.clear("b") == 4
            assert store.contains([sample_key(n) for n in range(12)]).tolist() == [n % 3 != 1 for n in range(12)]
            assert not store.stats().tenants.get("b", 0)
            assert store.clear() == 8
            assert (store.stats().records, store.stats().live_bytes) == (0, 0)
            put_all(store, [sample_record(1, 4000, generation=1, tenant="b")])
            assert fetch(store, 1, 4000) == sample_bytes(1, 1, 4000)

    def test_close_is_idempotent_and_final(self, fresh: FreshStore) -> None:
        """After `close` everything misses and is refused; nothing raises."""
        with fresh() as store:
            put_all(store, [sample_record(1, 4000)])
            lease = store.lease([sample_key(1)], owner="reader", seconds=600)
            store.close()
            store.close()
            (outcome,) = store.put([sample_record(2, 4000)])
            assert outcome.state is PutState.REFUSED
            assert outcome.reason
            assert fetch(store, 1, 4000) is None
            assert not store.contains([sample_key(1)]).any()
            assert (store.info(sample_key(1)), list(store.scan())) == (None, [])
            assert (store.delete([sample_key(1)]), store.clear()) == (0, 0)
            assert store.lease([sample_key(1)], owner="late", seconds=1).keys == ()
            lease.release()
            store.flush()
            assert store.stats().leased_bytes == 0
