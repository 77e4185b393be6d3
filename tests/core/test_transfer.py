"""The transfer engine: copies run off the caller's thread, without gradients, and end before it closes."""

from __future__ import annotations

import threading

import pytest
import torch

from kvtier.core.transfer import TransferEngine

CPU = torch.device("cpu")


def test_copies_run_in_other_threads_and_return_their_result() -> None:
    engine = TransferEngine(workers=1)

    name = engine.submit(CPU, lambda: threading.current_thread().name).result(timeout=10)

    engine.close()
    assert name.startswith("kvtier-transfer")


def test_several_copies_run_at_once() -> None:
    engine = TransferEngine(workers=2)
    meeting = threading.Barrier(2, timeout=10)

    futures = [engine.submit(CPU, meeting.wait) for _ in range(2)]

    assert sorted(future.result(timeout=10) for future in futures) == [0, 1]
    engine.close()


def test_copies_record_no_gradient() -> None:
    engine = TransferEngine(workers=1)
    weight = torch.ones(2, requires_grad=True)

    copied = engine.submit(CPU, lambda: weight * 2).result(timeout=10)

    engine.close()
    assert not copied.requires_grad


def test_an_error_stays_in_its_future() -> None:
    engine = TransferEngine(workers=1)

    def fail() -> None:
        raise OSError(5, "Input/output error")

    failed, fine = engine.submit(CPU, fail), engine.submit(CPU, lambda: 3)

    assert fine.result(timeout=10) == 3
    with pytest.raises(OSError, match="Input/output"):
        failed.result(timeout=10)
    engine.close()


def test_close_waits_for_what_runs_and_may_be_called_twice() -> None:
    before = set(threading.enumerate())
    engine = TransferEngine(workers=1)
    release, done = threading.Event(), threading.Event()

    def copy() -> None:
        release.wait(timeout=10)
        done.set()

    engine.submit(CPU, copy)
    timer = threading.Timer(0.05, release.set)
    timer.start()
    engine.close()
    engine.close()

    assert done.is_set()
    assert set(threading.enumerate()) <= before | {timer}


@pytest.mark.gpu
def test_a_copy_on_cuda_sees_what_was_queued_before_it() -> None:
    device = torch.device("cuda")
    engine = TransferEngine(workers=1)
    left = torch.randn(4096, 4096, device=device)
    for _ in range(8):
        product = left @ left
    expected = product.clone()

    copied = engine.submit(device, product.cpu).result(timeout=60)

    assert torch.equal(copied, expected.cpu())
    engine.close()
