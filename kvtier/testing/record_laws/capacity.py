"""Laws of room: the capacity is hard at every moment, and the counters agree with each other."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from kvtier.storage_backends.records import PutState, RecordStore
from kvtier.testing.record_laws.base import FreshStore, LawsBase, put_all, right_or_missing
from kvtier.testing.record_samples import OpenStore, physical_bytes, sample_key, sample_record

__all__ = ["CapacityLaws"]


class CapacityLaws(LawsBase):
    """Never a byte more than allowed."""

    def test_the_capacity_is_hard_at_every_moment(self, store: OpenStore, tmp_path: Path) -> None:
        """While four threads put three times the capacity, neither the store's count nor the disk's passes it."""
        size = self.capacity_bytes // 48
        directory = tmp_path / "bounded"
        directory.mkdir()
        with (
            store(directory, self.capacity_bytes) as opened,
            _watched(opened, directory) as most,
            ThreadPoolExecutor(4) as pool,
        ):

            def fill(worker: int) -> None:
                for turn in range(12):
                    numbers = [worker * 1000 + turn * 3 + n for n in range(3)]
                    opened.put([sample_record(number, size - 7 * number % 4096) for number in numbers])

            list(pool.map(fill, range(4)))
            assert opened.stats().capacity_bytes <= self.capacity_bytes
            assert opened.stats().stored > 48
        assert most["counted"] <= self.capacity_bytes, "held_bytes passed the capacity"
        assert most["physical"] <= self.capacity_bytes, "the disk held more than the capacity"
        shutil.rmtree(directory)

    def test_old_records_make_room_for_new_ones(self, fresh: FreshStore) -> None:
        """A full store evicts, counts what it evicted, and serves what it says it has."""
        size = self.capacity_bytes // 64
        with fresh() as store:
            for number in range(160):
                assert store.put([sample_record(number, size)])[0].state is PutState.STORED
            stats = store.stats()
            there = store.contains([sample_key(n) for n in range(160)])
            assert stats.evicted > 0
            assert stats.records == int(there.sum()) == stats.stored - stats.evicted
            assert stats.records * size >= self.capacity_bytes // 4, "most of the capacity lies idle"
            assert there[159], "the newest record is gone"
            assert right_or_missing(store, {n: size for n in range(160) if there[n]}) == []

    def test_what_cannot_fit_is_refused(self, fresh: FreshStore) -> None:
        """A record larger than the store is refused with the reason and costs nobody a place."""
        with fresh() as store:
            put_all(store, [sample_record(1, 5000)])
            outcomes = store.put([sample_record(2, self.capacity_bytes + 1), sample_record(3, 5000)])
            assert [outcome.state for outcome in outcomes] == [PutState.REFUSED, PutState.STORED]
            assert outcomes[0].reason
            assert store.stats().refused == 1
            assert right_or_missing(store, {1: 5000, 3: 5000}) == []
            assert not store.contains([sample_key(2)]).any()

    def test_counters_agree_with_each_other(self, fresh: FreshStore) -> None:
        """Records, tenants, live and held bytes after puts, deletes and evictions."""
        size = self.capacity_bytes // 80
        with fresh() as store:
            for number in range(200):
                store.put([sample_record(number, size + number, tenant=f"tenant {number % 3}")])
                if number % 5 == 0:
                    store.delete([sample_key(number // 2)])
                stats = store.stats()
                assert sum(stats.tenants.values()) == stats.live_bytes
                assert stats.live_bytes + stats.dead_bytes <= stats.held_bytes <= stats.capacity_bytes
            scanned = list(store.scan())
            assert stats.records == len(scanned) == int(store.contains([sample_key(n) for n in range(200)]).sum())
            assert stats.live_bytes >= sum(one.payload_bytes for one in scanned)
            assert stats.stored + stats.refused == 200
            assert stats.written_bytes >= stats.stored * size
            assert (stats.damaged, stats.failed, stats.degraded) == (0, 0, "")


@contextmanager
def _watched(store: RecordStore, directory: Path) -> Iterator[dict[str, int]]:
    """Look at the bytes held all the time; the most that were seen."""
    most = {"counted": 0, "physical": 0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            most["counted"] = max(most["counted"], store.stats().held_bytes)
            most["physical"] = max(most["physical"], physical_bytes(directory))

    watcher = threading.Thread(target=watch, name="watcher")
    watcher.start()
    try:
        yield most
    finally:
        stop.set()
        watcher.join()
