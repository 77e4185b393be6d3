"""Room in a full store: oldest first, what was read stays, leases hold, the capacity is never exceeded."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtier.storage_backends.records import PutState
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
from kvtier.storage_backends.segment.catalog import Catalog
from kvtier.storage_backends.segment.sync import GroupSync
from kvtier.testing.record_samples import physical_bytes, sample_key, sample_record
from kvtier.testing.segment_stores import CAPACITY, MIB, open_store, put, served


def test_the_oldest_go_first(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, *range(400))
        there = store.contains([sample_key(number) for number in range(400)]).tolist()
        assert there == sorted(there), "a younger record went before an older one"
        assert 80 < sum(there) < 160


def test_what_is_read_gets_a_second_chance(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, *range(20))
        for number in range(100, 700):
            put(store, number)
            assert served(store, 7), f"a hot record went when {number} came"
        assert not served(store, 8)
        assert store.info(sample_key(7)).hits > 500  # type: ignore[union-attr]
    with open_store(tmp_path) as store:
        assert served(store, 7)


def test_what_is_carried_on_is_synced_also_in_a_relaxed_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place that it leaves may be the only one on the medium, and the index is told of the new one."""
    steps: list[str] = []

    def noting(step: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            real(*arguments)
            if threading.current_thread() is threading.main_thread():  # the flusher syncs, too
                steps.append(step)

        return call

    with open_store(tmp_path, durability="relaxed") as store:
        put(store, *range(20))
        monkeypatch.setattr(GroupSync, "wait", noting("synced", GroupSync.wait))
        monkeypatch.setattr(Catalog, "move", noting("shown", Catalog.move))
        for number in range(100, 400):
            put(store, number)
            assert served(store, 7)
    moves = [place for place, step in enumerate(steps) if step == "shown"]
    assert moves
    assert all(place and steps[place - 1] == "synced" for place in moves)


def test_reading_everything_does_not_stop_the_progress(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for number in range(300):
            put(store, number)
            store._catalog.table.at["touched"] = 1
        assert served(store, 299)
        assert store.stats().evicted > 100


@pytest.mark.parametrize("durability", ["durable", "relaxed"])
def test_the_capacity_holds_at_every_step(tmp_path: Path, durability: str) -> None:
    """Records of one block each make the index as large as it gets."""
    options = SegmentOptions(capacity=4 * MIB, durability=durability)  # type: ignore[arg-type]
    with SegmentRecords(tmp_path, options) as store:
        for turn in range(60):
            outcomes = store.put([sample_record(1000 * turn + number, 0) for number in range(100)])
            assert {outcome.state for outcome in outcomes} == {PutState.STORED}
            if turn % 7 == 0:
                store.delete([sample_key(1000 * turn + number) for number in range(50)])
            store.flush()
            assert physical_bytes(tmp_path) <= options.capacity
            assert store.held_bytes <= options.capacity
    assert physical_bytes(tmp_path) <= options.capacity


def test_leased_segments_are_passed_over(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, *range(10))
        with store.lease([sample_key(number) for number in range(10)], owner="test", seconds=60) as lease:
            assert len(lease.keys) == 10
            put(store, *range(100, 400))
            assert all(served(store, number) for number in range(10))
            assert store.stats().leased_bytes > 0
        assert store.stats().leased_bytes == 0
        store._catalog.table.at["touched"] = 0
        put(store, *range(400, 800))
        assert not any(served(store, number) for number in range(10))


def test_a_deletion_outlives_its_segment(tmp_path: Path) -> None:
    """The tombstone is carried on as long as the record that it deletes lies in an older segment."""
    with open_store(tmp_path) as store:
        put(store, *range(10))
        lease = store.lease([sample_key(0)], owner="test", seconds=600)
        put(store, *range(100, 130))
        assert store.delete([sample_key(1)]) == 1
        put(store, *range(200, 600))
        assert served(store, 0)
        lease.release()
    (tmp_path / "index.sqlite").unlink()
    with open_store(tmp_path) as store:
        assert store.recovery.rebuilt
        assert served(store, 0)
        assert not served(store, 1), "a deleted record came back"


def test_deleting_works_in_a_store_that_is_full_of_leases(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        leases = []
        for number in range(500):
            (outcome,) = store.put([sample_record(number, 20_000)])
            if outcome.state is PutState.REFUSED:
                assert "leased" in outcome.reason
                break
            leases.append(store.lease([sample_key(number)], owner="test", seconds=600))
        else:
            pytest.fail("a store full of leased records took more")
        assert store.delete([sample_key(5)]) == 1
        for lease in leases:
            lease.release()
        put(store, 1000)
    (tmp_path / "index.sqlite").unlink()
    with open_store(tmp_path) as store:
        assert not store.contains([sample_key(5)])[0]


def test_what_does_not_fit_a_segment_is_refused_with_the_reason(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        outcomes = store.put([sample_record(1, 100), sample_record(2, 1 * MIB), sample_record(3, 100)])
        assert [outcome.state for outcome in outcomes] == [PutState.STORED, PutState.REFUSED, PutState.STORED]
        assert "raise segment_bytes" in outcomes[1].reason


def test_a_call_larger_than_the_store_ends(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        outcomes = store.put([sample_record(number, 100_000) for number in range(120)])
        states = [outcome.state for outcome in outcomes]
        assert PutState.REFUSED in states
        assert states == sorted(states, key=lambda state: state is PutState.REFUSED)
        assert physical_bytes(tmp_path) <= CAPACITY
        put(store, 1000)
