"""Several processes on one directory: they find each other's records, and together keep within the capacity."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.storage_backends.files import FileRecords, table
from kvtier.storage_backends.files.layout import INCOMING, record_path
from kvtier.storage_backends.records import PutState
from kvtier.testing.record_samples import fetch, physical_bytes, sample_bytes, sample_key, sample_record

Opens = Callable[..., FileRecords]

FILL = """
import sys
from kvtier.storage_backends.files import FileOptions, FileRecords
from kvtier.testing.record_samples import fetch, sample_bytes, sample_record
directory, capacity, worker = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with FileRecords(directory, FileOptions(capacity=capacity)) as store:
    print("open", flush=True)
    sys.stdin.readline()
    for turn in range(30):
        number = 100 * (turn % 2) + turn if turn % 3 else 1000 * worker + turn
        store.put([sample_record(number, 100_000)])
        assert fetch(store, number, 100_000) in {None, sample_bytes(number, 0, 100_000)}
    assert store.stats().damaged == 0, store.stats()
    assert store.stats().failed == 0, store.stats()
"""

DIE_WRITING = """
import os, signal, sys
from kvtier.storage_backends import failpoints
from kvtier.storage_backends.files import FileOptions, FileRecords
from kvtier.testing.record_samples import sample_record
store = FileRecords(sys.argv[1], FileOptions(capacity=int(sys.argv[2])))
store.put([sample_record(1, 100_000)])
failpoints.active[sys.argv[3]] = lambda: os.kill(os.getpid(), signal.SIGKILL)
store.put([sample_record(n, 100_000) for n in range(2, 6)])
if sys.argv[3] == "files.unlinked":
    store.delete([store_key.key for store_key in store.scan()])
"""


def test_two_stores_find_what_the_other_put_and_miss_what_it_deleted(open_store: Opens) -> None:
    with open_store() as one, open_store() as two:
        assert one.put([sample_record(1, 9000)])[0].state is PutState.STORED
        assert two.contains([sample_key(1)]).all()
        assert fetch(two, 1, 9000) == sample_bytes(1, 0, 9000)
        assert two.put([sample_record(1, 500)])[0].state is PutState.EXISTS
        assert [info.key for info in two.scan()] == [sample_key(1)]
        assert two.delete([sample_key(1)]) == 1
        assert fetch(one, 1, 9000) is None
        assert not one.contains([sample_key(1)]).any()
        assert one.stats().damaged == two.stats().damaged == 0


def test_processes_together_keep_within_the_capacity(directory: Path) -> None:
    capacity = 2 << 20
    command = [sys.executable, "-c", FILL, str(directory), str(capacity)]
    workers = [
        subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for n in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "open\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.close()
    most = 0
    while any(worker.poll() is None for worker in workers):
        most = max(most, physical_bytes(directory))
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.close()

    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert capacity // 2 < most <= capacity


@pytest.mark.parametrize(
    "failpoint",
    ["files.reserved", "files.written", "files.synced", "files.renamed", "files.directory-synced", "files.unlinked"],
)
def test_a_killed_process_costs_no_acknowledged_record_and_no_space_for_ever(
    directory: Path, open_store: Opens, failpoint: str
) -> None:
    command = [sys.executable, "-c", DIE_WRITING, str(directory), str(4 << 20), failpoint]

    assert subprocess.run(command, timeout=120).returncode == -9

    with open_store() as store:
        if failpoint != "files.unlinked":
            assert fetch(store, 1, 100_000) == sample_bytes(1, 0, 100_000)
        for info in store.scan():
            number = next(n for n in range(1, 6) if sample_key(n) == info.key)
            assert fetch(store, number, 100_000) == sample_bytes(number, 0, 100_000)
        assert list((directory / INCOMING).iterdir()) == []
        assert store.stats().held_bytes <= physical_bytes(directory) + 30 * 4096
        assert store.stats().damaged == 0


def test_a_record_that_another_process_read_lately_is_evicted_last(
    open_store: Opens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_TOUCH_NS", 0)
    with open_store(capacity=1 << 20) as writer, open_store(capacity=1 << 20) as reader:
        for number in range(8):
            writer.put([sample_record(number, 60_000)])
        assert fetch(reader, 0, 60_000) is not None
        while writer.stats().evicted < 2:
            number += 1
            writer.put([sample_record(number, 60_000)])

        assert writer.contains([sample_key(0)]).all()
        assert fetch(writer, 1, 60_000) is None


def test_a_file_of_another_record_is_never_served(directory: Path, open_store: Opens) -> None:
    with open_store() as store:
        store.put([sample_record(n, 5000) for n in (1, 2)])
        record_path(directory, sample_key(1)).write_bytes(record_path(directory, sample_key(2)).read_bytes())

        assert fetch(store, 1, 5000) is None
        assert store.stats().damaged == 1
        assert fetch(store, 2, 5000) == sample_bytes(2, 0, 5000)


def test_a_file_may_be_copied_to_another_directory(tmp_path: Path, directory: Path, open_store: Opens) -> None:
    with open_store() as store:
        store.put([sample_record(7, 70_000, tenant="team", meta=b"kept")])
    other = tmp_path / "other"
    target = record_path(other, sample_key(7))
    target.parent.mkdir(parents=True)
    target.write_bytes(record_path(directory, sample_key(7)).read_bytes())

    with FileRecords(other, store.options) as copy:
        assert fetch(copy, 7, 70_000) == sample_bytes(7, 0, 70_000)
        info = copy.info(sample_key(7))
        assert info is not None
        assert (info.tenant, info.meta) == ("team", b"kept")
