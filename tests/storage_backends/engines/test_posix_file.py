"""A spill file is had whole or not at all, and nothing of it stays behind."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.errors import ConfigError, StorageError
from kvtier.storage_backends.engines.posix_file import _file_system, open_nameless
from kvtier.storage_backends.spill_file import SpillFile
from kvtier.testing.backend_machine import random_rows

OPEN = os.open


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def failing(code: int) -> Callable[..., int]:
    def call(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


def test_a_file_system_without_nameless_files_gets_an_unlinked_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_tmpfile(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return OPEN(path, flags, mode)

    monkeypatch.setattr(os, "open", without_tmpfile)
    with SpillFile(8192, 4, tmp_path) as slots:
        rows = random_rows(0, 4, 8192)
        slots.write(slots.reserve(4), rows)

        assert not list(tmp_path.iterdir())
        assert os.fstat(slots._file._fd).st_mode & 0o777 == 0o600


def test_a_file_system_in_memory_is_reported(tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # noqa: S108 - the one tmpfs that Linux always has
    if not memory.is_dir() or not os.access(memory, os.W_OK):
        pytest.skip("needs a writable /dev/shm")
    with SpillFile(8192, 4, memory) as slots:
        assert "takes host memory, not disk" in slots.capabilities().note
    with SpillFile(8192, 4, tmp_path) as slots:
        kind = _file_system(slots._file._fd)
        assert ("host memory" in slots.capabilities().note) == (kind in {"tmpfs", "ramfs"})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG])
def test_space_that_cannot_be_had_is_an_error_at_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(code))
    before = open_files()

    with pytest.raises(StorageError, match=rf"required 64\.0 MiB, got .* free \({os.strerror(code)}\); \w+"):
        SpillFile(8192, 8192, tmp_path)

    assert not list(tmp_path.iterdir())
    assert open_files() == before


def test_more_than_the_disk_holds_leaves_the_disk_as_it_was(tmp_path: Path) -> None:
    script = """
import resource, sys
from kvtier.errors import StorageError
from kvtier.storage_backends import SpillFile
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    SpillFile(8192, 1024, sys.argv[1])
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)

    assert "required 8.0 MiB" in done.stdout, done.stderr
    assert "raise the limit on file sizes" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_missing_directory_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"got nothing \(No such file or directory\); create the directory first"):
        SpillFile(8192, 4, tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")

    with pytest.raises(StorageError, match="Not a directory"):
        SpillFile(8192, 4, path)


def test_a_directory_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    script = """
import os, sys
from kvtier.errors import StorageError
from kvtier.storage_backends import SpillFile
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
try:
    SpillFile(8192, 4, sys.argv[1])
except StorageError as error:
    print(error)
"""
    tmp_path.chmod(0o555)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    tmp_path.chmod(0o755)

    assert "Permission denied" in done.stdout, done.stderr
    assert "choose a directory that this user may write to" in done.stdout


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    script = """
import sys, time, torch
from kvtier.storage_backends import SpillFile
slots = SpillFile(8192, 1024, sys.argv[1])
slots.write(slots.reserve(1024), torch.ones(1024, 8192, dtype=torch.uint8))
print("written", flush=True)
time.sleep(120)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        child.kill()

    assert child.returncode == -9
    assert not list(tmp_path.iterdir())


def test_a_size_that_is_not_whole_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 4096 bytes, got 5000"):
        open_nameless(tmp_path, 5000)
