"""A state machine that holds a slot backend against a dict, for Hypothesis."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.errors import CapacityError, InputError
from kvtier.storage_backends.base import IntArray, SlotBackend

__all__ = ["SlotMachine", "random_rows"]


def random_rows(seed: int, count: int, slot_bytes: int) -> torch.Tensor:
    """Bytes [count, slot_bytes] that differ from seed to seed."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, slot_bytes), dtype=np.uint8))


class SlotMachine(RuleBasedStateMachine):
    """Reserves, writes, reads and releases at random; a dict says what every slot must hold.

    Parameters
    ----------
    backend : SlotBackend
        A fresh one, which the machine closes.
    """

    def __init__(self, backend: SlotBackend) -> None:
        super().__init__()
        self.backend = backend
        self.reserved: set[int] = set()
        self.stored: dict[int, bytes] = {}

    @rule(count=st.integers(0, 12))
    def reserve(self, count: int) -> None:
        """Reserving gives distinct new slots, or nothing at all."""
        note(f"reserve {count}, free {self.backend.free_slots}")
        if count > self.backend.capacity_slots - len(self.reserved):
            with pytest.raises(CapacityError):
                self.backend.reserve(count)
            return
        slots = self.backend.reserve(count).tolist()
        assert slots == sorted(set(slots))
        assert len(slots) == count
        assert not self.reserved.intersection(slots)
        self.reserved.update(slots)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Released slots are gone, and only they."""
        slots = self._some(data, self.reserved)
        note(f"release {slots.tolist()}")
        self.backend.release(slots)
        with pytest.raises(InputError):
            self.backend.release(slots[:1])
        self.reserved.difference_update(slots.tolist())
        for slot in slots.tolist():
            self.stored.pop(slot, None)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), seed=st.integers(0, 2**32 - 1))
    def write(self, data: st.DataObject, seed: int) -> None:
        """A write lands in its slots, in any order of them."""
        slots = self._some(data, self.reserved)
        rows = random_rows(seed, slots.size, self.backend.slot_bytes)
        note(f"write {slots.tolist()}")
        self.backend.write(slots, rows)
        self.stored.update(zip(slots.tolist(), map(bytes, rows.numpy()), strict=True))

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """A read returns what was written last."""
        self._compare(self._some(data, set(self.stored)))

    @rule()
    def read_everything(self) -> None:
        """No slot lost its bytes to the calls for others."""
        self._compare(np.asarray(sorted(self.stored), dtype=np.int64))

    def _compare(self, slots: IntArray) -> None:
        note(f"read {slots.tolist()}")
        into = torch.zeros(slots.size, self.backend.slot_bytes, dtype=torch.uint8)
        self.backend.read(slots, into)
        assert [bytes(row) for row in into.numpy()] == [self.stored[slot] for slot in slots.tolist()]

    @invariant()
    def counts_agree(self) -> None:
        """The backend counts as the dict does."""
        assert self.backend.used_slots == len(self.reserved)
        assert self.backend.free_slots == self.backend.capacity_slots - len(self.reserved)

    def teardown(self) -> None:
        """Close the backend."""
        self.backend.close()

    def _some(self, data: st.DataObject, among: set[int]) -> IntArray:
        chosen = data.draw(st.lists(st.sampled_from(sorted(among)), min_size=1, unique=True), label="slots")
        return np.asarray(chosen, dtype=np.int64)
