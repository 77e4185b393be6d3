"""The slot backend: fixed-size byte slots under the host and nvme tiers of a live session (the spill service)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from kvtier.errors import ConfigError, InputError
from kvtier.storage_backends.slots import IntArray

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Capabilities", "IntArray", "SlotBackend", "check_rows", "check_sizes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend really is, found out when it was opened.

    Parameters
    ----------
    name : str
        Short name, for reports and metrics.
    pinned : bool
        The slots lie in page-locked memory.
    direct_io : bool
        Transfers pass by the page cache, so that spilled bytes do not take host memory twice.
    alignment : int
        Bytes; rows that start at a multiple of it are transferred without an extra copy. 1: any rows are.
    persistent : bool
        The bytes outlive the process. Never so for the spill service.
    simulated : bool
        The device is an emulation; its timings say nothing.
    note : str
        What a user should know, such as why a fallback was taken; empty when there is nothing to say.
    """

    name: str
    pinned: bool
    direct_io: bool
    alignment: int
    persistent: bool = False
    simulated: bool = False
    note: str = ""


class SlotBackend(ABC):
    """A bounded place for byte slots of one size.

    A slot is reserved, written, read any number of times, and released; its bytes mean nothing before the first
    write. Whoever reserved a slot owns it: transfers of different slots may run in different threads, beside any
    `reserve` and `release`; two threads never use one slot at the same time unless both read.

    Attributes
    ----------
    slot_bytes : int
        Payload bytes of a slot.
    capacity_slots : int
        Most slots that can be reserved at once.
    """

    slot_bytes: int
    capacity_slots: int

    @abstractmethod
    def reserve(self, count: int) -> IntArray:
        """Take ``count`` free slots, ascending, in one run where one is free.

        Returns
        -------
        IntArray
            Slot numbers [count], int64.

        Raises
        ------
        CapacityError
            Fewer are free, or their memory could not be had; nothing was reserved.
        """

    @abstractmethod
    def release(self, slots: IntArray) -> None:
        """Give slots back; all of them or, when one is not reserved or is named twice, none.

        Raises
        ------
        InputError
            A slot that is unknown, not reserved, or named twice.
        """

    @abstractmethod
    def write(self, slots: IntArray, data: torch.Tensor) -> None:
        """Store ``data`` [n, slot_bytes] (uint8, CPU): row i into ``slots[i]``. Blocks until ``data`` may be reused.

        Raises
        ------
        InputError
            Slots that are not reserved or named twice, or rows of another shape, type or device.
        StorageError
            The medium failed; the slots named in the message hold undefined bytes.
        """

    @abstractmethod
    def read(self, slots: IntArray, into: torch.Tensor) -> None:
        """Fill ``into`` [n, slot_bytes] (uint8, CPU): row i from ``slots[i]``. Blocks; never short.

        Raises
        ------
        InputError
            Slots that are not reserved, or rows of another shape, type or device.
        StorageError
            The medium failed; ``into`` is undefined.
        DamagedSlotsError
            From verifying backends: the bytes are not those that were written.
        """

    @property
    @abstractmethod
    def free_slots(self) -> int:
        """Slots that can still be reserved."""

    @property
    def used_slots(self) -> int:
        """Slots that are reserved."""
        return self.capacity_slots - self.free_slots

    @property
    @abstractmethod
    def allocated_bytes(self) -> int:
        """Bytes held now, as the operating system counts them."""

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """Most bytes the slots may ever take, padding included."""

    @classmethod
    def slots_within(cls, slot_bytes: int, capacity_bytes: int) -> int:
        """Most slots of ``slot_bytes`` whose `capacity_bytes` stays within a budget."""
        check_sizes(slot_bytes, 0)
        return max(0, capacity_bytes) // slot_bytes

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What the backend found when it was opened."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back, after transfers that are under way; a second call does nothing.

        Every other call then raises `StorageError`; the counters stay readable.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_sizes(slot_bytes: int, capacity_slots: int) -> None:
    """Refuse sizes that no backend can have.

    Raises
    ------
    ConfigError
        ``slot_bytes`` below 1 or ``capacity_slots`` below 0.
    """
    if slot_bytes < 1:
        raise ConfigError(f"slot_bytes must be at least 1, got {slot_bytes}")
    if capacity_slots < 0:
        raise ConfigError(f"capacity_slots must be at least 0, got {capacity_slots}")


def check_rows(rows: torch.Tensor, count: int, slot_bytes: int) -> None:
    """Refuse rows that are not [count, slot_bytes] bytes in host memory.

    Raises
    ------
    InputError
        Another shape, type or device.
    """
    if rows.dtype != torch.uint8 or rows.device.type != "cpu" or rows.shape != (count, slot_bytes):
        raise InputError(
            f"rows must be uint8 [{count}, {slot_bytes}] on the CPU, got {rows.dtype} {list(rows.shape)} on "
            f"{rows.device}; copy them to a staging buffer and view them as bytes"
        )
