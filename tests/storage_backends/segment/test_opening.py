"""Opening a segment directory: with a good index, an old one, none, and whatever else may lie there."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.errors import ConfigError, StorageError, StoreInUseError
from kvtier.storage_backends.records import PutState
from kvtier.storage_backends.segment import DirectoryLock, SegmentOptions, SegmentRecords, options_of
from kvtier.storage_backends.segment.index import SegmentIndex
from kvtier.testing.record_samples import fetch, physical_bytes, sample_key, sample_record
from kvtier.testing.segment_stores import CAPACITY, MIB, SIZE, open_store, put, served


def filled(directory: Path) -> None:
    """A store of 20 records, two of them deleted, closed."""
    with open_store(directory) as store:
        put(store, *range(20))
        assert store.delete([sample_key(3), sample_key(4)]) == 2


def keep_as_behind(directory: Path) -> None:
    """Copy the index as it is at the start of the next opening: it says that more may follow."""
    old = directory / "old"
    old.mkdir()
    shutil.copy(directory / "index.sqlite", old)
    index = SegmentIndex(old, SegmentOptions(capacity=CAPACITY).geometry())
    contents = index.load({})
    assert contents is not None
    index.begin(contents.store)
    index.close()


def check(directory: Path, *, rebuilt: bool) -> None:
    with open_store(directory) as store:
        assert store.recovery.rebuilt is rebuilt
        assert [served(store, number) for number in range(20)] == [number not in (3, 4) for number in range(20)]
        put(store, 100)
    with open_store(directory) as store:
        assert not store.recovery.rebuilt
        assert store.recovery.scanned_bytes == 0, "a store that was closed well has nothing to look through"
        assert served(store, 100)
        assert not served(store, 3)


def test_a_good_index_is_enough(tmp_path: Path) -> None:
    filled(tmp_path)
    check(tmp_path, rebuilt=False)


def test_without_an_index_everything_is_found(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "index.sqlite").unlink()
    check(tmp_path, rebuilt=True)


@pytest.mark.parametrize("damage", ["noise", "truncated", "empty", "other", "row"])
def test_a_damaged_index_is_rebuilt(tmp_path: Path, damage: str) -> None:
    filled(tmp_path)
    index = tmp_path / "index.sqlite"
    match damage:
        case "noise":
            index.write_bytes(os.urandom(40_000))
        case "truncated":
            os.truncate(index, index.stat().st_size // 2)
        case "empty":
            index.write_bytes(b"")
        case "other":
            index.unlink()
            with sqlite3.connect(index) as database:
                database.execute("CREATE TABLE something(else_)")
            database.close()
        case "row":
            with sqlite3.connect(index) as database:
                database.execute("UPDATE packs SET rows = zeroblob(length(rows)) WHERE id = 1")
            database.close()
    check(tmp_path, rebuilt=True)


@pytest.mark.parametrize("table", ["store", "segments", "names", "packs", "graves"])
def test_an_index_that_lacks_a_row_is_not_believed(tmp_path: Path, table: str) -> None:
    """Rows that went together with their digests, as when a page of the database is lost."""
    filled(tmp_path)
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        database.execute(f"DELETE FROM {table}")  # noqa: S608 - names from above
    database.close()
    check(tmp_path, rebuilt=True)


def test_the_index_of_another_store_is_not_believed(tmp_path: Path) -> None:
    filled(tmp_path / "one")
    with open_store(tmp_path / "two") as store:
        put(store, *range(20, 40))
    shutil.copy(tmp_path / "two" / "index.sqlite", tmp_path / "one" / "index.sqlite")
    check(tmp_path / "one", rebuilt=True)


def test_segments_of_another_store_hold_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path / "one") as store:
        put(store, *range(40))
    with open_store(tmp_path / "two") as store:
        put(store, 50)
    shutil.copy(tmp_path / "two" / "segment-00000001.kvt", tmp_path / "one" / "segment-00000009.kvt")
    with open_store(tmp_path / "one") as store:
        assert all(served(store, number) for number in range(40))
        assert not served(store, 50)


def test_an_old_index_does_not_hide_or_revive(tmp_path: Path) -> None:
    """What happened after the index was written is found by looking through the segments."""
    with open_store(tmp_path) as store:
        put(store, *range(10))
    keep_as_behind(tmp_path)
    with open_store(tmp_path) as store:
        store.delete([sample_key(number) for number in range(5)])
        put(store, 0, generation=1)
        put(store, *range(10, 15))
    shutil.move(tmp_path / "old" / "index.sqlite", tmp_path / "index.sqlite")
    with open_store(tmp_path) as store:
        assert not store.recovery.rebuilt
        assert store.recovery.scanned > 0
        assert served(store, 0, generation=1)
        assert [served(store, number) for number in range(1, 15)] == [False] * 4 + [True] * 10


def test_what_was_deleted_behind_a_newer_record_stays_deleted_when_that_is_evicted(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, *range(10))
    keep_as_behind(tmp_path)
    with open_store(tmp_path) as store:
        store.delete([sample_key(0)])
        put(store, *range(100, 120))
        put(store, 0, generation=1)
    shutil.move(tmp_path / "old" / "index.sqlite", tmp_path / "index.sqlite")
    with open_store(tmp_path) as store:
        assert store.contains([sample_key(0)]).all()  # not read: what was read is carried on
        with store.lease([sample_key(5)], owner="test", seconds=600):  # the first segment stays, the second goes
            put(store, *range(200, 340))
            assert served(store, 5)
            assert not store.contains([sample_key(0)]).any()
    with open_store(tmp_path) as store:
        assert not store.recovery.rebuilt
        assert fetch(store, 0, SIZE) is None, "a deleted record is back"


def test_an_index_from_before_a_segment_was_used_again_is_not_believed(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, *range(10))
    keep_as_behind(tmp_path)
    with open_store(tmp_path) as store:
        put(store, *range(100, 400))
        assert not store.contains([sample_key(0)])[0]
        kept = [number for number in range(100, 400) if store.contains([sample_key(number)])[0]]
    shutil.move(tmp_path / "old" / "index.sqlite", tmp_path / "index.sqlite")
    with open_store(tmp_path) as store:
        assert not any(served(store, number) for number in range(10)), "a record of an earlier life came back"
        assert all(served(store, number) for number in kept)


def test_rebuilding_tells_how_far_it_is(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "index.sqlite").unlink()
    told: list[tuple[int, int]] = []
    options = SegmentOptions(capacity=CAPACITY)
    with SegmentRecords(tmp_path, options, progress=lambda done, total: told.append((done, total))):
        assert told[-1][0] == told[-1][1] > 0
        assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_smaller_capacity_drops_the_oldest(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, *range(110))
    with open_store(tmp_path, capacity=5 * MIB) as store:
        assert physical_bytes(tmp_path) <= 5 * MIB
        assert served(store, 109)
        assert not served(store, 0)
        assert store.stats().evicted > 0


def test_another_segment_size_is_taken_over_little_by_little(tmp_path: Path) -> None:
    filled(tmp_path)
    with SegmentRecords(tmp_path, SegmentOptions(capacity=CAPACITY, segment_bytes=512 << 10)) as store:
        assert served(store, 0)
        for number in range(100, 400):
            put(store, number)
            assert physical_bytes(tmp_path) <= CAPACITY
        assert {segment.size for segment in store._pool.segments.values()} == {512 << 10}


HOLDER = """
import sys
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
with SegmentRecords(sys.argv[1], SegmentOptions(capacity=8 << 20)):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            for read_only in (False, True):
                with pytest.raises(StoreInUseError, match=f"held by process {holder.pid} on .* since 20"):
                    open_store(tmp_path, read_only=read_only)
        finally:
            holder.communicate(timeout=60)
    with open_store(tmp_path):
        pass


def test_a_lock_file_of_nonsense_is_only_a_worse_message(tmp_path: Path) -> None:
    with open_store(tmp_path):
        (tmp_path / "lock").write_text(json.dumps(["nonsense"]))
        with pytest.raises(StoreInUseError, match="held by another process"):
            DirectoryLock(tmp_path, shared=False)


def test_reading_only_writes_nothing(tmp_path: Path) -> None:
    filled(tmp_path)

    def snapshot() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.iterdir()}

    before = snapshot()
    with open_store(tmp_path, read_only=True) as store, open_store(tmp_path, read_only=True) as other:
        assert all(served(reader, 7) for reader in (store, other))
        (outcome,) = store.put([sample_record(50, 100)])
        assert outcome.state is PutState.REFUSED
        assert "reading only" in outcome.reason
        assert "reading only" in store.stats().degraded
        assert store.delete([sample_key(7)]) == 0
        assert store.verify().clean
        with pytest.raises(StorageError, match="reading only"):
            store.rewrite_index()
        with pytest.raises(StoreInUseError):
            open_store(tmp_path)
    assert snapshot() == before


def test_a_directory_is_opened_without_its_settings(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        put(store, *range(200))
        kept = store.stats().records
    with SegmentRecords(tmp_path, options_of(tmp_path)) as store:
        assert store.stats().records == kept
        store.verify()
        store.rewrite_index()
    with open_store(tmp_path) as store:
        assert store.stats().records == kept
    with pytest.raises(StorageError, match="is the path right"):
        options_of(tmp_path / "missing")
    (tmp_path / "other").mkdir()
    with pytest.raises(StorageError, match="got no segment"):
        options_of(tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": MIB // 2}, "give at least"),
        ({"capacity": CAPACITY, "segment_bytes": 1000}, "segment_bytes must be at least"),
        ({"capacity": CAPACITY, "durability": "perhaps"}, "durability must be"),
        ({"capacity": CAPACITY, "extent_bytes": 5000}, "extent_bytes must be"),
        ({"capacity": CAPACITY, "sync_seconds": 0}, "must be above 0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SegmentRecords(tmp_path / "new", SegmentOptions(**settings))  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_directory_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another directory"):
        open_store(tmp_path / "file")
    with pytest.raises(StorageError, match="is it a segment directory"):
        open_store(tmp_path, read_only=True)
