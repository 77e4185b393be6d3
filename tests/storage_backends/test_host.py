"""Slots in host memory: the laws, growth by slabs, and what CUDA makes of them."""

import mmap
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest
import torch

from kvtier.errors import CapacityError
from kvtier.storage_backends.host import HostSlots
from kvtier.storage_backends.memory import PAGE_BYTES, PinnedRegion, empty_aligned
from kvtier.testing.backend_laws import BackendFactory, SlotBackendLaws
from kvtier.testing.backend_machine import random_rows

MIB = 1 << 20


class TestHostSlots(SlotBackendLaws):
    @pytest.fixture
    def backend(self) -> BackendFactory:
        return HostSlots


def test_memory_follows_use_both_ways() -> None:
    with HostSlots(8192, 8192) as slots:  # 64 MiB
        assert slots.allocated_bytes == 0
        held, taken = [], []
        while slots.free_slots:
            taken.append(slots.reserve(min(128, slots.free_slots)))
            held.append(slots.allocated_bytes)
        used = [MIB * (step + 1) for step in range(len(held))]
        # Up to a mebibyte of each slab lies idle: a reservation goes where it lies in one piece.
        assert all(now <= max(3 * MIB, 1.27 * use + 5 * MIB) for now, use in zip(held, used, strict=True))
        assert len(set(held)) <= 16
        assert held[-1] == slots.capacity_bytes == 64 * MIB

        for part in reversed(taken):
            slots.release(part)
        assert slots.allocated_bytes == 0


def test_transfers_cross_slabs_in_any_order() -> None:
    with HostSlots(8192, 2048) as slots:
        taken = slots.reserve(2048)
        order = np.random.default_rng(0).permutation(taken)
        rows = random_rows(0, 2048, 8192)
        slots.write(order, rows)
        into, back = torch.zeros_like(rows), torch.zeros_like(rows)

        slots.read(order, into)
        slots.read(taken, back)

        assert torch.equal(into, rows)
        assert torch.equal(back[torch.from_numpy(order)], rows)


def test_refused_memory_reserves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(12, "Cannot allocate memory")

    with HostSlots(8192, 4096) as slots:
        first = slots.reserve(1)
        held = slots.allocated_bytes
        monkeypatch.setattr(mmap, "mmap", refuse)

        with pytest.raises(CapacityError, match=r"required .* of host memory, which the system refused"):
            slots.reserve(4095)

        assert (slots.used_slots, slots.allocated_bytes) == (1, held)
        slots.write(first, random_rows(0, 1, 8192))


def test_memory_starts_at_a_page() -> None:
    region = PinnedRegion(10_000)

    assert region.bytes.data_ptr() % PAGE_BYTES == 0
    assert (region.bytes.numel(), region.held_bytes) == (10_000, 12_288)
    assert empty_aligned(3 * MIB).count_nonzero() == 0
    region.close()
    region.close()
    assert region.held_bytes == 0


class FakeCuda:
    """Counts what is locked; refuses when told to."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, _flags: int) -> int:  # noqa: N802 - the name of the runtime
        if self.status == 0:
            self.locked[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - the name of the runtime
        del self.locked[address]
        return 0


@pytest.mark.parametrize("status", [0, 2])
def test_slabs_are_locked_where_cuda_agrees(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    runtime = FakeCuda(status)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, cudart=lambda: runtime))
    with HostSlots(8192, 4096) as slots:
        slots.reserve(4096)

        assert slots.capabilities().pinned == (status == 0)
        assert bool(slots.capabilities().note) == (status != 0)
        assert sum(runtime.locked.values()) == (slots.allocated_bytes if status == 0 else 0)
    assert not runtime.locked


@pytest.mark.gpu
def test_slabs_are_really_pinned() -> None:
    region = PinnedRegion(4 * MIB)

    assert region.pinned
    assert region.bytes.is_pinned()
    assert torch.equal(region.bytes.to("cuda", non_blocking=True).cpu(), region.bytes)
    region.close()
