"""What a store of files does to its directory: layout, ledger, quarantine, full and failing media, reading only."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.errors import ConfigError, StorageError
from kvtier.record import header_seed, parse_header
from kvtier.storage_backends.files import FileOptions, FileRecords
from kvtier.storage_backends.files.layout import LEDGER, MARK, QUARANTINE, record_path
from kvtier.storage_backends.records import PutState
from kvtier.testing.faults.files import flip_bit
from kvtier.testing.record_samples import NAMESPACE, fetch, physical_bytes, sample_bytes, sample_key, sample_record

Opens = Callable[..., FileRecords]


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Names, sizes and times of everything."""
    return {
        str(path.relative_to(directory)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
    }


def test_a_file_is_a_header_and_its_payload(directory: Path, open_store: Opens) -> None:
    with open_store() as store:
        store.put([sample_record(3, 70_000, tenant="team", meta=b"x")])

    path = record_path(directory, sample_key(3))
    name = sample_key(3).hex()
    assert path == directory / name[:2] / name[2:4] / f"{name}.kvr"
    data = path.read_bytes()
    header = parse_header(data, header_seed(bytes(16), 0))
    assert (header.key, header.namespace, header.tenant, header.meta) == (sample_key(3), NAMESPACE, "team", b"x")
    assert data[header.header_bytes :][:70_000] == sample_bytes(3, 0, 70_000)
    assert len(data) == header.record_bytes
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_is_left_of_deleted_records(directory: Path, open_store: Opens) -> None:
    with open_store() as store:
        empty = store.stats().held_bytes
        for number in range(30):
            store.put([sample_record(number, 5000)])
        assert store.stats().held_bytes > empty + 30 * 12_288
        assert store.clear() == 30
        assert store.stats().held_bytes == empty

    assert sorted(path.name for path in directory.iterdir()) == ["incoming", MARK, "ledger", "lock", "quarantine"]


@pytest.mark.parametrize("damage", ["garbage", "empty", "removed"])
def test_a_ledger_that_cannot_be_trusted_is_counted_afresh(directory: Path, open_store: Opens, damage: str) -> None:
    with open_store() as store:
        store.put([sample_record(n, 50_000) for n in range(4)])
        right = store.stats().held_bytes
        if damage == "removed":
            (directory / LEDGER).unlink()
        else:
            (directory / LEDGER).write_bytes(b"\xff" * 16 if damage == "garbage" else b"")
        store.put([sample_record(4, 50_000)])
        grown = store.stats().held_bytes
        assert right < grown < right + 100_000
        store.delete([sample_key(4)])
        assert store.stats().held_bytes == right


def test_damaged_files_are_kept_aside_within_a_bound(directory: Path, open_store: Opens) -> None:
    with open_store(capacity=1 << 20) as store:
        for number in range(6):
            store.put([sample_record(number, 30_000)])
            flip_bit(record_path(directory, sample_key(number)), 8 * 5000)
            assert fetch(store, number, 30_000) is None
        stats = store.stats()
        aside = sorted((directory / QUARANTINE).iterdir())
        assert (stats.damaged, stats.records, stats.live_bytes) == (6, 0, 0)
        assert 0 < stats.dead_bytes <= (1 << 20) // 16
        assert stats.dead_bytes == sum(path.stat().st_blocks * 512 for path in aside)
        assert aside[-1].name.startswith(sample_key(5).hex()), "the latest is the one to look at"


@pytest.mark.usefixtures("system_calls")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_medium_that_refuses_degrades_the_store_until_it_takes_records_again(
    open_store: Opens, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.pwritev

    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(code, os.strerror(code))

    with open_store() as store:
        held = store.stats().held_bytes
        monkeypatch.setattr(os, "pwritev", refuse)
        (outcome,) = store.put([sample_record(1, 9000)])
        assert outcome.state is PutState.REFUSED
        assert os.strerror(code) in outcome.reason
        assert os.strerror(code) in store.stats().degraded
        assert (store.stats().failed, store.stats().refused, store.stats().held_bytes) == (1, 1, held)
        monkeypatch.setattr(os, "pwritev", real)
        assert store.put([sample_record(1, 9000)])[0].state is PutState.STORED
        assert store.stats().degraded == ""
        assert fetch(store, 1, 9000) == sample_bytes(1, 0, 9000)


@pytest.mark.usefixtures("system_calls")
def test_a_full_medium_can_be_opened_and_read(open_store: Opens, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_store() as store:
        store.put([sample_record(1, 9000)])
    monkeypatch.setattr(os, "pwritev", full)
    with open_store() as store:
        assert fetch(store, 1, 9000) == sample_bytes(1, 0, 9000)
        assert "No space left" in store.put([sample_record(2, 9000)])[0].reason
        assert store.stats().records == 1


def test_a_failing_sync_is_no_durable_put(open_store: Opens, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for call in ("fdatasync", "fsync"):
        with open_store() as store, monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            (outcome,) = store.put([sample_record(1, 9000)])
            assert outcome.state is PutState.REFUSED, call
            assert not store.contains([sample_key(1)]).any(), call


def test_relaxed_puts_are_synced_by_flush(open_store: Opens, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (synced.append(descriptor), real(descriptor)))
    with open_store(durability="relaxed") as store:
        store.put([sample_record(n, 5000) for n in range(3)])
        store.delete([sample_key(1)])
        assert synced == []
        store.flush()
        assert len(synced) == 2
        store.flush()
        assert len(synced) == 2


def test_relaxed_puts_are_synced_when_they_are_many(directory: Path, open_store: Opens) -> None:
    with open_store(durability="relaxed", sync_bytes=100_000) as store:
        notes = []
        for number in range(4):
            store.put([sample_record(number, 40_000)])
            notes.append(len(list(directory.glob("unsynced-*"))))

    assert notes == [1, 1, 0, 1]
    assert list(directory.glob("unsynced-*")) == []


def test_what_was_never_synced_is_verified_at_the_next_opening(directory: Path, open_store: Opens) -> None:
    with open_store() as store:
        store.put([sample_record(1, 9000)])
    (directory / f"unsynced-{time.time_ns()}-{'0' * 32}").touch()
    with open_store() as other:
        other.put([sample_record(n, 9000) for n in (2, 3)])
        for number in (1, 2):
            flip_bit(record_path(directory, sample_key(number)), 8 * 5000)
        (directory / f"unsynced-{time.time_ns() - 10**9 * 60}-{'0' * 32}").touch()
        record_path(directory, sample_key(1)).touch()
        os.utime(record_path(directory, sample_key(1)), ns=(0, 0))
    with open_store() as store:
        assert store.contains([sample_key(n) for n in (1, 2, 3)]).tolist() == [True, False, True]
        assert store.stats().damaged == 1
        assert list(directory.glob("unsynced-*")) == []


def test_reading_only_changes_nothing(directory: Path, open_store: Opens) -> None:
    with open_store() as store:
        store.put([sample_record(n, 9000) for n in range(3)])
    flip_bit(record_path(directory, sample_key(2)), 8 * 5000)
    before = snapshot(directory)
    with open_store(read_only=True) as store:
        assert fetch(store, 1, 9000) == sample_bytes(1, 0, 9000)
        assert fetch(store, 2, 9000) is None
        assert store.put([sample_record(9, 10)])[0].state is PutState.REFUSED
        assert store.delete([sample_key(1)]) == store.clear() == 0
        assert store.stats().held_bytes >= physical_bytes(directory)
        assert "reading only" in store.stats().degraded
    assert snapshot(directory) == before


def test_a_directory_that_is_something_else_is_refused(tmp_path: Path) -> None:
    options = FileOptions(capacity=1 << 20)
    with pytest.raises(StorageError, match="no directory of records in files"):
        FileRecords(tmp_path, options, read_only=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "segment-00000001.kvt").write_bytes(b"")
    with pytest.raises(StorageError, match="is a segment directory"):
        FileRecords(tmp_path, options)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot use .*; choose another directory"):
        FileRecords(tmp_path / "file" / "below", options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"capacity": 1000}, r"at least 256\.0 KiB, got 1000"),
        ({"capacity": 1 << 20, "durability": "often"}, 'must be "durable" or "relaxed"'),
        ({"capacity": 1 << 20, "extent_bytes": 5000}, "power of two"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FileOptions(**options)
