"""The simulated block device: what is synced lasts, anything else may not, and a recording is complete."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.errors import MissingDependencyError, StorageError
from kvtier.testing.crash.disk import SimulatedDisk, Tree, read_tree
from kvtier.testing.crash.log import Event, Kind, read_log
from kvtier.testing.crash.recorder import compile_recorder

ROOT = Path("/simulated")
A, B = b"a" * 4096, b"b" * 4096
CRASHES = 200


class Calls:
    """Calls as the recorder would log them."""

    def __init__(self, **start: bytes) -> None:
        self.disk = SimulatedDisk(ROOT, dict(start))
        self._numbers = itertools.count(1)
        self._inodes: dict[str, int] = {}

    def begin(self, kind: Kind, name: str = "", **fields: Any) -> Event:
        values: dict[str, Any] = {
            "inode": self._inodes.get(name, 0), "offset": 0, "length": 0, "result": 0, "flags": 0, "other": "",
            "data": memoryview(b""), "path": f"{ROOT}/{name}" if name else str(ROOT),
        }  # fmt: skip
        event = Event(kind, ended=False, call=next(self._numbers), **values | fields)
        self.disk.apply(event)
        return event

    def end(self, event: Event, result: int = 0, inode: int = 0) -> None:
        empty = memoryview(b"")
        self.disk.apply(Event(event.kind, True, event.call, inode, 0, 0, result, 0, "", "", empty))

    def open(self, name: str, flags: int = os.O_RDWR | os.O_CREAT) -> None:
        inode = self._inodes.setdefault(name, len(self._inodes) + 1)
        self.end(self.begin(Kind.OPEN, name, flags=flags), result=3, inode=inode)

    def write(self, name: str, offset: int, data: bytes, result: int | None = None) -> None:
        call = self.begin(Kind.WRITE, name, offset=offset, data=memoryview(data))
        self.end(call, len(data) if result is None else result)

    def sync(self, name: str = "") -> None:
        self.end(self.begin(Kind.SYNC, name))

    def rename(self, name: str, to: str) -> None:
        self.end(self.begin(Kind.RENAME, name, other=f"{ROOT}/{to}"))

    def unlink(self, name: str) -> None:
        self.end(self.begin(Kind.UNLINK, name))

    def states(self) -> list[Tree]:
        return [self.disk.crash(np.random.default_rng(seed)) for seed in range(CRASHES)]

    def contents(self, name: str) -> set[bytes | None]:
        found = [state.get(name) for state in self.states()]
        return {None if data is None else bytes(data) for data in found}


def test_what_is_synced_with_its_name_is_there() -> None:
    calls = Calls()
    calls.open("f")
    calls.write("f", 0, A)
    calls.sync("f")
    assert calls.contents("f") == {None, A}, "a file's sync does not make its name last"
    calls.sync()
    assert calls.contents("f") == {A}


def test_what_is_not_synced_may_be_there_in_any_part() -> None:
    calls = Calls(f=A * 2)
    calls.open("f")
    calls.write("f", 0, B * 2)
    contents = calls.contents("f")
    assert {A * 2, B * 2, A + B, B + A} <= contents
    sectors = {data[at : at + 512] for data in contents if data for at in range(0, len(data), 512)}
    assert sectors == {A[:512], B[:512]}, "a sector is never torn"


def test_growth_may_be_lost_with_or_without_its_bytes() -> None:
    calls = Calls(f=A)
    calls.open("f")
    calls.write("f", 4096, B)
    assert {A, A + B, A + bytes(4096)} <= calls.contents("f")


def test_a_sync_covers_what_had_returned_when_it_began() -> None:
    calls = Calls(f=A)
    calls.open("f")
    under_way = calls.begin(Kind.WRITE, "f", data=memoryview(B))
    sync = calls.begin(Kind.SYNC, "f")
    calls.end(under_way, len(B))
    calls.write("f", 4096, B)
    calls.end(sync)
    assert A in {data[:4096] for data in calls.contents("f") if data}
    calls.sync("f")
    assert calls.contents("f") == {B + B}


def test_a_sync_under_way_promises_nothing_and_a_failed_one_neither() -> None:
    calls = Calls(f=A)
    calls.open("f")
    calls.write("f", 0, B)
    sync = calls.begin(Kind.SYNC, "f")
    assert A in calls.contents("f")
    calls.end(sync, -1)
    assert A in calls.contents("f")


def test_failed_and_short_writes_change_what_they_changed() -> None:
    calls = Calls(f=A)
    calls.open("f")
    calls.write("f", 0, B, result=-1)
    assert calls.contents("f") == {A}
    calls.write("f", 0, B, result=1024)
    calls.sync("f")
    assert calls.contents("f") == {B[:1024] + A[1024:]}


def test_a_rename_happens_or_not_and_nothing_between() -> None:
    calls = Calls(old=A, new=B)
    calls.rename("old", "new")
    states = {(bytes(one["new"] or b""), "old" in one) for one in calls.states()}
    assert states == {(B, True), (A, False)}
    calls.sync()
    assert {(bytes(one["new"] or b""), "old" in one) for one in calls.states()} == {(A, False)}


def test_a_name_may_come_back_and_its_order_is_kept() -> None:
    calls = Calls(f=A)
    calls.unlink("f")
    calls.open("f")
    calls.write("f", 0, B)
    calls.sync("f")
    assert calls.contents("f") == {A, None, B}
    calls.unlink("f")
    calls.sync()
    assert calls.contents("f") == {None}


def test_cutting_a_file_is_lost_or_not() -> None:
    calls = Calls(f=A * 3)
    calls.open("f")
    calls.end(calls.begin(Kind.SIZE, "f", length=100))
    assert {A * 3, A[:100]} <= calls.contents("f")
    calls.sync("f")
    assert calls.contents("f") == {A[:100]}


def test_shared_memory_is_lost_and_other_mappings_are_refused() -> None:
    calls = Calls()
    calls.open("index-shm")
    calls.write("index-shm", 0, A)
    calls.sync("index-shm")
    calls.sync()
    assert calls.contents("index-shm") == {None}
    calls.begin(Kind.UNTRACKED, "index-shm", other="mmap")
    with pytest.raises(StorageError, match=r"mmap on .*/f cannot be replayed"):
        calls.begin(Kind.UNTRACKED, "f", other="mmap")


EVERY_CALL = """
import ctypes, os, sqlite3, sys
from pathlib import Path
from kvtier.testing.crash.recorder import mark, start_recording
root, log = Path(sys.argv[1]), Path(sys.argv[2])
start_recording(root, log)
one = os.open(root / "one", os.O_RDWR | os.O_CREAT)
os.write(one, b"write" * 100)
os.pwrite(one, b"pwrite" * 1000, 3000)
os.writev(one, [b"write", b"v"])
os.pwritev(one, [b"pwrite", b"v" * 5000], 70_000)
os.posix_fallocate(one, 0, 100_000)
os.ftruncate(one, 90_000)
os.fdatasync(one)
again = os.dup(one)
os.close(one)
os.pwrite(again, b"through a copy", 80_000)
appending = os.open(root / "one", os.O_WRONLY | os.O_APPEND)
os.write(appending, b"appended")
os.truncate(root / "one", 90_004)
mark(b"a note")
os.mkdir(root / "sub")
os.rename(root / "one", root / "sub" / "two")
os.link(root / "sub" / "two", root / "three")
os.write(appending, b"under another name")
(root / "gone").write_bytes(b"x")
(root / "gone").unlink()
(root / "sub" / "short").write_bytes(b"long text")
(root / "sub" / "short").write_bytes(b"new")
here = os.open(root, os.O_RDONLY)
inside = os.open("relative", os.O_WRONLY | os.O_CREAT, dir_fd=here)
os.write(inside, b"relative")
os.fsync(here)
os.replace("relative", "renamed", src_dir_fd=here, dst_dir_fd=here)
base = sqlite3.connect(root / "base.sqlite")
base.execute("pragma journal_mode=wal")
base.execute("pragma synchronous=full")
base.execute("create table t (x)")
for number in range(50):
    with base:
        base.execute("insert into t values (randomblob(3000))")
from kvtier.storage_backends.engines import PosixEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned
engine = PosixEngine()
file = engine.open(root / "queued", writable=True, create=True)
file.allocate(1 << 20)
memory = empty_aligned(1 << 20).fill_(7)
pieces = [Transfer(file, at << 16, memory[at << 16 : (at + 1) << 16]) for at in (0, 1, 2, 5, 9)]
assert not any(engine.write([*pieces, Transfer(file, 700_001, memory[1:100])]))
file.sync()
assert not any(engine.write([Transfer(file, 15 << 16, memory[: 1 << 16])]))
os._exit(0)
"""


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    try:
        return compile_recorder(tmp_path)
    except MissingDependencyError as missing:
        pytest.skip(str(missing))


def test_a_recording_replays_to_the_very_same_files(recorder: Path, tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    root.mkdir()
    command = [sys.executable, "-P", "-c", EVERY_CALL, str(root), str(log)]
    done = subprocess.run(command, env=os.environ | {"LD_PRELOAD": str(recorder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    disk = SimulatedDisk(root)
    seen = []
    for event in read_log(log):
        disk.apply(event)
        seen.append(event)

    assert disk.now() == read_tree(root)
    assert {event.kind for event in seen} >= set(Kind) - {Kind.SYNC_ALL, Kind.UNTRACKED}
    assert [bytes(event.data) for event in seen if event.kind is Kind.MARK] == [b"a note"]
