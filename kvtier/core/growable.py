"""Append-only arrays that forks share: whoever appends first continues in place, the others copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from kvtier.core.ledger import Ledger
from kvtier.storage_backends.memory import empty_huge

__all__ = ["GrowingArray", "GrowingSketch"]

_S = TypeVar("_S", bound=np.generic)
_GROWTH = 8
_MOST_LATE = 64
_PURPOSE = "sketches"


@dataclass(slots=True)
class _Sharing:
    """Owners of one buffer, and how far any of them has written it."""

    owners: int = 1
    written: int = 0

    def may_append(self, length: int) -> bool:
        """Whether an owner of ``length`` columns may write the next ones in place."""
        return self.owners == 1 or length == self.written


class GrowingArray(Generic[_S]):
    """An array [rows, length] that grows along its second axis, with room to spare."""

    __slots__ = ("_buffer", "_late", "_sharing", "length")

    def __init__(self, rows: int, dtype: type[_S]) -> None:
        self._buffer: np.ndarray[tuple[int, ...], np.dtype[_S]] = np.empty((rows, 0), dtype=dtype)
        self._late: list[int] = []
        self._sharing = _Sharing()
        self.length = 0

    @property
    def view(self) -> np.ndarray[tuple[int, ...], np.dtype[_S]]:
        """The contents [rows, length], without a copy."""
        self._settle()
        return self._buffer[:, : self.length]

    def append(self, columns: np.ndarray[Any, np.dtype[_S]]) -> None:
        """Add columns [rows, n]; one row of columns is repeated over the rows."""
        self._settle()
        self._write(columns)

    def append_one(self, value: int) -> None:
        """Add a column of this value, put away until somebody looks: a decode step adds many and looks at none."""
        if len(self._late) == _MOST_LATE:
            self._settle()
        self._late.append(value)
        self.length += 1

    def _settle(self) -> None:
        """Write what was put away."""
        if self._late:
            late, self._late = self._late, []
            self.length -= len(late)
            self._write(np.array([late], dtype=self._buffer.dtype))

    def _write(self, columns: np.ndarray[Any, np.dtype[_S]]) -> None:
        end = self.length + columns.shape[1]
        rows, capacity = self._buffer.shape
        if end > capacity or columns.shape[0] > rows or not self._sharing.may_append(self.length):
            grown = np.empty((max(rows, columns.shape[0]), end + end // _GROWTH + 16), dtype=self._buffer.dtype)
            grown[:, : self.length] = self._buffer[:, : self.length]
            self.release()
            self._buffer, self._sharing = grown, _Sharing()
        self._buffer[:, self.length : end] = columns
        self.length = self._sharing.written = end

    def truncate(self, length: int) -> None:
        """Forget what lies beyond ``length``."""
        self._settle()
        self.length = length

    def fork(self) -> GrowingArray[_S]:
        """A second owner of the same contents."""
        self._settle()
        twin: GrowingArray[_S] = GrowingArray.__new__(GrowingArray)
        twin._buffer, twin._sharing, twin.length, twin._late = self._buffer, self._sharing, self.length, []
        self._sharing.owners += 1
        return twin

    def release(self) -> None:
        """One owner fewer; the array must not be used again."""
        self._sharing.owners -= 1


class GrowingSketch:
    """Summaries of pages by name [Hk, pages, ...] on the device, counted by the ledger."""

    __slots__ = ("_buffers", "_capacity", "_ledger", "_sharing", "_views", "length")

    def __init__(self, ledger: Ledger) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._capacity = 0
        self._ledger = ledger
        self._sharing = _Sharing()
        self._views: dict[str, torch.Tensor] | None = None
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, whoever shares them."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def views(self) -> dict[str, torch.Tensor]:
        """The contents [1, Hk, length, ...] by name, without a copy; the same views until the contents change."""
        if self._views is None:
            self._views = {name: buffer[None, :, : self.length] for name, buffer in self._buffers.items()}
        return self._views

    def append(self, sketch: Mapping[str, torch.Tensor], reserve: int) -> None:
        """Add summaries [Hk, n, ...]; a new buffer holds at least ``reserve`` pages."""
        end = self.length + next(iter(sketch.values())).shape[1]
        if end > self._capacity or not self._sharing.may_append(self.length):
            self._grow(sketch, max(reserve, end + end // _GROWTH))
        for name, rows in sketch.items():
            self._buffers[name][:, self.length : end] = rows
        self.length = self._sharing.written = end
        self._views = None

    def truncate(self, length: int) -> None:
        """Forget the pages beyond ``length``."""
        self.length, self._views = length, None

    def fork(self) -> GrowingSketch:
        """A second owner of the same contents."""
        twin = GrowingSketch(self._ledger)
        twin._buffers, twin._capacity, twin.length = self._buffers, self._capacity, self.length
        self._sharing.owners += 1
        twin._sharing = self._sharing
        return twin

    def release(self) -> None:
        """One owner fewer; the last one gives the bytes back. Empty afterwards."""
        self._sharing.owners -= 1
        if not self._sharing.owners:
            self._ledger.give(_PURPOSE, self.nbytes)
        self._buffers, self._capacity, self.length, self._sharing = {}, 0, 0, _Sharing()
        self._views = None

    def _grow(self, sketch: Mapping[str, torch.Tensor], capacity: int) -> None:
        shapes = {name: (part.shape[0], capacity, *part.shape[2:]) for name, part in sketch.items()}
        self._ledger.take(_PURPOSE, sum(math.prod(shapes[name]) * part.element_size() for name, part in sketch.items()))
        grown = {name: empty_huge(shapes[name], part.dtype, part.device) for name, part in sketch.items()}
        for name, buffer in self._buffers.items():
            grown[name][:, : self.length] = buffer[:, : self.length]
        length = self.length
        self.release()
        self._buffers, self._capacity, self.length = grown, capacity, length
