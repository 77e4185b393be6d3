"""Batches through a queue of the kernel: what goes into it, what it leaves undone, reads that are drawn meanwhile."""

import errno
import os
import threading
from collections.abc import Iterator

import pytest
import torch

from kvtier.storage_backends.engines import PosixEngine, Transfer
from kvtier.storage_backends.engines.kernel_queue import KernelQueue, Verb
from kvtier.storage_backends.engines.posix_file import PosixFile
from kvtier.storage_backends.memory import empty_aligned
from kvtier.testing.engine_laws import aligned_bytes

MIB = 1 << 20


@pytest.fixture(autouse=True)
def needs_queues() -> None:
    try:
        KernelQueue(1).close()
    except OSError as error:
        pytest.skip(f"needs native asynchronous I/O: {error}")


def queue_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offsets and sizes of all that goes into queues from now on."""
    real, calls = KernelQueue.submit, list[tuple[int, int]]()

    def recorded(
        queue: KernelQueue, verb: Verb, token: int, descriptor: int, offset: int, parts: list[tuple[int, int]]
    ) -> None:
        real(queue, verb, token, descriptor, offset, parts)
        calls.append((offset, sum(size for _, size in parts)))

    monkeypatch.setattr(KernelQueue, "submit", recorded)
    return calls


def test_direct_transfers_go_through_a_queue_and_hooks_stay_in_the_calling_thread(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = queue_calls(monkeypatch)
    sent, back = aligned_bytes(11, 64 * 4096), empty_aligned(64 * 4096)
    threads: set[int] = set()

    pieces = [Transfer(file, i * 4096, sent[i * 4096 : (i + 1) * 4096]) for i in range(64)]
    assert not any(engine.write(pieces, lambda _: threads.add(threading.get_ident())))
    assert not any(engine.read([Transfer(file, 0, back)], lambda _: threads.add(threading.get_ident())))

    assert torch.equal(sent, back)
    assert calls == [(0, 64 * 4096)] * 2
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("result", [0, 4096, -errno.EIO])
def test_what_a_queue_does_not_finish_is_finished_by_system_calls(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch, result: int
) -> None:
    real, sent, back = KernelQueue.wait, aligned_bytes(12, 64 * 4096), empty_aligned(64 * 4096)
    monkeypatch.setattr(KernelQueue, "wait", lambda queue: [(token, result) for token, _ in real(queue)])

    assert engine.write([Transfer(file, 0, sent)]) == [None]
    assert engine.read([Transfer(file, 0, back)]) == [None]
    assert torch.equal(sent, back)


def test_what_a_queue_does_not_take_goes_by_system_calls(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(KernelQueue, "submit", full)
    sent, back = aligned_bytes(13, 4096), empty_aligned(4096)

    assert engine.write([Transfer(file, 0, sent)]) == [None]
    assert engine.read([Transfer(file, 0, back)]) == [None]
    assert torch.equal(sent, back)


def test_an_interruption_waits_for_what_the_kernel_is_at(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, waits = KernelQueue.wait, list[int]()

    def interrupted(queue: KernelQueue) -> list[tuple[int, int]]:
        waits.append(queue.under_way)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return real(queue)

    monkeypatch.setattr(KernelQueue, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.write([Transfer(file, 0, aligned_bytes(14, 16 * 4096))])

    assert waits[-1] > 0
    assert engine.write([Transfer(file, 0, aligned_bytes(14, 4096))]) == [None]


def test_reads_begin_while_others_are_still_drawn(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, back = aligned_bytes(15, 4 * MIB), empty_aligned(4 * MIB)
    assert engine.write([Transfer(file, 0, sent)]) == [None]
    calls = queue_calls(monkeypatch)
    begun: list[int] = []

    def coming() -> Iterator[Transfer]:
        for at in range(0, 4 * MIB, MIB // 4):
            begun.append(len(calls))
            yield Transfer(file, at, back[at : at + MIB // 4])

    seen: list[int] = []
    assert engine.read(coming(), seen.append) == [None] * 16
    assert sorted(seen) == list(range(16))
    assert begun[0] == 0 < begun[-1]
    assert torch.equal(sent, back)


def test_writes_begin_while_others_are_still_filled(
    engine: PosixEngine, file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, back, memory = aligned_bytes(17, 4 * MIB), empty_aligned(4 * MIB), empty_aligned(4 * MIB)
    calls = queue_calls(monkeypatch)
    begun: list[int] = []

    def coming() -> Iterator[Transfer]:
        for at in range(0, 4 * MIB, MIB // 4):
            begun.append(len(calls))
            memory[at : at + MIB // 4] = sent[at : at + MIB // 4]
            yield Transfer(file, at, memory[at : at + MIB // 4])

    assert engine.write(coming()) == [None] * 16
    assert begun[:3] == [0, 1, 2], "a job that is full waits for nothing"
    assert [size for _, size in calls[:2]] == [MIB // 4] * 2
    assert len(calls) < 16, "small jobs at first, larger ones then"
    assert engine.read([Transfer(file, 0, back)]) == [None]
    assert torch.equal(sent, back)
