"""The POSIX engine: the laws with and without direct I/O and with one thread; what it merges, cuts and resumes."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvtier.errors import CapacityError, ConfigError, InputError
from kvtier.storage_backends.engines import PosixEngine, Transfer
from kvtier.storage_backends.engines.bounce import BouncePool
from kvtier.storage_backends.engines.kernel_queue import KernelQueue
from kvtier.storage_backends.engines.posix_file import PosixFile
from kvtier.storage_backends.memory import empty_aligned
from kvtier.testing.engine_laws import EngineFactory, EngineLaws, aligned_bytes, random_bytes

MIB = 1 << 20


class TestPosixEngine(EngineLaws):
    @pytest.fixture
    def engine(self) -> EngineFactory:
        return PosixEngine


class TestPosixEngineWithoutDirectIO(EngineLaws):
    @pytest.fixture
    def engine(self, monkeypatch: pytest.MonkeyPatch) -> EngineFactory:
        refuse_direct_io(monkeypatch)
        return PosixEngine


class TestPosixEngineWithoutQueues(EngineLaws):
    @pytest.fixture
    def engine(self, monkeypatch: pytest.MonkeyPatch) -> EngineFactory:
        refuse_queues(monkeypatch)
        return PosixEngine


class TestPosixEngineOfOneThread(EngineLaws):
    @pytest.fixture
    def engine(self) -> EngineFactory:
        return lambda: PosixEngine(1)


def refuse_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``F_SETFL`` refuse ``O_DIRECT``, as the kernel does where a file system has none."""
    real = fcntl.fcntl

    def without_direct(descriptor: int, command: int, argument: int = 0) -> object:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", without_direct)


def refuse_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel have no queues, as where a filter of system calls forbids them: everything runs in threads."""

    def refuse(_: KernelQueue, depth: int) -> None:
        raise OSError(errno.EPERM, f"no queue of {depth}")

    monkeypatch.setattr(KernelQueue, "__init__", refuse)


@pytest.fixture
def no_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_queues(monkeypatch)


def record_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[int, int]]:
    """Offsets and sizes of every vectored system call from now on."""
    real: Callable[[int, list[memoryview], int], int] = getattr(os, name)
    calls: list[tuple[int, int]] = []

    def recorded(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((offset, sum(memoryview(buffer).nbytes for buffer in buffers)))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, name, recorded)
    return calls


@pytest.mark.usefixtures("no_queues")
@pytest.mark.parametrize("alignment", ["aligned", "any"])
def test_adjacent_small_transfers_share_a_system_call(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch, alignment: str
) -> None:
    whole = aligned_bytes(1, 65 * 4096) if alignment == "aligned" else aligned_bytes(1, 65 * 4096 + 1)[1:]
    calls = record_calls(monkeypatch, "pwritev")

    assert not any(engine.write([Transfer(file, i * 4096, whole[i * 4096 : (i + 1) * 4096]) for i in range(64)]))

    assert calls == [(0, 64 * 4096)]


@pytest.mark.usefixtures("no_queues")
def test_a_large_transfer_is_shared_by_threads(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_calls(monkeypatch, "pwritev")

    assert not any(engine.write([Transfer(file, 0, aligned_bytes(2, 16 * MIB))]))

    assert sorted(calls) == [(i * MIB, MIB) for i in range(16)]


@pytest.mark.usefixtures("no_queues")
def test_blocks_in_the_middle_of_a_direct_file_are_never_buffered(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_calls(monkeypatch, "pwritev")

    assert not any(engine.write([Transfer(file, 4095, random_bytes(3, 2 + 8192))]))

    assert sorted(calls) == [(4095, 1), (4096, 8192), (12_288, 1)]


@pytest.mark.usefixtures("no_queues")
@pytest.mark.parametrize("stop", [4096, 5000])
@pytest.mark.parametrize("size", [64 * 4096, 64 * 4096 - 100])
def test_transfers_that_stop_short_go_on(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch, size: int, stop: int
) -> None:
    real_read, real_write = os.preadv, os.pwritev

    def stingy(call: Callable[..., int]) -> Callable[..., int]:
        def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            return min(call(descriptor, [buffers[0][:8192]], offset), stop)

        return short

    monkeypatch.setattr(os, "preadv", stingy(real_read))
    monkeypatch.setattr(os, "pwritev", stingy(real_write))
    sent, back = aligned_bytes(4, size), empty_aligned(size)

    assert engine.write([Transfer(file, 0, sent)]) == [None]
    assert engine.read([Transfer(file, 0, back)]) == [None]
    assert torch.equal(sent, back)


@pytest.mark.usefixtures("no_queues")
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failing_block_fails_the_transfers_that_touch_it(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.pwritev

    def bad_block(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= 3 * 4096 < offset + sum(buffer.nbytes for buffer in buffers):
            raise OSError(code, os.strerror(code))
        return real(descriptor, buffers, offset)

    whole = aligned_bytes(5, 8 * 4096)
    monkeypatch.setattr(os, "pwritev", bad_block)
    results = engine.write([Transfer(file, i * 4096, whole[i * 4096 : (i + 1) * 4096]) for i in range(8)])

    assert [None if result is None else result.errno for result in results] == [None] * 3 + [code] + [None] * 4


def test_a_piece_that_fails_fails_the_whole_transfer_once(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = aligned_bytes(6, 16 * MIB)
    assert engine.write([Transfer(file, 0, sent)]) == [None]
    os.truncate(file.path, 9 * MIB)
    ended: list[int] = []

    (result,) = engine.read([Transfer(file, 0, empty_aligned(16 * MIB))], ended.append)

    assert isinstance(result, OSError)
    assert result.errno == errno.EIO
    assert not ended


def test_want_of_memory_for_a_bounce_buffer_is_an_error_of_the_transfer(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: BouncePool) -> None:
        raise CapacityError("no memory for a buffer")

    monkeypatch.setattr(BouncePool, "buffer", refuse)

    (result, good) = engine.write(
        [Transfer(file, 1, random_bytes(7, 10)), Transfer(file, 8192, aligned_bytes(7, 4096))]
    )

    assert isinstance(result, OSError)
    assert result.errno == errno.ENOMEM
    assert good is None


@pytest.mark.usefixtures("no_queues")
def test_hooks_run_in_threads_of_the_engine_too(engine: PosixEngine, file: PosixFile) -> None:
    sent = aligned_bytes(8, 16 * MIB)
    both = threading.Barrier(2, timeout=30)

    def meet(_: int) -> None:
        both.wait()  # passes only when two hooks run at once

    pieces = [Transfer(file, i * 8 * MIB, sent[i * 8 * MIB : (i + 1) * 8 * MIB]) for i in range(2)]
    assert engine.write(pieces, meet) == [None, None]


@pytest.mark.parametrize("direct", [True, False])
def test_what_drawing_raises_is_raised_when_nothing_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    if not direct:
        refuse_direct_io(monkeypatch)
    back = empty_aligned(4 * MIB)

    with PosixEngine() as engine:
        file = engine.open(tmp_path / "file", writable=True, create=True)
        assert engine.write([Transfer(file, 0, aligned_bytes(16, 4 * MIB))]) == [None]

        def coming() -> Iterator[Transfer]:
            for at in range(0, 2 * MIB, MIB // 4):
                yield Transfer(file, at, back[at : at + MIB // 4])
            raise CapacityError("no more memory")

        with pytest.raises(CapacityError, match="no more memory"):
            engine.read(coming())
        assert engine.read(iter([])) == []
        ended: list[int] = []
        some = [Transfer(file, 0, back[:0]), Transfer(file, 0, back), Transfer(file, 0, back[:0])]
        assert engine.read(iter(some), ended.append) == [None] * 3
        assert sorted(ended) == [0, 1, 2]
        file.close()


def test_a_new_file_keeps_nothing_of_the_trial_and_the_trial_runs_once(
    engine: PosixEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_calls(monkeypatch, "pwritev")
    for name in ("first", "second"):
        file = engine.open(tmp_path / name, writable=True, create=True)
        assert file.size == 0
        file.close()

    assert len(calls) <= 1


def test_a_file_with_bytes_is_tried_without_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").write_bytes(content := os.urandom(8192))
    calls = record_calls(monkeypatch, "pwritev")
    with PosixEngine() as engine:
        file = engine.open(tmp_path / "old", writable=True)
        file.close()

    assert calls == []
    assert (tmp_path / "old").read_bytes() == content


def test_a_file_system_without_direct_io_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct_io(monkeypatch)
    with PosixEngine() as engine:
        for name in ("one", "two"):
            file = engine.open(tmp_path / name, writable=True, create=True)
            assert not file.direct
            assert "no direct I/O on" in file.note
            file.close()


def test_a_file_of_another_engine_is_refused(engine: PosixEngine) -> None:
    with pytest.raises(InputError, match="opened, got object"):
        engine.read([Transfer(object(), 0, random_bytes(1, 1))])  # type: ignore[arg-type]


def test_no_threads_are_refused() -> None:
    with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
        PosixEngine(0)
