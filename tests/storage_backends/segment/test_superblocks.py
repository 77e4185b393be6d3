"""Damaged superblocks: nothing is lost where the other or the index proves the life; no earlier life ever returns."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.errors import StorageError
from kvtier.record import SUPERBLOCK_BYTES, SegmentKind, parse_superblock, sealed
from kvtier.storage_backends.engines import PosixEngine
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
from kvtier.storage_backends.segment.index import SegmentIndex
from kvtier.storage_backends.segment.options import Durability
from kvtier.storage_backends.segment.pool import SegmentPool
from kvtier.storage_backends.segment.superblocks import judge, read_superblocks
from kvtier.testing.record_samples import sample_key
from kvtier.testing.segment_stores import CAPACITY, open_store, put, served

RECORDS = range(50)  # three segments of 1 MiB
DELETED = (3, 30)


def filled(directory: Path, durability: Durability = "durable") -> list[Path]:
    """A closed store whose last segment is appended to; its segments."""
    with open_store(directory, durability=durability) as store:
        put(store, *RECORDS)
        store.delete([sample_key(number) for number in DELETED])
    segments = sorted(directory.glob("segment-*.kvt"))
    assert len(segments) == 3
    return segments


def write(path: Path, at: int, data: bytes) -> None:
    """Put bytes into a file; ``at`` counts from the end where it is below 0."""
    with path.open("r+b") as file:
        file.seek(at, 2 if at < 0 else 0)
        file.write(data)


def block(path: Path, at: int) -> bytes:
    return path.read_bytes()[at:][:SUPERBLOCK_BYTES]


def flip(path: Path, at: int) -> None:
    write(path, at, bytes([path.read_bytes()[at] ^ 0x10]))


def without_copies(directory: Path) -> None:
    """Make segments as releases from before the copy wrote them."""
    for path in directory.glob("segment-*.kvt"):
        write(path, -SUPERBLOCK_BYTES, bytes(SUPERBLOCK_BYTES))


def leave_behind(directory: Path) -> None:
    """Make the index one that was not closed, as after a crash."""
    index = SegmentIndex(directory, SegmentOptions(capacity=CAPACITY).geometry())
    contents = index.load({})
    assert contents is not None
    index.begin(contents.store)
    index.close()


def remove_index(directory: Path) -> None:
    for path in directory.glob("index.sqlite*"):
        path.unlink()


def everything_is_served(store: SegmentRecords) -> None:
    assert [number for number in RECORDS if not served(store, number)] == list(DELETED)


INDEXES: dict[str, Callable[[Path], None]] = {
    "closed index": lambda _: None,
    "index behind": leave_behind,
    "no index": remove_index,
}
DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": lambda path: flip(path, 26),
    "zeroed": lambda path: write(path, 0, bytes(SUPERBLOCK_BYTES)),
    "torn": lambda path: write(path, 0, bytes([0xA5]) * 512),
}


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("place", "durability"), [(0, "durable"), (1, "relaxed"), (2, "durable")])
def test_a_damaged_superblock_costs_nothing(
    tmp_path: Path, damage: str, index: str, place: int, durability: Durability
) -> None:
    path = filled(tmp_path, durability)[place]
    was = block(path, 0)
    DAMAGES[damage](path)
    INDEXES[index](tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    with open_store(tmp_path, read_only=True) as store:
        everything_is_served(store)
        report = store.verify()
        assert (report.restored_segments, report.lost_segments, report.clean) == ((path.name,), (), False)
        assert store.stats().damaged == 1
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before, "reading only wrote something"

    with open_store(tmp_path, durability=durability) as store:
        assert store.recovery.restored_segments == (path.name,)
        everything_is_served(store)
        put(store, 100)
    assert block(path, 0) == was == block(path, -SUPERBLOCK_BYTES)
    with open_store(tmp_path) as store:
        everything_is_served(store)
        assert served(store, 100)
        assert store.verify().clean


def test_no_byte_of_a_superblock_is_worth_more_than_another(tmp_path: Path) -> None:
    """Each of the bytes that say something, and some of those that do not, in either of the two blocks."""
    path = filled(tmp_path)[2]
    was = parse_superblock(block(path, 0))
    with PosixEngine(threads=1) as engine:
        for at in [*range(64), *range(64, SUPERBLOCK_BYTES, 200)]:
            for base in (0, path.stat().st_size - SUPERBLOCK_BYTES):
                flip(path, base + at)
                pool = SegmentPool(engine, tmp_path, SegmentOptions(capacity=CAPACITY).geometry(), was.store)
                found = read_superblocks(engine, pool.load(writable=False))
                judge(found, engine, was.store, None)
                assert [one.believed for one in found if one.name == path.name] == [was]
                assert [one.name for one in found if one.restored] == [path.name]
                pool.close()
                flip(path, base + at)


def test_both_damaged_are_known_from_an_index_that_was_closed(tmp_path: Path) -> None:
    path = filled(tmp_path)[1]
    flip(path, 0)
    without_copies(tmp_path)
    with open_store(tmp_path) as store:
        assert store.recovery.restored_segments == (path.name,)
        everything_is_served(store)
    with open_store(tmp_path) as store:
        assert store.verify().clean
        everything_is_served(store)


@pytest.mark.parametrize("index", ["index behind", "no index"])
def test_what_nothing_proves_is_lost_counted_and_free_again(tmp_path: Path, index: str) -> None:
    """Its headers are whole, and yet it may have been given back after they were written."""
    path = filled(tmp_path)[1]
    flip(path, 0)
    without_copies(tmp_path)
    INDEXES[index](tmp_path)
    with open_store(tmp_path, read_only=True) as store:
        assert store.recovery.lost_segments == (path.name,)
    with open_store(tmp_path) as store:
        assert store.recovery.lost_segments == (path.name,)
        assert store.stats().damaged == 1
        assert not store.verify().clean
        there = [number for number in RECORDS if served(store, number)]
        assert set(range(15)) - {3} < set(there) < set(RECORDS)
        put(store, *range(100, 140))
    remove_index(tmp_path)
    with open_store(tmp_path) as store:
        assert store.verify().clean
        assert [number for number in RECORDS if served(store, number)] == there, "lost records came back"
        assert all(served(store, number) for number in range(100, 140))


def test_an_epoch_that_was_lost_is_not_given_out_again(tmp_path: Path) -> None:
    """The newest life is the lost one: a new life with its number would take its records for its own."""
    path = filled(tmp_path)[2]
    epoch = parse_superblock(block(path, 0)).epoch
    flip(path, 0)
    without_copies(tmp_path)
    remove_index(tmp_path)
    with open_store(tmp_path):
        pass
    free = parse_superblock(block(path, 0))
    assert (free.kind, free.epoch > epoch) == (SegmentKind.FREE, True)
    with open_store(tmp_path) as store:
        put(store, *range(100, 150))
        assert not served(store, 45)
    remove_index(tmp_path)
    with open_store(tmp_path) as store:
        assert not served(store, 45)


@pytest.mark.parametrize("index", INDEXES)
def test_a_copy_of_an_earlier_life_is_not_believed(tmp_path: Path, index: str) -> None:
    """As a release from before the copy leaves it when it uses a segment again."""
    path = filled(tmp_path)[0]
    old = block(path, -SUPERBLOCK_BYTES)
    with open_store(tmp_path) as store:
        put(store, *range(100, 260))
    now = parse_superblock(block(path, 0))
    assert now.epoch > parse_superblock(old).epoch
    write(path, -SUPERBLOCK_BYTES, old)
    flip(path, 0)
    INDEXES[index](tmp_path)
    with open_store(tmp_path) as store:
        assert not any(served(store, number) for number in range(15)), "a record of an earlier life came back"
        assert bool(store.recovery.lost_segments) is (index != "closed index")
        assert served(store, 259)
    with open_store(tmp_path) as store:
        assert store.verify().clean
        assert parse_superblock(block(path, 0)).epoch >= now.epoch


def test_a_copy_that_a_crash_left_behind_is_written_again(tmp_path: Path) -> None:
    """Else it would bring back a life that ended, were the first block damaged later: no header tells of its end."""
    path = filled(tmp_path)[0]
    old = block(path, 0)
    life = parse_superblock(old)
    with open_store(tmp_path) as store:
        store._pool.give(store._pool.segments[1])
    remove_index(tmp_path)
    write(path, -SUPERBLOCK_BYTES, old)
    with open_store(tmp_path) as store:
        assert store.recovery.restored_segments == (), "a crash is no damage"
        assert not served(store, 0)
    assert parse_superblock(block(path, -SUPERBLOCK_BYTES)).epoch > life.epoch
    flip(path, 0)
    remove_index(tmp_path)
    with open_store(tmp_path) as store:
        assert not served(store, 0), "a life that ended is back"


def test_segments_without_a_copy_get_one(tmp_path: Path) -> None:
    segments = filled(tmp_path)
    without_copies(tmp_path)
    with open_store(tmp_path, read_only=True) as store:
        assert store.verify().clean
    with open_store(tmp_path) as store:
        assert store.stats().damaged == 0
    assert all(block(path, 0) == block(path, -SUPERBLOCK_BYTES) for path in segments)


def test_a_directory_of_a_newer_release_is_left_alone(tmp_path: Path) -> None:
    path = filled(tmp_path)[1]
    newer = bytearray(block(path, 0))
    newer[16] = 2
    write(path, 0, sealed(bytes(newer), seed=0))
    before = path.read_bytes()
    for read_only in (True, False):
        with pytest.raises(StorageError, match=r"segment-00000002.*another release.*required version 1, got 2"):
            open_store(tmp_path, read_only=read_only)
    assert path.read_bytes() == before


def test_a_segment_cut_short_keeps_its_superblock(tmp_path: Path) -> None:
    path = filled(tmp_path)[0]
    with path.open("r+b") as file:
        file.truncate(300_000)
    with open_store(tmp_path) as store:
        assert store.recovery.restored_segments == store.recovery.lost_segments == ()
        assert served(store, 0)
        assert not served(store, 14)
        assert path.stat().st_size == 300_000
    shutil.rmtree(tmp_path)
    path = filled(tmp_path)[0]
    path.write_bytes(b"")
    with open_store(tmp_path) as store:
        assert store.recovery.lost_segments == (path.name,)
        assert served(store, 49)
