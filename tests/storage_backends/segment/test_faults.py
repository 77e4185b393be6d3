"""A medium that fails under a segment store: refused, counted, never wrong, and well again afterwards."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.storage_backends.engines import PosixEngine
from kvtier.storage_backends.records import ByteRange, PutState
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
from kvtier.storage_backends.segment.flusher import Flusher
from kvtier.storage_backends.segment.sync import GroupSync
from kvtier.testing.faults import FaultyEngine, ReadFault, WriteFault
from kvtier.testing.record_samples import fetch, sample_key, sample_record
from kvtier.testing.segment_stores import CAPACITY, open_store, put, served


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine(PosixEngine(threads=2)) as faulty:
        yield faulty


@pytest.fixture
def store(tmp_path: Path, engine: FaultyEngine) -> Iterator[SegmentRecords]:
    with open_store(tmp_path, engine=engine) as opened:
        yield opened
        engine.repair()


def test_a_full_disk_refuses_and_recovers(store: SegmentRecords, engine: FaultyEngine) -> None:
    put(store, *range(5))
    engine.fill_disk()
    outcomes = [store.put([sample_record(number, 50_000)])[0] for number in range(10, 60)]
    refused = [outcome for outcome in outcomes if outcome.state is PutState.REFUSED]
    assert refused
    assert "No space left" in refused[0].reason
    assert "No space left" in store.stats().degraded
    assert store.stats().refused == len(refused)
    assert all(served(store, number) for number in range(5)), "a full disk made room out of what was there"

    engine.repair()
    put(store, *range(100, 150))
    assert store.stats().degraded == ""


@pytest.mark.parametrize("fault", [WriteFault.ERROR])
def test_a_failed_write_is_refused_and_not_visible(
    store: SegmentRecords, engine: FaultyEngine, fault: WriteFault
) -> None:
    put(store, 1)
    engine.on_write(fault)
    (outcome,) = store.put([sample_record(2, 50_000)])
    assert outcome.state is PutState.REFUSED
    assert "Input/output error" in outcome.reason
    assert "Input/output error" in store.stats().degraded
    assert not store.contains([sample_key(2)])[0]
    put(store, 2, 3)
    assert store.stats().degraded == ""
    assert all(served(store, number) for number in (1, 2, 3))


def test_a_sync_that_fails_is_a_refusal(store: SegmentRecords, engine: FaultyEngine) -> None:
    put(store, 1)
    engine.fail_syncs()
    (outcome,) = store.put([sample_record(2, 50_000)])
    assert outcome.state is PutState.REFUSED
    assert not store.contains([sample_key(2)])[0]
    put(store, 2)
    assert served(store, 2)


@pytest.mark.parametrize("fault", [WriteFault.LOST, WriteFault.TORN, WriteFault.MISPLACED])
@pytest.mark.parametrize(("size", "nth"), [(50_000, 1), (300_000, 1), (300_000, 2), (300_000, 3)])
def test_a_lie_of_the_disk_is_a_miss(
    store: SegmentRecords, engine: FaultyEngine, fault: WriteFault, size: int, nth: int
) -> None:
    """A small record is one transfer; a large one its payload, the end of that in a block of its own, its header."""
    put(store, 1)
    engine.on_write(fault, nth)
    put(store, 2, size=size)
    store._journal.headers.forget((1, store._pool.segments[1].epoch, 4096 + 57_344))
    assert not served(store, 2, size)
    assert not store.contains([sample_key(2)])[0], "a damaged record is still claimed"
    assert store.stats().damaged == 1
    put(store, 2, size=size)
    assert served(store, 2, size)


@pytest.mark.parametrize("size", [50_000, 300_000])
def test_a_failed_write_of_many_is_that_of_one_record(
    tmp_path: Path, store: SegmentRecords, engine: FaultyEngine, size: int
) -> None:
    put(store, 9, size=1000)
    transfers = 1 if size == 50_000 else 3
    engine.on_write(WriteFault.ERROR, nth=transfers + 1)
    outcomes = store.put([sample_record(number, size) for number in range(3)])
    assert [outcome.state for outcome in outcomes] == [PutState.STORED, PutState.REFUSED, PutState.STORED]
    assert [served(store, number, size) for number in range(3)] == [True, False, True]
    put(store, 1, size=size)
    store.close()
    with open_store(tmp_path, engine=engine) as reopened:
        assert all(served(reopened, number, size) for number in range(3))


@pytest.mark.parametrize("fault", [ReadFault.FLIP, ReadFault.SHORT, ReadFault.STALE, ReadFault.ERROR])
@pytest.mark.parametrize("ranges", [None, [ByteRange(1000, 30_000)]])
def test_a_read_that_goes_wrong_is_a_miss(
    store: SegmentRecords, engine: FaultyEngine, fault: ReadFault, ranges: list[ByteRange] | None
) -> None:
    put(store, 1, 2)
    engine.on_read(fault)
    assert fetch(store, 1, 50_000, ranges) is None
    assert not store.contains([sample_key(1)])[0]
    stats = store.stats()
    assert (stats.damaged, stats.failed) == ((0, 1) if fault is ReadFault.ERROR else (1, 0))
    assert served(store, 2)


def test_a_broken_disk_ends_nothing_but_itself(store: SegmentRecords, engine: FaultyEngine) -> None:
    put(store, *range(10))
    engine.break_disk()
    assert not served(store, 0)
    assert store.put([sample_record(100, 1000)])[0].state is PutState.REFUSED
    assert store.delete([sample_key(5)]) == 1
    store.flush()
    assert store.stats().degraded
    engine.repair()
    assert served(store, 9)
    put(store, 100)
    assert not store.contains([sample_key(5)])[0]


def test_damage_is_found_by_verify_and_stays_out(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, *range(10))
    with (tmp_path / "segment-00000001.kvt").open("r+b") as file:
        file.seek(4096 + 57_344 + 4096 + 20_000)  # in the payload of the second record
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    with open_store(tmp_path) as store:
        report = store.verify()
        assert report.damaged == (sample_key(1),)
        assert report.records == 10
        assert not report.clean
        assert store.verify().clean, "what is damaged was to be put aside"
    with open_store(tmp_path) as store:
        assert not store.contains([sample_key(1)])[0]
        assert store.verify().records == 9
    (tmp_path / "index.sqlite").unlink()
    with open_store(tmp_path) as store:
        assert store.recovery.torn == 1
        assert not store.contains([sample_key(1)])[0]


def test_relaxed_puts_are_synced_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    synced = threading.Event()
    real = GroupSync.wait

    def noted(self: GroupSync) -> None:
        threads.append(threading.current_thread().name)
        real(self)
        synced.set()

    options = SegmentOptions(
        capacity=CAPACITY, durability="relaxed", sync_bytes=200_000, sync_seconds=3600, index_seconds=3600
    )
    with SegmentRecords(tmp_path, options) as store:
        monkeypatch.setattr(GroupSync, "wait", noted)
        put(store, 1)
        assert threads == [], "not a half of the bound is waiting"
        put(store, 2)
        assert synced.wait(30), "half of the bound is waiting and nobody synced it"
        assert threads == ["kvtier-flush"]


def test_relaxed_puts_are_synced_within_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flusher, "_run", lambda _: None)  # nobody syncs in the background
    synced: list[int] = []
    real = GroupSync.wait

    def counted(self: GroupSync) -> None:
        synced.append(1)
        real(self)

    options = SegmentOptions(
        capacity=CAPACITY, durability="relaxed", sync_bytes=200_000, sync_seconds=3600, index_seconds=3600
    )
    with SegmentRecords(tmp_path, options) as store:
        monkeypatch.setattr(GroupSync, "wait", counted)
        put(store, 1, 2, 3)
        assert synced == []
        put(store, 4)
        assert synced == [1], "200 KB are waiting and nobody synced them"
        put(store, 5, 6, 7)
        assert synced == [1]
        put(store, 8)
        assert synced == [1, 1]


def test_puts_that_wait_at_the_same_time_share_a_sync() -> None:
    begun, go_on = threading.Event(), threading.Event()
    syncs: list[int] = []

    def slow() -> None:
        syncs.append(1)
        begun.set()
        assert go_on.wait(30)

    group = GroupSync(slow)
    first = threading.Thread(target=group.wait)
    first.start()
    assert begun.wait(30)
    others = [threading.Thread(target=group.wait) for _ in range(8)]
    for thread in others:
        thread.start()
    while len(group._changed._waiters) < 8:  # type: ignore[attr-defined]
        time.sleep(0.001)
    go_on.set()
    for thread in [first, *others]:
        thread.join(30)
    assert len(syncs) == 2, "those that came after the first sync had begun need another one, and one is enough"


def test_a_sync_that_fails_fails_for_all_who_waited_for_it() -> None:
    errors = iter([OSError(5, "Input/output error")])

    def fails_once() -> None:
        for error in errors:
            raise error

    group = GroupSync(fails_once)
    with pytest.raises(OSError, match="Input/output error"):
        group.wait()
    group.wait()
