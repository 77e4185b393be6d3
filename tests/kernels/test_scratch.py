"""Scratch memory: one buffer per thread and name, never too large a one kept."""

import threading

import pytest
import torch

from kvtier.kernels import scratch as module
from kvtier.kernels.scratch import release, scratch

CPU = torch.device("cpu")


def test_the_same_name_is_the_same_memory() -> None:
    first = scratch("logits", (4, 8), torch.float32, CPU)
    second = scratch("logits", (2, 3), torch.float32, CPU)
    assert second.shape == (2, 3)
    assert second.data_ptr() == first.data_ptr()


def test_names_and_types_have_their_own() -> None:
    taken = [
        scratch("keys", (4,), torch.float32, CPU),
        scratch("values", (4,), torch.float32, CPU),
        scratch("keys", (4,), torch.bfloat16, CPU),
    ]
    assert len({tensor.data_ptr() for tensor in taken}) == 3


def test_a_larger_request_replaces_the_buffer() -> None:
    scratch("keys", (4,), torch.float32, CPU)
    large = scratch("keys", (400,), torch.float32, CPU)
    assert scratch("keys", (4,), torch.float32, CPU).data_ptr() == large.data_ptr()


def test_too_large_a_buffer_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 64)
    kept = scratch("keys", (16,), torch.float32, CPU)
    passing = scratch("keys", (17,), torch.float32, CPU)
    assert passing.shape == (17,)
    assert scratch("keys", (16,), torch.float32, CPU).data_ptr() == kept.data_ptr()


def test_threads_do_not_share() -> None:
    mine = scratch("keys", (4,), torch.float32, CPU)
    theirs: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: theirs.append(scratch("keys", (4,), torch.float32, CPU)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()


def test_release_forgets() -> None:
    held = scratch("keys", (4,), torch.float32, CPU)
    release()
    assert scratch("keys", (4,), torch.float32, CPU).data_ptr() != held.data_ptr()


def test_memory_taken_in_inference_mode_serves_outside_of_it() -> None:
    with torch.inference_mode():
        taken = scratch("keys", (4,), torch.float32, CPU)
    scratch("keys", (4,), torch.float32, CPU).fill_(1)
    assert taken.tolist() == [1, 1, 1, 1]


def test_a_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        assert scratch("keys", (4,), torch.float32, CPU).device == CPU


def test_other_devices_get_plain_allocations() -> None:
    taken = scratch("keys", (4, 2), torch.float32, torch.device("meta"))
    assert taken.device.type == "meta"
    assert taken.shape == (4, 2)
