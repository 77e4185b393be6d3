"""Slots in a file: the laws with and without direct I/O, transfers that stop short, fail, or outlast close."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvtier.errors import ConfigError, StorageError
from kvtier.storage_backends.memory import empty_aligned
from kvtier.storage_backends.spill_file import SpillFile
from kvtier.testing.backend_laws import BackendFactory, SlotBackendLaws
from kvtier.testing.backend_machine import random_rows


class TestSpillFile(SlotBackendLaws):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> BackendFactory:
        return lambda slot_bytes, capacity_slots: SpillFile(slot_bytes, capacity_slots, tmp_path)


class TestSpillFileWithoutDirectIO(SlotBackendLaws):
    @pytest.fixture
    def backend(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BackendFactory:
        refuse_direct_io(monkeypatch)
        return lambda slot_bytes, capacity_slots: SpillFile(slot_bytes, capacity_slots, tmp_path, io_threads=1)


def refuse_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``F_SETFL`` refuse ``O_DIRECT``, as the kernel does where a file system has none."""
    real = fcntl.fcntl

    def without_direct(descriptor: int, command: int, argument: int = 0) -> object:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", without_direct)


def failing(code: int) -> Callable[..., int]:
    def call(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


@pytest.fixture
def spill(tmp_path: Path) -> SpillFile:
    return SpillFile(8192, 64, tmp_path)


def aligned_rows(seed: int, count: int) -> torch.Tensor:
    return empty_aligned(count * 8192).view(count, 8192).copy_(random_rows(seed, count, 8192))


def test_the_whole_capacity_is_taken_at_once_and_nobody_sees_the_file(tmp_path: Path) -> None:
    with SpillFile(5000, 100, tmp_path) as slots:
        assert slots.capacity_bytes == 100 * 8192
        assert slots.allocated_bytes >= slots.capacity_bytes
        assert not list(tmp_path.iterdir())
        mode = os.fstat(slots._file._fd).st_mode
        assert mode & 0o777 == 0o600


def test_direct_io_is_reported_as_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SpillFile(8192, 4, tmp_path) as slots:
        direct = slots.capabilities()
    refuse_direct_io(monkeypatch)
    with SpillFile(8192, 4, tmp_path) as slots:
        buffered = slots.capabilities()

    assert (direct.alignment == 4096) == direct.direct_io
    assert (buffered.direct_io, buffered.alignment) == (False, 1)
    assert "no direct I/O on" in buffered.note
    assert "Invalid argument" in buffered.note


@pytest.mark.parametrize("stop", [4096, 5000])
@pytest.mark.parametrize("aligned", [True, False])
def test_transfers_that_stop_short_go_on(
    spill: SpillFile, monkeypatch: pytest.MonkeyPatch, aligned: bool, stop: int
) -> None:
    real_read, real_write = os.preadv, os.pwritev
    calls = []

    def stingy(call: Callable[..., int]) -> Callable[..., int]:
        def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            calls.append(offset)
            return min(call(descriptor, [buffers[0][:8192]], offset), stop)

        return short

    monkeypatch.setattr(os, "preadv", stingy(real_read))
    monkeypatch.setattr(os, "pwritev", stingy(real_write))
    rows = aligned_rows(1, 16) if aligned else random_rows(1, 17, 8192)[1:, :]
    into = empty_aligned(16 * 8192).view(16, 8192) if aligned else torch.zeros_like(rows)
    with spill as slots:
        taken = slots.reserve(16)
        slots.write(taken, rows)
        slots.read(taken, into)

    assert torch.equal(into, rows)
    assert len(calls) >= 2 * 16 * 8192 // stop


def test_a_file_that_ends_early_is_an_error_and_not_zeros(spill: SpillFile) -> None:
    with spill as slots:
        taken = slots.reserve(64)
        os.ftruncate(slots._file._fd, 20 * 8192)

        with pytest.raises(StorageError, match=r"cannot read slots 0, 1, .* and 48 more .*stopped short"):
            slots.read(taken, aligned_rows(0, 64))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_device_that_fails_names_the_slots(spill: SpillFile, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = os.pwritev

    def fails_at_slot_3(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return failing(code)() if offset == 3 * 8192 else real(descriptor, buffers, offset)

    with spill as slots:
        taken = slots.reserve(64)[[1, 3, 5, 7]]
        monkeypatch.setattr(os, "pwritev", fails_at_slot_3)

        with pytest.raises(
            StorageError, match=rf"cannot write slots 3 of the spill file \({os.strerror(code)}\)"
        ) as caught:
            slots.write(taken, aligned_rows(2, 4))
        assert isinstance(caught.value.__cause__, OSError)

        monkeypatch.undo()
        slots.write(taken, rows := aligned_rows(2, 4))
        slots.read(taken, into := torch.zeros_like(rows))
        assert torch.equal(into, rows)


def test_adjacent_slots_go_through_in_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    sizes: list[int] = []

    def recorded(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(buffer.nbytes for buffer in buffers))
        return real(descriptor, buffers, offset)

    with SpillFile(8192, 2048, tmp_path) as slots:
        taken = slots.reserve(2048)
        monkeypatch.setattr(os, "pwritev", recorded)
        slots.write(taken, aligned_rows(3, 2048))

        assert sizes == [8 << 20, 8 << 20]


def test_close_waits_for_the_transfer_under_way(spill: SpillFile, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    reading, go_on = threading.Event(), threading.Event()

    def held_up(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reading.set()
        go_on.wait(30)
        return real(descriptor, buffers, offset)

    taken = spill.reserve(2)
    spill.write(taken, rows := aligned_rows(4, 2))
    monkeypatch.setattr(os, "preadv", held_up)
    into = torch.zeros_like(rows)
    reader = threading.Thread(target=spill.read, args=(taken, into))
    closer = threading.Thread(target=spill.close)
    reader.start()
    assert reading.wait(30)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive(), "closed under a read"
    go_on.set()
    reader.join(30)
    closer.join(30)

    assert torch.equal(into, rows)
    assert spill.allocated_bytes == 0


def test_no_io_threads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="io_threads must be at least 1, got 0"):
        SpillFile(8192, 4, tmp_path, io_threads=0)
