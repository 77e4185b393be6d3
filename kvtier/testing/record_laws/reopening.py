"""Laws of stores that outlive the process: opening again finds everything that was acknowledged."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError, KVTierError, StorageError
from kvtier.storage_backends.records import RecordStats, RecordStore
from kvtier.testing.record_laws.base import LAW, LawsBase, put_all, right_or_missing
from kvtier.testing.record_samples import OpenStore, fetch, physical_bytes, sample_bytes, sample_key, sample_record

__all__ = ["ReopeningLaws"]


class ReopeningLaws(LawsBase):
    """Close, open, compare."""

    def test_opening_again_finds_everything(self, persistent: OpenStore, tmp_path: Path) -> None:
        """Bytes, metadata, tenants, order and counts are those before `close`; new records come after the old."""
        sizes = {n: (1, 4096, 70_001, 300)[n % 4] for n in range(40)}
        with persistent(tmp_path, self.capacity_bytes) as store:
            for first in range(0, 40, 4):
                put_all(
                    store,
                    [sample_record(n, sizes[n], tenant=f"t{n % 3}", meta=b"%d" % n) for n in range(first, first + 4)],
                )
            before = list(store.scan()), _now(store.stats())
        for _ in range(3):
            with persistent(tmp_path, self.capacity_bytes) as store:
                assert [one.key for one in store.scan()] == [one.key for one in before[0]]
                assert [(one.tenant, one.meta, one.payload_bytes, one.sequence) for one in store.scan()] == [
                    (one.tenant, one.meta, one.payload_bytes, one.sequence) for one in before[0]
                ]
                assert _now(store.stats()) == before[1]
                assert right_or_missing(store, sizes) == []
        with persistent(tmp_path, self.capacity_bytes) as store:
            put_all(store, [sample_record(99, 10)])
            *_, last = store.scan()
            assert last.key == sample_key(99)
            assert last.sequence > before[0][-1].sequence

    @LAW
    @given(data=st.data())
    def test_what_was_deleted_stays_deleted(self, persistent: OpenStore, tmp_path: Path, data: st.DataObject) -> None:
        """Deleted, cleared and replaced records do not come back, however often the store is opened."""
        numbers = st.integers(0, 7)
        alive: dict[int, int] = {}
        generation = 0
        with persistent(tmp_path, self.capacity_bytes) as store:
            store.clear()  # an example that was broken off leaves its records
        for _ in range(3):
            with persistent(tmp_path, self.capacity_bytes) as store:
                store.clear(data.draw(st.sampled_from(["default", "nobody"]), label="clear"))
                alive = {n: g for n, g in alive.items() if store.contains([sample_key(n)])[0]}
                for number in data.draw(st.lists(numbers, max_size=10), label="put or delete"):
                    generation += 1
                    if number in alive:
                        assert store.delete([sample_key(number)]) == 1
                        del alive[number]
                    else:
                        put_all(store, [sample_record(number, 5000, generation=generation)])
                        alive[number] = generation
            with persistent(tmp_path, self.capacity_bytes) as store:
                for number in range(8):
                    expected = sample_bytes(number, alive[number], 5000) if number in alive else None
                    assert fetch(store, number, 5000) == expected

    def test_a_full_store_opens_again_within_its_capacity(self, persistent: OpenStore, tmp_path: Path) -> None:
        """What survived eviction survives closing, and the bound still holds when puts go on."""
        size = self.capacity_bytes // 64
        numbers = iter(range(10_000))
        for _ in range(3):
            with persistent(tmp_path, self.capacity_bytes) as store:
                for _ in range(80):
                    store.put([sample_record(next(numbers), size)])
                    assert physical_bytes(tmp_path) <= self.capacity_bytes
                there = [one.key for one in store.scan()]
            with persistent(tmp_path, self.capacity_bytes) as store:
                assert [one.key for one in store.scan()] == there
                assert right_or_missing(store, {n: size for n in range(240) if sample_key(n) in set(there)}) == []

    def test_a_smaller_capacity_is_kept_or_refused(self, persistent: OpenStore, tmp_path: Path) -> None:
        """Opened with half the room, a full store drops records, or says that it cannot: it never stays too large."""
        size, half = self.capacity_bytes // 64, self.capacity_bytes // 2
        with persistent(tmp_path, self.capacity_bytes) as store:
            for number in range(80):
                store.put([sample_record(number, size)])
        smaller = _opened_or_refusal(persistent, tmp_path, half)
        if isinstance(smaller, ConfigError):
            assert "capacity" in str(smaller)
            return
        assert isinstance(smaller, RecordStore), smaller
        with smaller as store:
            for number in range(80, 90):
                store.put([sample_record(number, size)])
            assert physical_bytes(tmp_path) <= half
            assert store.stats().held_bytes <= half
            there = store.contains([sample_key(n) for n in range(90)])
            assert there[89]
            assert right_or_missing(store, {n: size for n in range(90) if there[n]}) == []

    def test_a_second_opening_is_refused_or_right(self, persistent: OpenStore, tmp_path: Path) -> None:
        """A directory in use says so, and naming it costs the first user nothing; or both serve right bytes."""
        with persistent(tmp_path, self.capacity_bytes) as first:
            put_all(first, [sample_record(n, 9000) for n in range(4)])
            second = _opened_or_refusal(persistent, tmp_path, self.capacity_bytes)
            if isinstance(second, KVTierError):
                assert isinstance(second, StorageError)
                assert str(tmp_path) in str(second), "the message must name the directory"
            else:
                with second:
                    second.put([sample_record(n, 9000) for n in range(2, 6)])
                    right_or_missing(second, dict.fromkeys(range(6), 9000))
            put_all(first, [sample_record(n, 9000) for n in range(6, 8)])
            assert right_or_missing(first, dict.fromkeys([0, 1, 2, 3, 6, 7], 9000)) == []


def _opened_or_refusal(opens: OpenStore, directory: Path, capacity_bytes: int) -> RecordStore | KVTierError:
    """The store, or why it did not open."""
    try:
        return opens(directory, capacity_bytes)
    except KVTierError as refusal:
        return refusal


def _now(stats: RecordStats) -> tuple[int, int, dict[str, int]]:
    """What of the counters belongs to the records, not to the run."""
    return stats.records, stats.live_bytes, stats.tenants
