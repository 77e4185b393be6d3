"""Laws of leases: an owner, a deadline, and nothing pinned once all are released."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import time

from kvtier.storage_backends.records import PutState
from kvtier.testing.record_laws.base import FreshStore, LawsBase, put_all, right_or_missing
from kvtier.testing.record_samples import sample_key, sample_record

__all__ = ["LeaseLaws"]

_PATIENCE_S = 30


class LeaseLaws(LawsBase):
    """What a lease keeps, and when it stops."""

    def test_a_lease_names_what_was_there(self, fresh: FreshStore) -> None:
        """Keys in the order asked for, without those that do not exist; owner and deadline as given."""
        with fresh() as store:
            put_all(store, [sample_record(n, 10_000) for n in range(4)])
            start = time.monotonic()
            with store.lease([sample_key(n) for n in (3, 9, 0)], owner="request 17", seconds=60) as lease:
                assert lease.keys == (sample_key(3), sample_key(0))
                assert lease.owner == "request 17"
                assert start + 60 <= lease.deadline <= time.monotonic() + 60
                assert not lease.expired
                assert store.stats().leased_bytes >= 20_000
            assert store.stats().leased_bytes == 0

    def test_all_leases_released_pin_nothing(self, fresh: FreshStore) -> None:
        """Leases over one record count its bytes once; each is released once, however often it is called."""
        with fresh() as store:
            put_all(store, [sample_record(n, 10_000) for n in range(4)])
            one = store.lease([sample_key(n) for n in (0, 1)], owner="one", seconds=600)
            only = store.stats().leased_bytes
            two = store.lease([sample_key(n) for n in (1, 2, 1)], owner="two", seconds=600)
            assert only < store.stats().leased_bytes < 2 * only
            one.release()
            one.release()
            assert store.stats().leased_bytes == only, "a second release took another's lease, or none was released"
            two.release()
            assert store.stats().leased_bytes == 0

    def test_a_lease_runs_out(self, fresh: FreshStore) -> None:
        """Nobody pins for ever: past the deadline nothing is leased, and a late release does nothing."""
        with fresh() as store:
            put_all(store, [sample_record(n, 10_000) for n in range(2)])
            short = store.lease([sample_key(0), sample_key(1)], owner="forgetful", seconds=0.05)
            long = store.lease([sample_key(1)], owner="reader", seconds=600)
            end = time.monotonic() + _PATIENCE_S
            both = store.stats().leased_bytes
            while not short.expired and time.monotonic() < end:
                time.sleep(0.01)
            one = store.stats().leased_bytes
            assert 0 < one < max(both, 2 * 10_000), "an expired lease still counts, or took another's bytes with it"
            short.release()
            assert store.stats().leased_bytes == one
            long.release()
            assert store.stats().leased_bytes == 0

    def test_eviction_never_touches_a_leased_record(self, fresh: FreshStore) -> None:
        """The capacity passes through three times; what is leased stays, whatever its age."""
        size = self.capacity_bytes // 64
        with fresh() as store:
            put_all(store, [sample_record(n, size) for n in range(8)])
            leased = (0, 3, 7)
            with store.lease([sample_key(n) for n in leased], owner="reader", seconds=600) as lease:
                assert len(lease.keys) == len(leased)
                for number in range(8, 200):
                    store.put([sample_record(number, size)])
                assert store.stats().evicted > 0
                assert store.contains(lease.keys).all(), "a leased record was evicted"
                assert right_or_missing(store, dict.fromkeys(leased, size)) == []
            assert store.stats().leased_bytes == 0

    def test_a_store_full_of_leases_refuses_and_recovers(self, fresh: FreshStore) -> None:
        """With everything leased a put is refused, with the reason; released, there is room again."""
        size = self.capacity_bytes // 32
        with fresh() as store:
            leases, kept = [], []
            for number in range(64):
                if store.put([sample_record(number, size)])[0].state is PutState.STORED:
                    lease = store.lease([sample_key(number)], owner="hoarder", seconds=600)
                    assert len(lease.keys) == 1, "a record was evicted the moment it was stored"
                    leases.append(lease)
                    kept.append(number)
            assert 0 < len(kept) < 64
            before = store.stats()
            (outcome,) = store.put([sample_record(99, size)])
            assert outcome.state is PutState.REFUSED
            assert outcome.reason
            assert store.stats().refused == before.refused + 1
            assert right_or_missing(store, dict.fromkeys(kept, size)) == []
            for lease in leases:
                lease.release()
            assert store.stats().leased_bytes == 0
            assert store.put([sample_record(99, size)])[0].state is PutState.STORED
            assert right_or_missing(store, {99: size}) == []
